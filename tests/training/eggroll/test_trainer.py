"""The EGGROLL trainer alone: it improves, resumes bit for bit, replays, and loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from eggroll_runs import hash_of, log_lines, small_config, trainer
from PIL import Image
from tiny_flow import tiny_pipeline
from tiny_pipelines import build

from diffsteer.training import CheckpointError
from diffsteer.training.eggroll import Eggroll, EggrollConfig, make_eggroll, replay
from diffsteer.training.eggroll.questions import draw_questions, fixed_questions
from diffsteer.training.prompts import Prompt, class_prompts
from diffsteer.training.rewards import Brightness, JpegSize, RewardError, RewardSet

NAN = float("nan")


# -- what it is for ------------------------------------------------------------------------------


def test_the_mean_parameters_improve_without_any_gradient(tmp_path: Path) -> None:
    seen = []

    def steps_of_brightness(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.requires_grad or torch.is_grad_enabled())
        return (Brightness()(images) * 50).floor()  # flat almost everywhere

    run = trainer(
        tmp_path, steps_of_brightness, steps=10, population_size=16, member_batch_size=0,
        eval_every=5, eval_images=12, held_out=RewardSet({"size": JpegSize()}),
    )  # fmt: skip
    assert run.run() and not any(seen)
    lines = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert [line["generation"] for line in lines] == [0, 5, 10]
    assert lines[-1]["reward/it"] > lines[0]["reward/it"] + lines[0]["reward/it_std"]
    assert "held_out/size" in lines[0]
    assert all(not weight.requires_grad or weight.grad is None for weight in parameters(run))
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 2 * 96 and grid.height > 2 * 96
    assert (tmp_path / "previews" / "step-000005.png").exists()


def parameters(run: Any) -> list[torch.Tensor]:
    return list(run.pipe.transformer.parameters())


@pytest.mark.parametrize("family, scale", [("sd", 1.0), ("sd", 3.0), ("sd3", 3.0), ("flux", 1.0)])
def test_any_pipeline_that_denoises_in_a_loop_can_be_trained(
    tmp_path: Path, family: str, scale: float
) -> None:
    """Also guided, where the batch is doubled: the same scores as one member at a time."""
    tables = []
    for mode in ("lowrank", "materialize"):
        tiny = build(family)
        if family == "flux":  # the tiny VAE has no shift, which this pipeline asks for
            tiny.pipe.vae.register_to_config(shift_factor=0.0)
        wanted = ("height", "width", "max_sequence_length")
        call = {name: value for name, value in tiny.inputs().items() if name in wanted}
        run = trainer(
            tmp_path / mode, pipe=tiny.pipe, prompts=[Prompt("a fox"), Prompt("a car")], call=call,
            mode=mode, guidance_scale=scale, steps=1, population_size=4, images_per_call=8,
            member_batch_size=4, sigma=0.05,
        )  # fmt: skip
        run.run()
        tables.append(torch.tensor(log_lines(tmp_path / mode)[0]["fitness"]))
    assert tables[0].std() > 0.1
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-2, atol=1e-2)


# -- resume and replay ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """The hash after four generations in one go, and their log."""
    out = tmp_path_factory.mktemp("whole")
    run = trainer(out, optimizer="adam", lr=0.01)
    assert run.run()
    return hash_of(run), log_lines(out)


def start(out: Path, steps: int = 3) -> None:
    trainer(out, optimizer="adam", lr=0.01, steps=steps).run()


def damage(out: Path, how: str) -> None:
    log = out / "fitness_log.jsonl"
    if how == "checkpoints lost":
        for path in (out / "checkpoints").rglob("*.*"):
            path.unlink()
    if how == "log cut in a line":
        log.write_text(log.read_text()[:-40])
    if how == "log cut before its newline":
        log.write_text(log.read_text()[:-1])
    if how == "log lost":
        log.unlink()


@pytest.mark.parametrize(
    "how", ["stopped", "checkpoints lost", "log cut before its newline", "log lost"]
)
def test_a_run_goes_on_to_the_same_bits_whatever_was_lost(
    tmp_path: Path, whole: tuple[str, list[dict[str, Any]]], how: str
) -> None:
    start(tmp_path)
    damage(tmp_path, how)
    run = trainer(tmp_path, optimizer="adam", lr=0.01)
    assert run.resumed_from == 3
    assert run.run() and hash_of(run) == whole[0]
    if how != "log lost":
        mine = [line["fitness"] for line in log_lines(tmp_path)]
        assert mine == [line["fitness"] for line in whole[1]]


def test_a_log_that_ends_before_the_checkpoint_is_said(
    tmp_path: Path, whole: tuple[str, list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    start(tmp_path)
    damage(tmp_path, "log cut in a line")
    run = trainer(tmp_path, optimizer="adam", lr=0.01)
    assert "lacks generations 2 to 2" in caplog.text
    assert run.resumed_from == 3 and run.run() and hash_of(run) == whole[0]


def test_a_kill_before_the_first_checkpoint_loses_one_generation_at_most(
    tmp_path: Path, whole: tuple[str, list[dict[str, Any]]]
) -> None:
    start(tmp_path)
    damage(tmp_path, "checkpoints lost")
    damage(tmp_path, "log cut in a line")
    run = trainer(tmp_path, optimizer="adam", lr=0.01)
    assert run.resumed_from == 2
    assert run.run() and hash_of(run) == whole[0]
    curve = (tmp_path / "curve.jsonl").read_text().splitlines()
    assert [json.loads(line)["generation"] for line in curve] == [0, 1, 2, 3]


def test_a_late_worker_rebuilds_the_weights_from_the_log_alone(
    tmp_path: Path, whole: tuple[str, list[dict[str, Any]]]
) -> None:
    start(tmp_path, steps=4)
    config = small_config(optimizer="adam", lr=0.01)
    late = make_eggroll(tiny_pipeline().transformer, config)
    assert replay(late, tmp_path / "fitness_log.jsonl", until=2) == 2
    assert replay(late, tmp_path / "fitness_log.jsonl") == 2
    assert f"{late.weights_hash():016x}" == whole[0]


@pytest.mark.parametrize(
    "change, what",
    [
        ({"seed": 1}, "its noise is"),
        ({"population_size": 16}, "its population_size is 8, here it is 16"),
        ({"sigma": 0.03}, "had sigma=0.02, here it is 0.03"),
        ({"optimizer": "sgd"}, "before generation 1 are not those"),
    ],
)
def test_a_log_of_another_run_is_refused(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    start(tmp_path, steps=2)
    config = small_config(**{"optimizer": "adam", "lr": 0.01, **change})
    with pytest.raises(CheckpointError, match=what):
        replay(make_eggroll(tiny_pipeline().transformer, config), tmp_path / "fitness_log.jsonl")


def test_damage_in_the_middle_of_a_log_is_named(tmp_path: Path) -> None:
    start(tmp_path, steps=3)
    log, config = tmp_path / "fitness_log.jsonl", small_config(optimizer="adam", lr=0.01)
    lines = log.read_text().splitlines(keepends=True)

    def fresh() -> Eggroll:
        return make_eggroll(tiny_pipeline().transformer, config)

    log.write_text("".join([*lines[:2], lines[2][:30] + "\n", *lines[3:]]))
    with pytest.raises(CheckpointError, match=r"line 3 of .* is damaged"):
        replay(fresh(), log)
    log.write_text("".join([*lines[:2], *lines[3:]]))
    with pytest.raises(CheckpointError, match="no generation 1, only 2"):
        replay(fresh(), log)
    log.write_text("".join(lines[1:]))
    with pytest.raises(CheckpointError, match="no fitness log"):
        replay(fresh(), log)


def test_another_run_in_the_folder_is_not_touched(tmp_path: Path) -> None:
    start(tmp_path, steps=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"started with sigma=0.02, now it is 0.05.*--allow"):
        trainer(tmp_path, optimizer="adam", lr=0.01, sigma=0.05)
    with pytest.raises(CheckpointError, match="started with prompts="):
        trainer(tmp_path, optimizer="adam", lr=0.01, prompts=class_prompts(tiny_pipeline(), [7]))
    other = tiny_pipeline()
    with torch.no_grad():
        next(other.transformer.parameters()).add_(0.1)
        other.transformer.transformer_blocks[0].attn1.to_q.weight.add_(0.1)
    with pytest.raises(ValueError, match=r"began with other weights|base_hash"):
        trainer(tmp_path, optimizer="adam", lr=0.01, pipe=other)
    with pytest.raises(ValueError, match="allow_change names 'sigmas'"):
        trainer(tmp_path, optimizer="adam", lr=0.01, allow_change=("sigmas",))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run = trainer(tmp_path, optimizer="adam", lr=0.01, reward=Brightness(), steps=2,
                  guidance_scale=2.0, allow_change=("guidance_scale",))  # fmt: skip
    assert run.run()
    history = [json.loads(x) for x in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert history[-1]["changed"] == {"guidance_scale": [1.0, 2.0]}


# -- rewards that misbehave ----------------------------------------------------------------------


def test_a_member_without_a_score_takes_its_pair_with_it(tmp_path: Path) -> None:
    def run(out: Path, broken: int) -> dict[str, Any]:
        """One generation; the first images of the first batch (of members 0 and 1) fail."""
        calls = iter(range(1000))

        def reward(images: torch.Tensor) -> list[float]:
            scores = Brightness()(images).tolist()
            return [NAN] * broken + scores[broken:] if next(calls) == 0 else scores

        trainer(out, reward, steps=1).run()
        return log_lines(out)[0]

    one, both = run(tmp_path / "one", 1), run(tmp_path / "both", 2)
    # Members have two prompts. One score is missing: the pair counts with the other prompt.
    assert one["count"] == 8 and one["reward/it_failed"] == 1 and one["fitness"][0] != 0
    assert both["count"] == 6 and both["fitness"][:2] == [0, 0]


def test_a_constant_reward_changes_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path, lambda images: [1.0] * len(images), steps=2)
    before = hash_of(run)
    assert run.run() and hash_of(run) == before
    assert all(line["fitness"] == [0.0] * 8 for line in log_lines(tmp_path))


@pytest.mark.parametrize(
    "reward, what",
    [
        (lambda images: [None] * len(images), "it applies to none"),
        (lambda images: [NAN] * len(images), "NaN or infinity"),
        (lambda images: 1 / 0, "it failed on .*ZeroDivisionError"),
        (lambda images: [1.0], "must give one score an image"),
    ],
)
def test_rewards_without_any_score_stop_the_run_with_the_reason(
    tmp_path: Path, reward: Any, what: str
) -> None:
    run = trainer(tmp_path, reward)
    with pytest.raises(RewardError, match=what):
        run.run()
    assert log_lines(tmp_path) == []
    again = trainer(tmp_path, steps=1)
    assert again.run()  # nothing was lost


# -- batches and memory --------------------------------------------------------------------------


def test_out_of_memory_halves_the_members_at_once_and_changes_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"steps": 1, "member_batch_size": 8}
    roomy = trainer(tmp_path / "roomy", **options)
    roomy.run()
    tight = trainer(tmp_path / "tight", **options)
    forward, most = tight.pipe.transformer.forward, []

    def limited(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        most.append(len(hidden_states))
        if len(hidden_states) > 5:
            raise torch.OutOfMemoryError("too large")
        return forward(hidden_states, *args, **kwargs)

    monkeypatch.setattr(tight.pipe.transformer, "forward", limited)
    tight.run()
    assert 16 in most and 8 in most and 4 in most
    found, wanted = (log_lines(tmp_path / name)[0]["fitness"] for name in ("tight", "roomy"))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("common", [True, False])
def test_members_start_from_the_same_noise_or_pairs_from_their_own(
    tmp_path: Path, common: bool
) -> None:
    run = trainer(tmp_path, sigma=1e-7, common_noise=common, member_batch_size=0)
    asked = draw_questions(0, run.prompts, count=2, repeats=1, seed=0)
    first, second, third = run.sampler.sample([0, 1, 2], asked).split(2)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    assert torch.allclose(first, third, atol=1e-3) is common
    mean = run.sampler.sample(None, asked)
    assert torch.allclose(first, mean, atol=1e-3) is common


def test_the_baseline_member_centres_the_scores(tmp_path: Path) -> None:
    options = {"steps": 1, "fitness_shaping": "none", "sigma": 0.1}
    for name, baseline in (("with", True), ("without", False)):
        assert trainer(tmp_path / name, baseline=baseline, **options).run()
    found, plain = (
        torch.tensor(log_lines(tmp_path / name)[0]["fitness"]) for name in ("with", "without")
    )
    shift = (found - plain).mean()
    assert abs(float(shift)) > 1e-4  # the mean of the members is not the score of the mean
    torch.testing.assert_close(found - shift, plain, rtol=1e-3, atol=1e-4)


def test_members_may_start_from_noise_of_their_own() -> None:
    asked = draw_questions(3, [Prompt("a"), Prompt("b")], count=0, repeats=2, seed=5)
    assert [p.text for p in asked.prompts] == ["a", "a", "b", "b"] and asked.columns == 2
    assert asked.own_seeds(1) == asked.own_seeds(1) != asked.own_seeds(2)
    assert len(set(asked.seeds)) == 4
    assert asked.seeds != draw_questions(4, asked.prompts[::2], count=0, repeats=2, seed=5).seeds


def test_prompts_are_drawn_equally_often_and_evaluation_asks_the_same_each_time() -> None:
    prompts = [Prompt(str(i)) for i in range(6)]
    drawn = [p.text for g in range(9) for p in draw_questions(
        g, prompts, count=4, repeats=1, seed=0).prompts]  # fmt: skip
    assert {text: drawn.count(text) for text in drawn} == dict.fromkeys(map(str, range(6)), 6)
    fixed = fixed_questions(prompts, count=8)
    assert fixed.seeds == list(range(8)) and fixed.prompts[6] is prompts[0]


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, what",
    [
        ({"population_size": 7}, "must be even, got 7"),
        ({"member_batch_size": 3}, "member_batch_size 3 splits a pair"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"sigma": -1.0}, "sigma must be positive"),
        ({"sigma": NAN}, "sigma must be a finite number"),
        ({"noise_kind": "cauchy"}, "noise_kind must be one of gaussian, rademacher"),
        ({"fitness_shaping": "softmax"}, "fitness_shaping must be one of"),
        ({"wire": "byte", "antithetic": False}, "it needs antithetic=True"),
        ({"wire": "byte", "fitness_shaping": "ranks"}, "know fitness_shaping='zscore'"),
        ({"baseline": True, "common_noise": False}, "it needs common_noise=True"),
        ({"delta_decay": 1.0}, r"delta_decay must be in \[0, 1\)"),
        ({"rank_timeout": -1.0}, "rank_timeout must be 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        EggrollConfig(**change)


def test_settings_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Linear or Conv2d"):
        trainer(tmp_path, target_modules="to_nothing")
    with pytest.raises(ValueError, match="rank"):
        trainer(tmp_path, rank=1000)
    with pytest.raises(ValueError, match="takes no argument 'heigth'"):
        trainer(tmp_path, call={"heigth": 8})
    with pytest.raises(ValueError, match="prompts: give at least one"):
        trainer(tmp_path, prompts=[])
    assert not any(tmp_path.iterdir())


def test_layers_are_named_as_peft_names_them() -> None:
    names = EggrollConfig(target_modules="to_q,attn1.to_k", exclude="proj").layers()
    assert names == {"target_modules": ["to_q", "attn1.to_k"], "exclude": ["proj"]}
    regex = EggrollConfig(target_modules=r"blocks\.\d+\..*to_q").layers()
    assert regex == {"target_modules": r"blocks\.\d+\..*to_q", "exclude": ()}
    assert EggrollConfig().layers() == {"target_modules": None, "exclude": ()}


def test_a_run_from_before_a_setting_existed_had_its_default() -> None:
    saved = {**vars(EggrollConfig())}
    del saved["offload"]
    assert EggrollConfig().changes(saved) == {}
    assert EggrollConfig(offload=True).changes(saved) == {"offload": (False, True)}
