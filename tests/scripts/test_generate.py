"""generate.py: folders that resume and are never spoilt, any pipeline, options from dataclasses."""

from __future__ import annotations

import errno
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scripts_main
from PIL import Image
from tiny_flow import tiny_pipeline
from tiny_pipelines import build

from diffsteer import ClassConditionalPipeline, steer
from diffsteer.guidance import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    GuidanceInterval,
    ManifoldProjectedGuidance,
)
from diffsteer.pipelines import files, generate_images, plan_images

cli = scripts_main.load("_cli")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline("denoised").save_pretrained(folder)
    return folder


@pytest.fixture
def generate(model, tmp_path, capsys):
    """Run generate.py on the tiny model into tmp_path/out; exit code and standard error."""

    def run(*arguments, out="out", model=model):
        options = ("--model", model, "--steps", 3, "--device", "cpu", "--out", tmp_path / out)
        capsys.readouterr()
        code = scripts_main.run("generate", *options, *arguments)
        return code, capsys.readouterr().err.strip().split("\n")[-1]

    return run


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def pixels(folder: Path) -> dict[str, np.ndarray]:
    found = sorted((folder / "images").iterdir())
    return {path.name: array(Image.open(path)) for path in found}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, image in one.items():
        assert np.abs(image - other[name]).max() <= 1, name  # rounding in another batch


def test_images_are_those_of_the_steered_pipeline(generate, model, tmp_path):
    rule = ("--guidance", "apg", "--scale", "5", "--eta", "0.5", "--flow-interval", "0.2", "1")
    assert generate("--seeds", "3,8-9", "--classes", "cat,truck", *rule) == (0, "")
    images = pixels(tmp_path / "out")
    assert list(images) == ["000003_cat.png", "000008_truck.png", "000009_cat.png"]
    pipe = ClassConditionalPipeline.from_pretrained(model)
    inner = AdaptiveProjectedGuidance(scale=5.0, eta=0.5, latent_std=0.5)
    with steer(pipe, GuidanceInterval.flow(inner, 0.2, 1.0)):
        call = {"seeds": [3, 8, 9], "num_inference_steps": 3, "guidance_scale": 2.0}
        expected = pipe(["cat", "truck", "cat"], **call).images
    assert_same(images, dict(zip(images, map(array, expected), strict=True)))
    with Image.open(tmp_path / "out/grid.png") as grid:
        assert grid.width > 2 * 96


def test_run_json_says_how_each_image_was_made(generate, model, tmp_path):
    generate("--num", 4, "--classes", "3,9", "--guidance", "cfg", "--scale", "linear:1:4")
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["complete"] is True
    assert run["images"][1] == {
        "file": "images/000001_truck.png", "seed": 1, "label": 9, "name": "truck", "prompt": None,
    }  # fmt: skip
    config, session = run["config"], run["sessions"][0]
    assert config["model"] == str(model) and config["steps"] == 3
    assert config["guidance"]["class"] == "ClassifierFreeGuidance"
    ramp = {"class": "LinearScale", "arguments": {"start": 1.0, "end": 4.0}}
    assert config["guidance"]["arguments"]["scale"] == ramp
    assert config["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert session["generated"] == 4 and session["versions"]["diffsteer"]
    assert run["id2label"]["3"] == "cat"


def test_an_interrupted_run_goes_on_where_it_stopped(generate, tmp_path, monkeypatch):
    assert generate("--num", 7, "--batch-size", 7, out="whole")[0] == 0
    calls = []

    original = ClassConditionalPipeline.__call__

    @functools.wraps(original)
    def stop_at_third_batch(self, *args, **kwargs):
        calls.append(len(kwargs["class_labels"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ClassConditionalPipeline, "__call__", stop_at_third_batch)
    assert generate("--num", 7, "--batch-size", 2)[0] == 130
    out = tmp_path / "out"
    assert len(pixels(out)) == 4
    assert json.loads((out / "run.json").read_text())["complete"] is False
    damaged, deleted = sorted((out / "images").iterdir())[1:3]
    damaged.write_bytes(damaged.read_bytes()[:-30])
    deleted.unlink()
    (out / "images/.000001.png.77.part").write_bytes(b"left by a killed process")
    kept = sorted((out / "images").iterdir())[-1]
    before = kept.stat().st_mtime_ns
    calls.clear()
    calls += [0] * 3
    assert generate("--num", 7, "--batch-size", 4)[0] == 0
    assert calls[3:] == [4, 1]  # the damaged, the deleted and the three that were never made
    assert kept.stat().st_mtime_ns == before
    assert_same(pixels(out), pixels(tmp_path / "whole"))


def test_a_finished_run_is_left_alone_and_can_be_extended(generate, tmp_path):
    generate("--num", 3)
    before = snapshot(tmp_path / "out")
    assert generate("--num", 3) == (0, "")
    assert snapshot(tmp_path / "out") == before
    assert generate("--num", 5) == (0, "")
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert [s["generated"] for s in run["sessions"]] == [3, 2] and len(run["images"]) == 5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("--steps", 4), "steps was 3, now 4"),
        (("--guidance", "cfg"), "guidance was null, now"),
        (("--dtype", "bfloat16"), 'dtype was "float32", now "bfloat16"'),
        (("--call", "sigmas=[1, 0.5]"), "call was {}, now"),
        (("--classes", "5"), "it has images/000000_airplane.png, which is not asked for"),
        (("--num", 2), "which is not asked for now"),
    ],
)
def test_another_configuration_is_refused_and_harms_nothing(generate, tmp_path, change, text):
    generate("--num", 3)
    before = snapshot(tmp_path / "out")
    code, message = generate("--num", 3, *change)
    assert code == 2 and text in message and "--overwrite" in message
    assert snapshot(tmp_path / "out") == before


