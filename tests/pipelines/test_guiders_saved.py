"""Guiders on disk and back, in a process that knows only the files; and what they refuse."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap

import diffusers
import pytest
import torch
from diffusers.guiders import BaseGuidance
from diffusers.guiders import ClassifierFreeGuidance as TheirGuider
from tiny_pipelines import build, unets
from tiny_pipelines.common import finish

from diffsteer import guidance
from diffsteer.core import MissingPrediction
from diffsteer.guidance import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    CosineScale,
    GuidanceInterval,
)
from diffsteer.pipelines import (
    AdaptiveProjectedGuider,
    ClassifierFreeGuider,
    RuleGuider,
    attach,
    install_guider,
)
from diffsteer.pipelines.guider_config import describe, restore

NESTED = GuidanceInterval.flow(AdaptiveProjectedGuidance(CosineScale(1.0, 9.0), radius=12.5), 0.2)


def test_a_config_holds_plain_values_only(tmp_path) -> None:
    guider = AdaptiveProjectedGuider(guidance_scale=6.5, momentum=-0.25, stop=0.5)
    guider.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "guider_config.json").read_text())
    assert {name: value for name, value in saved.items() if not name.startswith("_")} == {
        "guidance_scale": 6.5,
        "eta": 0.0,
        "radius": None,
        "relative_radius": 0.05,
        "momentum": -0.25,
        "latent_std": 1.0,
        "interval_low": 0.0,
        "interval_high": None,
        "start": 0.0,
        "stop": 0.5,
        "enabled": True,
    }
    loaded = AdaptiveProjectedGuider.from_pretrained(tmp_path)
    assert loaded.rule == guider.rule and loaded._stop == 0.5
    assert guider.new(eta=0.5).rule == AdaptiveProjectedGuidance(6.5, eta=0.5, momentum=-0.25)


@pytest.mark.parametrize("rule", [NESTED, *(cls() for cls in (ClassifierFreeGuidance,))])
def test_any_rule_of_ours_can_be_saved(rule, tmp_path) -> None:
    guider = RuleGuider(rule, start=0.25)
    guider.save_pretrained(tmp_path)
    loaded = RuleGuider.from_pretrained(tmp_path)
    assert loaded.rule == rule == guider.new().rule and loaded._start == 0.25
    assert "Infinity" not in (tmp_path / "guider_config.json").read_text(), "that is no JSON"


def test_every_method_with_plain_arguments_has_a_description() -> None:
    described = 0
    for cls in guidance.rules().values():
        try:
            rule = cls()
        except TypeError:
            continue  # it wraps another rule or a model
        if (description := describe(rule)) is not None:
            assert restore(json.loads(json.dumps(description))) == rule
            described += 1
    assert described >= 2


def test_the_named_guiders_are_the_rules_they_name() -> None:
    assert ClassifierFreeGuider().rule == ClassifierFreeGuidance(7.5)
    assert AdaptiveProjectedGuider().rule == AdaptiveProjectedGuidance()
    unclipped = AdaptiveProjectedGuider(radius=None, relative_radius=None).rule
    assert unclipped == AdaptiveProjectedGuidance(radius=float("inf"))
    assert AdaptiveProjectedGuider(radius=15.0).rule == AdaptiveProjectedGuidance(radius=15.0)
    inside = ClassifierFreeGuider(guidance_scale=3.0, interval_low=0.3, interval_high=5.0).rule
    assert inside == GuidanceInterval(ClassifierFreeGuidance(3.0), 0.3, 5.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[str, str]:
    """A Modular SDXL and a classic HunyuanImage with guiders, saved."""
    modular, classic = (str(tmp_path_factory.mktemp(name)) for name in ("modular", "classic"))
    pipe = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**unets.sdxl_parts())
    install_guider(finish(pipe, torch.float32), AdaptiveProjectedGuider(guidance_scale=6.0))
    pipe.save_pretrained(modular, overwrite_modular_index=True)
    tiny = build("hunyuan-image")
    install_guider(tiny.pipe, RuleGuider(NESTED))
    tiny.pipe.save_pretrained(classic)
    return modular, classic


def test_a_saved_pipeline_names_our_package(saved) -> None:
    modular, classic = saved
    with open(f"{modular}/modular_model_index.json") as file:
        library, name, spec = json.load(file)["guider"]
    assert (
        [library, name] == spec["type_hint"] == ["diffsteer.pipelines", "AdaptiveProjectedGuider"]
    )
    with open(f"{modular}/guider/guider_config.json") as file:
        assert json.load(file)["guidance_scale"] == 6.0
    with open(f"{classic}/model_index.json") as file:
        assert json.load(file)["guider"] == ["diffsteer.pipelines", "RuleGuider"]


def test_loading_in_a_fresh_process(saved) -> None:
    program = """
        import sys
        import diffsteer.pipelines as ours
        import diffusers

        modular, classic = sys.argv[1:]
        pipe = diffusers.ModularPipeline.from_pretrained(modular)
        pipe.load_components()
        assert type(pipe.guider) is ours.AdaptiveProjectedGuider, type(pipe.guider)
        assert pipe.guider.rule.scale == 6.0 and pipe.guider.scheduler is None
        ours.attach(pipe)
        assert pipe.guider.scheduler is pipe.scheduler

        parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        pipe = diffusers.HunyuanImagePipeline.from_pretrained(
            classic, vae=None, ocr_guider=None, **parts
        )
        assert type(pipe.guider) is ours.RuleGuider and pipe.guider.rule.rule.radius == 12.5
    """
    command = [sys.executable, "-c", textwrap.dedent(program), *saved]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plain_update_components_would_lose_the_guider(tmp_path) -> None:
    """Why install_guider exists; when this fails, diffusers keeps guiders and it can go."""
    pipe = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(guider=AdaptiveProjectedGuider())
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    assert not (tmp_path / "guider").exists()


def test_making_a_guider_logs_nothing(caplog) -> None:
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.WARNING)
    try:
        AdaptiveProjectedGuider()
        ClassifierFreeGuider().new()
        assert not caplog.records
        TheirGuider()
        assert "experimental" in caplog.text, "other guiders' notices are none of our business"
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(level)


class Own:
    moves = False

    def __call__(self, step):
        return step.cond


class Mover(Own):
    moves = True


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: RuleGuider("apg"), TypeError, "ClassifierFreeGuidance"),
        (lambda: RuleGuider(ClassifierFreeGuidance), TypeError, "guidance method"),
        (lambda: RuleGuider({"method": "Nonsense"}), ValueError, "one of"),
        (lambda: RuleGuider({"method": "ClassifierFreeGuidance", "eta": 1}), ValueError, "eta"),
        (lambda: RuleGuider(Mover()), ValueError, "steer"),
        (lambda: AdaptiveProjectedGuider(guidance_scale=float("nan")), ValueError, "scale"),
        (lambda: AdaptiveProjectedGuider(radius=-1.0), ValueError, "radius"),
        (lambda: AdaptiveProjectedGuider(guidance_scale="strong"), ValueError, "linear:"),
        (lambda: ClassifierFreeGuider(interval_low=2.0, interval_high=1.0), ValueError, "low"),
        (lambda: ClassifierFreeGuider(start=0.5, stop=0.25), ValueError, "stop"),
        (lambda: RuleGuider(Own()).save_pretrained("nowhere"), ValueError, "cannot be saved"),
        (lambda: RuleGuider(Own()).new(), TypeError, "cannot be loaded"),
        (lambda: attach("pipe"), TypeError, "pipeline"),
        (lambda: attach(build("sd").pipe), ValueError, "install_guider"),
        (lambda: attach(build("modular-sd3").pipe), ValueError, "install_guider"),
        (lambda: install_guider(build("sd").pipe, ClassifierFreeGuider()), ValueError, "steer"),
        (lambda: install_guider(build("modular-sd3").pipe, Own()), TypeError, "RuleGuider"),
    ],
)
def test_wrong_arguments_are_refused(make, error, text) -> None:
    with pytest.raises(error, match=text):
        make()


def test_a_level_is_not_guessed_for_models_that_are_no_flows() -> None:
    tiny = build("modular-sdxl")
    tiny.pipe.update_components(guider=AdaptiveProjectedGuider())
    with pytest.raises(MissingPrediction, match=r"attach\(pipe\)"):
        tiny.call()
    tiny.pipe.update_components(guider=ClassifierFreeGuider())
    assert tiny.call().isfinite().all(), "plain guidance needs no level"
    tiny.pipe.update_components(guider=ClassifierFreeGuider(interval_high=5.0))
    with pytest.raises(MissingPrediction, match=r"attach\(pipe\)"):
        tiny.call()


def test_timesteps_in_the_unit_interval_are_not_guessed_either() -> None:
    guider = AdaptiveProjectedGuider()
    guider.set_state(step=0, num_inference_steps=2, timestep=torch.tensor(0.0))
    network = torch.nn.Conv2d(4, 4, 1)
    prediction = torch.randn(2, 4, 8, 8)
    for _ in range(2):
        guider.prepare_models(network)
        network(prediction)
        guider.cleanup_models(network)
    with pytest.raises(MissingPrediction, match="which end is noise"):
        guider.forward(prediction, prediction)


@pytest.mark.parametrize("name", ["modular-sd3", "modular-z-image", "modular-qwen"])
def test_a_missing_negative_prompt_is_named(name: str) -> None:
    tiny = build(name)
    install_guider(tiny.pipe, ClassifierFreeGuider())
    given = tiny.inputs()
    if "prompt" in given:  # this text encoder would fill it in, so embeddings are given
        given = {n: v for n, v in given.items() if n in ("height", "width")}
        given["prompt_embeds"] = torch.randn(2, 5, 32)
        given["pooled_prompt_embeds"] = torch.randn(2, 32)
        tiny.pipe._blocks.sub_blocks.pop("text_encoder")
    given = {n: v for n, v in given.items() if not n.startswith("negative")}
    with pytest.raises(MissingPrediction, match="negative_prompt"):
        tiny.pipe(output="latents", num_inference_steps=2, **given)


def test_an_old_diffusers_is_named(monkeypatch) -> None:
    monkeypatch.delattr(BaseGuidance, "prepare_inputs_from_block_state")
    monkeypatch.delattr(RuleGuider, "prepare_inputs_from_block_state")
    with pytest.raises(ImportError, match=r"diffusers >= 0\.36"):
        ClassifierFreeGuider()
