"""Two processes come to the weights of one, and either goes on from the other's checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffsteer.training.acflow.run_files import read_log

RANKS = """
import json, sys, torch
from tiny_flow import tiny_pipeline
from diffsteer.training.acflow import ACFlowConfig, ACFlowTrainer
from diffsteer.training.prompts import class_prompts
from diffsteer.training.rewards import Brightness, RewardSet
pipe = tiny_pipeline("denoised")
config = ACFlowConfig(**json.loads(sys.argv[2]))
rewards = RewardSet({"bright": Brightness()})
run = ACFlowTrainer(config, pipe, class_prompts(pipe, range(4)), rewards, sys.argv[1])
assert run.accelerator.num_processes == 2
run.run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_two_ranks_make_the_update_of_one(start, tmp_path, tune):
    settings = {
        "tune": tune, "updates_per_epoch": 2, "epochs": 3, "eval_images": 6, "eval_steps": 2,
        "weight_decay": 0.0, "checkpoint_every": 1,
    }  # fmt: skip
    one = start("one", **settings)
    one.run()
    config = json.dumps(json.loads((tmp_path / "one" / "config.json").read_text()))
    (tmp_path / "ranks.py").write_text(RANKS)
    support = str(Path(__file__).parents[2] / "support")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "ranks.py"), str(tmp_path / "two"), config],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": support},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert [line["epoch"] for line in theirs] == [0, 1, 2, 3]
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        for name in ("reward/bright", "critic_loss", "flow_loss", "effective_share", "evaluations"):
            assert a.get(name) == pytest.approx(b.get(name), rel=1e-3), name
    assert ours[-1]["evaluation"] == pytest.approx(theirs[-1]["evaluation"], rel=1e-3)
    back = start("two", **settings)  # and one rank takes over from two
    assert back.progress.epoch == 3
    mine = one.learner.policy.state_dict()
    for name, value in back.learner.policy.state_dict().items():
        # Adam turns a rounding difference of a tiny gradient into a step: 3e-3 of a few weights.
        assert (value - mine[name]).abs().mean() < 1e-4, name
    assert any(not torch.equal(v, torch.zeros_like(v)) for v in mine.values())