def test_a_model_that_changed_in_its_folder_is_noticed(generate, tmp_path):
    tiny_pipeline("denoised").save_pretrained(tmp_path / "mine")
    generate("--num", 1, model=tmp_path / "mine")
    tiny_pipeline("velocity").save_pretrained(tmp_path / "mine")
    code, message = generate("--num", 1, model=tmp_path / "mine")
    assert code == 2 and "model_digest was" in message


def test_a_rank_makes_its_share_and_no_more(tmp_path):
    pipe = tiny_pipeline("denoised")
    requests = plan_images(range(5), pipe=pipe)
    state = SimpleNamespace(process_index=1, num_processes=2, wait_for_everyone=lambda: None)
    generate_images(pipe, requests, tmp_path, steps=1, batch_size=1, state=state)
    found = {path.name for path in (tmp_path / "images").iterdir()}
    assert found == {Path(request.file).name for request in requests[1::2]}


def test_overwrite_removes_the_run_and_nothing_else(generate, tmp_path):
    generate("--num", 3)
    notes = tmp_path / "out/images/notes.txt"
    notes.write_text("mine")
    assert generate("--num", 2, "--steps", 2, "--overwrite")[0] == 0
    left = {path.name for path in (tmp_path / "out/images").iterdir()}
    assert left == {"notes.txt", "000000_airplane.png", "000001_automobile.png"}


def test_overwrite_removes_nothing_for_a_method_that_fails_at_its_first_step(generate, tmp_path):
    generate("--num", 3)
    before = snapshot(tmp_path / "out")
    nowhere = ("--guidance", "cfg", "--interval", 5000, 9000)
    code, message = generate("--num", 2, "--overwrite", *nowhere)
    assert code == 2 and "no step of this run" in message
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_a_folder_of_something_else_is_never_touched(generate, tmp_path, more):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    code, message = generate("--num", 1, *more)
    assert code == 2 and "is not empty" in message and "choose another folder" in message
    assert snapshot(tmp_path / "out") == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}'])
def test_a_damaged_run_json_is_not_guessed_at(generate, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.json").write_text(content)
    code, message = generate("--num", 1, "--overwrite")
    assert code == 2 and "run.json" in message and "choose another folder" in message


def test_a_full_disk_loses_nothing_that_was_finished(generate, tmp_path, monkeypatch):
    replace, written = os.replace, []

    def full_at_third_image(source, target):
        if str(target).endswith(".png"):
            written.append(target)
            if len(written) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full_at_third_image)
    code, message = generate("--num", 4)
    assert code == 2 and "000002_bird.png: No space left on device" in message
    assert "run the same command again" in message
    out = tmp_path / "out"
    assert [p.name for p in (out / "images").iterdir() if p.suffix != ".png"] == []
    assert len(pixels(out)) == 2
    monkeypatch.undo()
    assert generate("--num", 4)[0] == 0 and len(pixels(out)) == 4


