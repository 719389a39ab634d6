"""Two processes come to the weights of one, and either goes on from the other's checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffsteer.training.acflow.run_files import read_log

RANKS = Path(__file__).parents[2] / "support" / "acflow_ranks.py"
SETTINGS = {
    "full": {"tune": "full"},
    "lora": {"tune": "lora", "accumulate": 2, "critic_memory": 3, "critic_steps": 2},
}
COMMON = {
    "updates_per_epoch": 2, "epochs": 3, "eval_images": 6, "eval_steps": 2, "weight_decay": 0.0,
    "checkpoint_every": 1,
}  # fmt: skip
SAME = (
    "reward/bright", "critic_loss", "flow_loss", "effective_share", "weight_max", "gradient_norm",
    "evaluations",
)  # fmt: skip


@pytest.mark.slow
def test_two_ranks_make_the_updates_of_one(start, tmp_path):
    """Both kinds of training in one launch: most of its time are the imports."""
    single, pairs = {}, []
    for name, changes in SETTINGS.items():
        single[name] = start(name, **COMMON, **changes)
        single[name].run()
        pairs += [str(tmp_path / f"two-{name}"), (tmp_path / name / "config.json").read_text()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(RANKS), "2", *pairs],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, one in single.items():
        compare(one, start(f"two-{name}", **COMMON, **SETTINGS[name]))


def compare(one, two):
    """``two`` is one rank that takes over from two."""
    ours, theirs = read_log(one.out), read_log(two.out)
    assert [line["epoch"] for line in theirs] == [0, 1, 2, 3]
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert a.keys() == b.keys()
        for name in set(SAME) & set(a):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name
    assert "flow_loss" in ours[-1]
    assert ours[-1]["evaluation"] == pytest.approx(theirs[-1]["evaluation"], rel=1e-3)
    assert two.progress.epoch == 3
    mine = one.learner.policy.state_dict()
    for name, value in two.learner.policy.state_dict().items():
        # Adam turns a rounding difference of a tiny gradient into a step: 3e-3 of a few weights.
        assert (value - mine[name]).abs().mean() < 1e-4, name
    assert any(not torch.equal(v, torch.zeros_like(v)) for v in mine.values())
