"""The loop: exact resuming, the warm-up, special cases, what is refused and what survives."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_flow import tiny_pipeline
from tiny_pipelines import build

from diffsteer.training import CheckpointError
from diffsteer.training.acflow.run_files import read_log
from diffsteer.training.checkpoint import list_checkpoints
from diffsteer.training.prompts import class_prompts
from diffsteer.training.rewards import Brightness, RewardError, RewardPool


def flat(state, prefix=""):
    """Every tensor and number of a nested state, by path."""
    if isinstance(state, dict):
        pairs = state.items()
    elif isinstance(state, list | tuple):
        pairs = enumerate(state)
    else:
        value = state if isinstance(state, torch.Tensor) else torch.tensor(math.nan)
        return {prefix: value.clone() if isinstance(state, torch.Tensor) else state}
    return {k: v for name, item in pairs for k, v in flat(item, f"{prefix}.{name}").items()}


def everything(run):
    return flat(
        {
            "learner": run.learner.state_dict(),
            "moments": run.shaper.state_dict(),
            "progress": run.progress.state_dict(),
            "copy": run.weights.copy,
        }
    )


def assert_same(one, other):
    assert one.keys() == other.keys()
    odd = [
        name
        for name, value in one.items()
        if not (
            torch.equal(value, other[name])
            if isinstance(value, torch.Tensor)
            else value == other[name]
        )
    ]
    assert not odd, odd


def rewards_of(run):
    return [(line["epoch"], line["reward/bright"]) for line in read_log(run.out)]


class Killed(BaseException):
    """Stands for a kill: nothing of ours handles it."""


VARIANTS = {
    "full": {"tune": "full"},
    "lora": {"tune": "lora", "reward_shaping": "running", "updates_per_epoch": 2},
    "copies": {
        "sampler": "ema", "sync_every": 3, "accumulate": 2, "critic_steps": 2, "critic_memory": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_p10_a_killed_run_goes_on_bit_for_bit(start, variant, monkeypatch):
    settings = VARIANTS[variant]
    whole = start("whole", **settings)
    assert whole.run()
    first = start("cut", **settings)
    update = first.learner.update

    def update_or_die(*args, **options):
        if first.progress.epoch == 3:
            raise Killed
        return update(*args, **options)

    monkeypatch.setattr(first.learner, "update", update_or_die)
    with pytest.raises(Killed):
        first.run()
    torch.manual_seed(99)  # whatever the new process draws must not matter
    second = start("cut", **settings)
    assert second.progress.epoch == 2
    assert second.run()
    assert_same(everything(whole), everything(second))
    assert rewards_of(whole) == rewards_of(second)


def test_p8_the_warm_up_leaves_the_actor_as_it_is(start):
    run = start(epochs=3, warmup_min=2, warmup_max=2, ema=0.9)
    before = flat({"policy": run.learner.policy.state_dict(), "ema": run.learner.average()})
    critic = flat(run.learner.critic.network.state_dict())
    with RewardPool(run.rewards) as pool:
        for _ in range(2):
            assert run.run_epoch(pool)["rate"] == 0
        now = {"policy": run.learner.policy.state_dict(), "ema": run.learner.average()}
        assert_same(before, flat(now))
        assert any(
            not torch.equal(v, critic[k])
            for k, v in flat(run.learner.critic.network.state_dict()).items()
        )
        assert run.run_epoch(pool)["rate"] == 1
    after = flat({"policy": run.learner.policy.state_dict()})
    assert any(not torch.equal(value, before[name]) for name, value in after.items())


def test_p1_the_first_update_under_a_fresh_critic_is_that_of_orw(start):
    settings = {"warmup_min": 0, "warmup_max": 0, "epochs": 1}
    with_critic, without = start("a", **settings), start("b", **settings, critic=False)
    base = flat(with_critic.learner.policy.state_dict())
    with_critic.run()
    without.run()
    one, other = (flat(run.learner.policy.state_dict()) for run in (with_critic, without))
    assert_same(one, other)
    assert any(not torch.equal(value, base[name]) for name, value in one.items())


def test_p4_at_the_reference_its_term_has_no_gradient(start):
    same = {"same": lambda images: [1.0] * len(images)}
    run = start(rewards=same, critic=False, weight_decay=0.0, alpha=50.0, epochs=2)
    before = flat({"policy": run.learner.policy.state_dict()})
    run.run()
    assert_same(before, flat({"policy": run.learner.policy.state_dict()}))


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_reference_stays_the_base_model(start, tune):
    base = tiny_pipeline("denoised")
    run = start(tune=tune, warmup_min=0, warmup_max=0, epochs=2, learning_rate=1e-2)
    run.run()
    x = torch.randn(3, 3, 8, 8)
    given = {"timestep": torch.full((3,), 500.0), "class_labels": torch.tensor([1, 2, 3])}
    wanted = [p.requires_grad for p in run.learner.policy.module.parameters()]
    with run.learner.policy.reference() as network:
        found = network(x, **given).sample
    with torch.no_grad():
        assert torch.equal(found, base.transformer(x, **given).sample)
        moved = run.learner.policy.module(x, **given).sample
    assert not torch.equal(found, moved)
    assert [p.requires_grad for p in run.learner.policy.module.parameters()] == wanted


def test_lora_holds_no_second_copy(start):
    run = start(tune="lora")
    assert run.learner.policy.modules == [run.pipe.transformer]
    trained = run.learner.policy.parameters
    assert sum(p.numel() for p in trained) < sum(
        p.numel() for p in run.pipe.transformer.parameters()
    )


def test_the_critic_is_small(start):
    size = sum(p.numel() for p in start(critic_width=64).learner.critic.parameters)
    assert size < 5e6


def test_training_raises_the_reward_of_the_same_seeds(start):
    run = start(
        epochs=15, critic=False, alpha=0.05, learning_rate=5e-3, images_per_prompt=8,
        eval_images=16, eval_steps=3, ema=0.0,
    )  # fmt: skip
    run.run()
    judged = [line["evaluation"] for line in read_log(run.out) if "evaluation" in line]
    first, last = judged[0], judged[-1]
    gain = last["reward/bright"] - first["reward/bright"]
    assert gain > 3 * first["reward/bright_se"]


# -- rewards that misbehave ------------------------------------------------------------------------


def test_a_constant_reward_moves_nothing(start):
    run = start(
        rewards={"same": lambda images: [1.0] * len(images)}, tune="lora", critic=False, epochs=2
    )
    run.run()
    line = read_log(run.out)[-1]
    assert line["weighed_share"] == 0 and line["drift"] == 0


def test_missing_scores_are_left_out_and_counted(start):
    def some(images):
        return [None if i == 0 else float(x.mean()) for i, x in enumerate(images)]

    def broken(images):
        return [math.nan if i == 1 else float(x.mean()) for i, x in enumerate(images)]

    run = start(rewards={"some": some, "broken": broken}, epochs=2)
    assert run.run()
    assert [line["reward/broken_failed"] for line in read_log(run.out)] == [2.0, 2.0]


def nothing(images):
    return [None] * len(images)


def no_numbers(images):
    return [math.nan] * len(images)


def raising(images):
    raise RuntimeError("no server")


def short(images):
    return [0.0] * (len(images) - 1)


@pytest.mark.parametrize(
    "reward, text",
    [
        (nothing, "applies to none"),
        (no_numbers, "NaN or infinity"),
        (raising, "no server"),
        (short, "one score an image"),
    ],
)
def test_rewards_of_no_use_stop_the_run_and_lose_nothing(start, reward, text, caplog):
    calls = []

    def turning(images):
        calls.append(1)
        return Brightness()(images, [], []) if len(calls) <= 4 else reward(images)

    run = start(rewards={"r": turning}, epochs=4)
    with pytest.raises(RewardError, match=text):
        run.run()
    assert [path.name for path in list_checkpoints(run.out / "checkpoints")] == ["step-00000002"]
    again = start(rewards={"r": lambda images: [0.5] * len(images)}, epochs=4)
    assert again.progress.epoch == 2


def test_exploding_weights_stop_the_run_and_lose_nothing(start):
    scale = [1.0]

    def reward(images):
        return (images.mean((1, 2, 3)) * scale[0]).tolist()

    settings = {
        "rewards": {"r": reward}, "reward_shaping": "none", "normalise": "none", "critic": False,
        "advantage_clip": math.inf, "checkpoint_every": 1,
    }  # fmt: skip
    run = start(**settings, epochs=3)
    with RewardPool(run.rewards) as pool:
        run.run_epoch(pool)
        run.checkpoint()
    scale[0] = 1e4
    with pytest.raises(FloatingPointError, match="the last checkpoint is untouched"):
        run.run()
    back = start(**settings, epochs=3)
    assert back.progress.epoch == 1
    assert all(bool(v.isfinite().all()) for v in back.learner.policy.state_dict().values())


# -- what is refused -------------------------------------------------------------------------------


def test_epochs_that_do_not_split_are_refused(start):
    with pytest.raises(ValueError, match="must be a multiple of 3"):
        start(updates_per_epoch=3)


def test_a_pipeline_that_is_not_of_flow_matching_is_refused(start):
    pipe = build("dit").pipe
    with pytest.raises(ValueError, match="DDIMScheduler, which is no flow-matching scheduler"):
        start(pipe=pipe, prompts=class_prompts(tiny_pipeline()))


def test_lora_targets_that_match_nothing_name_what_there_is(start):
    with pytest.raises(ValueError, match=r"match no linear layer .* end in .*to_q"):
        start(tune="lora", lora_targets="nowhere")


def test_an_unknown_argument_of_the_pipeline_is_refused(start):
    with pytest.raises(ValueError, match="takes no argument 'heigth'"):
        start(call={"heigth": 8})


def test_a_run_goes_on_as_it_was_started_only(start):
    start(epochs=2).run()
    with pytest.raises(CheckpointError, match=r"started with alpha=1.0, now it is 2.0"):
        start(epochs=2, alpha=2.0)
    other = tiny_pipeline("denoised")
    with torch.no_grad():
        other.transformer.proj_out_2.weight.add_(1)
    with pytest.raises(CheckpointError, match="started with base="):
        start(epochs=2, pipe=other)
    with pytest.raises(CheckpointError, match="started with prompts="):
        start(epochs=2, prompts=class_prompts(tiny_pipeline(), [0, 1]))
    with pytest.raises(CheckpointError, match="started with rewards="):
        start(epochs=2, rewards={"other": Brightness()})
    with pytest.raises(ValueError, match="allow_change names 'x'"):
        start(epochs=2, allow_change=["x"])
    more = start(epochs=3, allow_change=["epochs"])
    assert more.progress.epoch == 2 and more.run()
    assert [line["epoch"] for line in read_log(more.out)] == [1, 2, 3]


def test_a_damaged_checkpoint_is_named(start):
    start(epochs=2).run()
    run = start(epochs=2)
    (path,) = list_checkpoints(run.out / "checkpoints")
    (path / "state.pt").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="is damaged"):
        start(epochs=2)


def test_a_budget_of_drift_ends_the_run(start):
    run = start(epochs=9, critic=False, w2_budget=1e-9, learning_rate=1e-2)
    assert run.run()
    assert run.progress.stopped and run.progress.epoch == 2
    assert start(epochs=9, critic=False, w2_budget=1e-9, learning_rate=1e-2).run()