BAD = {
    "path": (("--model", "./nowhere"), "model: there is no pipeline folder './nowhere'"),
    "word": (("--model", "embeded"), "'embeded'; give 'embedded'"),
    "no pipeline": (("--model", Path(__file__).parent), "no model_index.json"),
    "hub id offline": (("--model", "nobody/nothing"), "model: cannot load 'nobody/nothing'"),
    "scale": (("--guidance", "cfg", "--scale", "nan"), "--scale: cannot read 'nan'"),
    "scale word": (("--guidance", "cfg", "--scale", "big"), "linear:START:END"),
    "radius": (("--guidance", "apg", "--radius", "-1"), "radius must be in"),
    "choice": (("--guidance", "apg", "--form", "x"), "--form must be one of paper, uncond"),
    "stray": (("--guidance", "cfg", "--eta", "0"), "--eta is no option of --guidance cfg"),
    "no method": (("--scale", "3"), "--scale has no meaning without --guidance"),
    "interval": (("--guidance", "cfg", "--interval", "3", "1"), "low must be less than high"),
    "flow": (("--guidance", "cfg", "--flow-interval", "0", "3"), "high must be in [0, 1]"),
    "label": (("--classes", "3,11"), "class_labels: 11 is out of range"),
    "negative label": (("--classes", "-1"), "class_labels: -1 is out of range"),
    "name": (("--classes", "unicorn"), "unknown class name 'unicorn'"),
    "steps": (("--steps", 0), "steps must be an integer of at least 1, got 0"),
    "num": (("--num", 0), "--num must be at least 1, got 0"),
    "batch": (("--batch-size", 0), "batch_size must be an integer of at least 1, got 0"),
    "seeds": (("--seeds", "1;2"), "numbers and ranges such as 0-9,20, got '1;2'"),
    "double seed": (("--seeds", "1,2,1"), "seeds: 1 is given twice"),
    "count": (("--seeds", "1,2", "--num", 3), "--seeds gives 2 seeds, but --num is 3"),
    "open": (("--seeds", "5-"), "add --num"),
    "prompt": (("--prompt", "a fox"), "ClassConditionalPipeline takes no prompt"),
    "prompt file": (("--prompt-file", "nowhere.txt"), "nowhere.txt"),
    "base": (("--guidance", "apg", "--base", "cfg"), "--base has no meaning for --guidance apg"),
    "base name": (("--guidance", "cfgmp", "--base", "x"), "--base must be one of"),
    "call": (("--call", "colour=3"), "takes no argument 'colour'"),
    "call form": (("--call", "sigmas"), "--call must look like NAME=JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_no_folder(generate, tmp_path, name):
    arguments, text = BAD[name]
    code, message = generate(*arguments)
    assert code == 2 and message.startswith("error: ") and text in message
    assert not (tmp_path / "out").exists()


def test_a_corrupt_checkpoint_is_named(generate, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "mine")
    weights = tmp_path / "mine/transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, message = generate("--num", 1, model=tmp_path / "mine")
    assert code == 2 and str(tmp_path / "mine") in message and "damaged or incomplete" in message
    assert not (tmp_path / "out").exists()


def test_traceback_shows_where_an_error_comes_from(generate):
    with pytest.raises(ValueError, match="steps"):
        generate("--steps", 0, "--traceback")


FAMILIES = {
    "dit": (("--classes", "3,7"), {"class_labels": [3, 7]}),
    "sd": ((), {}),
    "sdxl": ((), {}),
    "sd3": ((), {}),
    "flux": ((), {"negative_prompt": ["", ""]}),
    "pixart": (("--call", "use_resolution_binning=false"), {"use_resolution_binning": False}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_local_folders_of_any_family(family, generate, tmp_path):
    options, call = FAMILIES[family]
    tiny = build(family)
    if family == "flux":  # the real one has a shift, and FluxPipeline adds it unasked
        tiny.pipe.vae.register_to_config(shift_factor=0.1)
    tiny.pipe.save_pretrained(tmp_path / "mine")
    if family != "dit":
        (tmp_path / "prompts.txt").write_text("a red fox\n\ntwo blue birds\n")
        options += ("--prompt-file", tmp_path / "prompts.txt", "--height", 16, "--width", 16)
        call = {"prompt": ["a red fox", "two blue birds"], "height": 16, "width": 16, **call}
    rule = ("--guidance", "cfg", "--scale", "3")
    assert generate(*options, *rule, "--num", 2, model=tmp_path / "mine") == (0, "")
    call[tiny.guidance_argument] = 3.0
    seeds = cli.torch.Generator().manual_seed(0), cli.torch.Generator().manual_seed(1)
    plain = tiny.pipe(num_inference_steps=3, generator=list(seeds), **call).images
    assert_same(
        pixels(tmp_path / "out"),
        dict(zip(pixels(tmp_path / "out"), map(array, plain), strict=True)),
    )


def test_autoguidance_takes_a_weak_folder(generate, model, tmp_path):
    options = ("--guidance", "autoguidance", "--scale", "3", "--num", 2)
    assert generate(*options, "--weak", model) == (0, "")
    assert generate("--num", 2, out="plain")[0] == 0
    assert_same(pixels(tmp_path / "out"), pixels(tmp_path / "plain"))  # its own equal: no push
    code, message = generate(*options, "--weak", "./nowhere", out="other")
    assert code == 2 and "weak: there is no model in the folder './nowhere'" in message
    code, message = generate(*options, out="other")
    assert code == 2 and "weak" in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--guidance", "cfgmp"), ManifoldProjectedGuidance(ClassifierFreeGuidance())),
        (
            ("--guidance", "autoguidance", "--base", "apg:scale=2,eta=1"),
            AutoGuidance(rule=AdaptiveProjectedGuidance(scale=2.0, eta=1.0)),
        ),
        (("--guidance", "apg", "--radius", "5"), AdaptiveProjectedGuidance(radius=5.0)),
        (
            ("--guidance", "cfg", "--interval", "0.5", "inf"),
            GuidanceInterval(ClassifierFreeGuidance(), 0.5, float("inf")),
        ),
    ],
)
def test_rules_are_built_from_texts(options, expected):
    args = scripts_main.load("generate").parser().parse_args(["--out", "x", *options])
    assert cli.build_rule(args) == expected


def test_text_pipelines_need_a_prompt(generate, tmp_path):
    build("sd").pipe.save_pretrained(tmp_path / "mine")
    code, message = generate("--num", 1, model=tmp_path / "mine")
    assert code == 2 and "makes images from text; give --prompt" in message


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_images(generate, model, tmp_path):
    # Not --num: torchrun takes it for an abbreviation of its own (accelerate launch does not).
    options = ("--seeds", "0-4", "--batch-size", "2", "--guidance", "apg", "--scale", "4")
    assert generate(*options)[0] == 0
    script = Path(scripts_main.SCRIPTS) / "generate.py"
    launch = (sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node=2")
    mine = ("--model", model, "--steps", "3", "--device", "cpu", "--out", tmp_path / "two")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launch, "--standalone", str(script), *map(str, mine), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same(pixels(tmp_path / "out"), pixels(tmp_path / "two"))
    run = json.loads((tmp_path / "two/run.json").read_text())
    assert run["complete"] and run["sessions"][0]["ranks"] == 2


def test_options_are_those_of_the_dataclasses():
    text = scripts_main.load("generate").parser().format_help()
    for rule in cli.rule_choices().values():
        for name in cli._readers(rule):
            assert "--" + name.replace("_", "-") in text
    assert {"cfg", "apg"} <= set(cli.rule_choices())
    assert "how much of the update along the conditional prediction is kept" in " ".join(
        text.split()
    )


@pytest.mark.parametrize(
    ("text", "count", "values"),
    [("3", None, [3]), ("0-3,9", None, [0, 1, 2, 3, 9]), ("7,100-", 3, [7, 100, 101])],
)
def test_seed_lists(text, count, values):
    assert cli.integers(text, count=count) == values
