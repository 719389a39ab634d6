"""What the loop promises beside its numbers: passes, overlap, evaluation, trackers, launches."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from tiny_flow import tiny_dit, tiny_pipeline

from diffsteer.eval import EvalSuite
from diffsteer.training.acflow.accelerators import check_distribution, check_same_weights
from diffsteer.training.acflow.policy import weights_digest
from diffsteer.training.acflow.run_files import read_log
from diffsteer.training.rewards import Brightness, RewardPool, RewardSet


def test_passes_of_an_update_make_the_step_of_one(start):
    """Weights are normalised over the whole update, however many passes it takes."""
    settings = {"epochs": 3, "tau": 3.0, "images_per_prompt": 8, "weight_decay": 0.0}
    one, four = (start(f"{n}", accumulate=n, **settings) for n in (1, 4))
    one.run()
    four.run()
    mine, theirs = (run.learner.policy.state_dict() for run in (one, four))
    for name, value in mine.items():
        assert (value - theirs[name]).abs().mean() < 1e-4, name
    for name in ("flow_loss", "effective_share", "weight_max", "gradient_norm"):
        found = [read_log(run.out)[-1][name] for run in (one, four)]
        assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_batch_is_scored_while_the_next_one_is_sampled(start):
    """The reward of the first batch answers only once the second one has begun."""
    second = threading.Event()

    def waits(images):
        assert second.wait(30), "nothing was sampled in the meantime"
        return Brightness()(images)

    run = start(rewards={"bright": waits}, sample_batch=4)
    calls = []

    class Counting(type(run.sampler)):
        def __call__(self, *args, **options):
            calls.append(1)
            if len(calls) == 2:
                second.set()
            return super().__call__(*args, **options)

    run.sampler.__class__ = Counting
    with RewardPool(run.rewards) as pool:
        found = run._collect(run.plan(0), pool)
    assert len(calls) == 2 == len(found.sampled) == len(found.scored)
    assert found.scores.failures == {"bright": 0}
    assert min(end for _, end in found.scored) > found.sampled[1][0]


def test_evaluation_knows_held_out_rewards_and_metrics_of_images(start):
    pipe = tiny_pipeline("denoised", tiny_dit(sample_size=16))  # what the classifier needs
    held_out = RewardSet({"dark": lambda images: -images.mean((1, 2, 3))})
    watched = {"suite": EvalSuite(["diversity"]), "held_out": held_out}
    run = start(pipe=pipe, epochs=4, eval_images=8, eval_every=2, **watched)
    run.run()
    judged = {
        line["epoch"]: line["evaluation"] for line in read_log(run.out) if "evaluation" in line
    }
    assert list(judged) == [0, 2, 4]
    for scores in judged.values():
        names = {"reward/bright", "reward/bright_se", "held_out/dark", "pixel_diversity"}
        assert names | {"diversity"} <= set(scores)
        assert scores["held_out/dark"] < 0 < scores["diversity"]
    names = sorted(path.name for path in (run.out / "samples").iterdir())
    assert names == ["after", "before", "epoch-00002"]


def test_a_tracker_gets_the_numbers_of_every_epoch(start):
    run, sent = start(epochs=2, eval_images=4), {}
    object.__setattr__(run.config, "log_with", "mine")
    run.accelerator.log = lambda values, step: sent.setdefault(step, values)
    run.run()
    assert list(sent) == [0, 1, 2]
    assert {"reward/bright", "critic_loss", "eval/reward/bright"} <= set(sent[2])
    assert all(isinstance(value, int | float) for value in sent[2].values())


def launched(kind, **state):
    return SimpleNamespace(distributed_type=kind, state=SimpleNamespace(**state))


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"fsdp_version": 1}, "fsdp_version: 2"),
        ({"cpu_offload": True}, "fsdp_offload_params: false"),
        ({"activation_checkpointing": True}, "gradient_checkpointing here"),
    ],
)
def test_fsdp_that_samples_cannot_follow_is_refused(change, remedy):
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **change})
    with pytest.raises(NotImplementedError, match=remedy):
        check_distribution(launched("FSDP", fsdp_plugin=plugin))
    check_distribution(launched("FSDP", fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)))


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_stage: 1 or 2 .*--fsdp_version 2"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer_device",
        ),
        ({"bf16": {"enabled": True}}, "no bf16 or fp16"),
    ],
)
def test_deepspeed_that_samples_cannot_follow_is_refused(change, remedy):
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}
    plain = SimpleNamespace(deepspeed_config=config)
    check_distribution(launched("DEEPSPEED", deepspeed_plugin=plain))
    wrong = SimpleNamespace(deepspeed_config={**config, **change})
    with pytest.raises(NotImplementedError, match=remedy):
        check_distribution(launched("DEEPSPEED", deepspeed_plugin=wrong))


def test_other_ways_of_cutting_are_refused(start):
    with pytest.raises(NotImplementedError, match=r"MEGATRON_LM.*--use_fsdp"):
        check_distribution(launched("MEGATRON_LM"))
    tensor = launched("MULTI_GPU")
    tensor.parallelism_config = SimpleNamespace(non_data_parallel_size=2)
    with pytest.raises(NotImplementedError, match="data parallelism alone"):
        check_distribution(tensor)
    check_distribution(start().accelerator)


def test_ranks_that_hold_different_weights_are_refused(monkeypatch):
    pipe, ranks = tiny_pipeline("denoised"), SimpleNamespace(num_processes=2)
    other = tiny_pipeline("denoised")
    gathered = [lambda mine: mine * 2, lambda mine: [*mine, weights_digest(other.transformer)]]
    monkeypatch.setattr("accelerate.utils.gather_object", gathered[1])
    check_same_weights(ranks, pipe)
    with torch.no_grad():
        pipe.transformer.proj_out_2.bias += 1
    with pytest.raises(ValueError, match="different weights of the pipeline's transformer"):
        check_same_weights(ranks, pipe)
    monkeypatch.setattr("accelerate.utils.gather_object", gathered[0])
    check_same_weights(ranks, pipe)


def test_half_precision_stays_near_full(start):
    """The same first epoch in either arithmetic, up to the rounding of bfloat16."""
    one, other = (start(p, precision=p, epochs=1, critic=False) for p in ("fp32", "bf16"))
    one.run()
    other.run()
    a, b = (read_log(run.out)[-1] for run in (one, other))
    assert a["flow_loss"] == pytest.approx(b["flow_loss"], rel=0.03)
    assert a["flow_loss"] != b["flow_loss"]
    assert all(p.dtype == torch.float32 for p in other.learner.policy.parameters)
