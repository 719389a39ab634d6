"""Two processes come to the weights of one, whole or cut over them, and any goes on from any.

accelerate takes FSDP and DeepSpeed on no CPU, so the launched program lies to it there (see
`acflow_ranks.accelerator_of`); what follows, `prepare` with accelerate's plugins, is what a launch
on GPUs runs.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from acflow_ranks import Job
from packaging.version import Version
from safetensors.torch import load_file
from tiny_flow import tiny_pipeline

from diffsteer.training.acflow.lora import lora_state
from diffsteer.training.acflow.run_files import read_log
from diffsteer.training.checkpoint import list_checkpoints, load_checkpoint

RANKS = Path(__file__).parents[2] / "support" / "acflow_ranks.py"
COMMON = {
    "updates_per_epoch": 2, "epochs": 3, "eval_images": 9, "eval_steps": 2, "weight_decay": 0.0,
    "checkpoint_every": 1,
}  # fmt: skip
JOBS = {
    "full": Job("", {"tune": "full", "accumulate": 2}),
    "lora": Job("", {"tune": "lora", "accumulate": 2, "sampler": "ema", "sync_every": 2}),
    "grpo": Job("", {"critic": False, "sample_steps": 4, "ratio_clip": 1e-3}, grpo=True),
    "sd3": Job(
        "", {"tune": "lora", "guidance_scale": 2.0, "train_cfg": "both", "precision": "bf16"},
        sd3=True,
    ),
}  # fmt: skip
SAME = (
    "reward/bright", "critic_loss", "flow_loss", "effective_share", "weight_max", "gradient_norm",
    "evaluations",
)  # fmt: skip
# A DiT calls a part of its first block from outside of it, so smaller parts are gathered.
BLOCKS = {"FSDP_TRANSFORMER_CLS_TO_WRAP": "Attention,FeedForward"}

MISSING = {}  # launches that cannot be made here: why
if Version(torch.__version__) < Version("2.13"):
    MISSING["fsdp"] = "FSDP 2 of this PyTorch may not run on a CPU: 2.6 does not, 2.13 does"
if importlib.util.find_spec("deepspeed") is None:
    MISSING["zero"] = "needs deepspeed"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, in one process and, from one launch, in two."""
    folder = tmp_path_factory.mktemp("ranks")

    def job(launch: str, name: str, out: str = "", **changes) -> Job:
        base, out = JOBS[name], str(folder / (out or f"{launch}-{name}"))
        config = {**COMMON, **base.config, **changes.pop("config", {})}
        return replace(base, out=out, config=config, launch=launch, **changes)

    single = {f"one-{name}": job("ddp", name, out=f"one-{name}") for name in JOBS}
    for each in single.values():
        each.trainer().run()
    shutil.copytree(folder / "one-lora", folder / "fsdp-taken-over")
    shutil.rmtree(list_checkpoints(folder / "fsdp-taken-over" / "checkpoints")[-1])
    cut = {"environment": BLOCKS}
    jobs = [
        job("ddp", "full"),
        job("ddp", "lora"),
        job("fsdp", "full", **cut, config={"gradient_checkpointing": True}),
        job("fsdp", "lora", **cut, again=str(folder / "fsdp-again")),
        job("fsdp", "lora", "fsdp-taken-over", **cut),
        job("fsdp", "full", "fsdp-warm", **cut, config={"epochs": 1}),
        job("fsdp", "grpo", **cut),
        job("fsdp", "sd3"),
        job("zero", "full", again=str(folder / "zero-again")),
        job("zero", "lora"),
    ]
    jobs = [each for each in jobs if each.launch not in MISSING]
    done = subprocess.run(
        [sys.executable, str(RANKS), "2", *(each.json() for each in jobs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return Runs(single | {Path(each.out).name: each for each in jobs})


class Runs(dict):
    """Jobs by the name of their folder."""

    def __missing__(self, name: str) -> Job:
        pytest.skip(MISSING[name.partition("-")[0]])


def newest(job: Job) -> dict:
    return load_checkpoint(list_checkpoints(Path(job.out) / "checkpoints")[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "one"),
    [
        ("ddp-full", "one-full"), ("ddp-lora", "one-lora"),
        ("fsdp-full", "one-full"), ("fsdp-lora", "one-lora"), ("fsdp-taken-over", "one-lora"),
        ("fsdp-grpo", "one-grpo"),
        ("zero-full", "one-full"), ("zero-lora", "one-lora"),
    ],
)  # fmt: skip
def test_two_ranks_make_the_updates_of_one(runs, name, one):
    """Whether the weights are whole or cut, and where two take over from one."""
    ours, theirs = (read_log(Path(runs[n].out)) for n in (one, name))
    assert [line["epoch"] for line in theirs] == [0, 1, 2, 3]
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert a.keys() == b.keys()
        for key in set(SAME) & set(a):
            assert a[key] == pytest.approx(b[key], rel=1e-3), key
    assert "gradient_norm" in ours[-1]
    assert ours[-1]["evaluation"] == pytest.approx(theirs[-1]["evaluation"], rel=1e-3)
    mine, others = (newest(runs[n])["learner"] for n in (one, name))
    for part in ("policy", "ema"):
        for key, value in others[part].items():
            # Adam turns a rounding difference of a tiny gradient into a step: 3e-3 of a few, and of
            # all biases of keys, which move no softmax.
            if not key.endswith("to_k.bias"):
                assert (value - mine[part][key]).abs().mean() < 1e-4, key
    assert any(value.any() for value in mine["policy"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp-full", "fsdp-full", "fsdp-lora", "zero-full"])
def test_one_rank_takes_over_from_two(runs, name):
    job = runs[name]
    run = job.trainer()
    assert run.progress.epoch == 3
    saved = newest(job)["learner"]
    torch.testing.assert_close(run.learner.policy.state_dict(), saved["policy"], rtol=0, atol=0)
    moments = run.learner.optimizer.state_dict()["state"]
    torch.testing.assert_close(moments, saved["optimizer"]["state"], rtol=0, atol=0)


@pytest.mark.slow
def test_the_warm_up_leaves_cut_weights_alone(runs):
    before = tiny_pipeline("denoised").transformer.state_dict()
    after = newest(runs["fsdp-warm"])["learner"]["policy"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.slow
def test_the_lora_of_cut_weights_loads(runs):
    """A frozen base in bfloat16, guided samples: what is saved is the average of the checkpoint."""
    job, folder = runs["fsdp-sd3"], Path(runs["fsdp-sd3"].out) / "lora"
    run, fresh = job.trainer(), job.pipe()
    with run.learner.policy.holding(run.learner.average()):
        mine = lora_state(run.learner.policy.module)
    saved = load_file(folder / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(saved, {f"transformer.{n}": v for n, v in mine.items()})
    fresh.load_lora_weights(folder)
    loaded = dict(fresh.transformer.named_parameters())
    assert sum(".lora_B." in name and bool(value.any()) for name, value in loaded.items()) > 2
    ours, theirs = (read_log(Path(runs[n].out))[-1] for n in ("one-sd3", "fsdp-sd3"))
    assert ours["reward/bright"] == pytest.approx(theirs["reward/bright"], rel=0.05)
    assert ours["drift"] > 0 < theirs["drift"]
