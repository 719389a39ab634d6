"""Runs of a second: a tiny class-conditional pipeline, a reward that is quick."""

from __future__ import annotations

from typing import Any

import pytest
from acflow_ranks import SMALL
from tiny_flow import tiny_pipeline

from diffsteer.training.acflow import ACFlowConfig, ACFlowTrainer
from diffsteer.training.prompts import class_prompts
from diffsteer.training.rewards import Brightness, RewardSet


@pytest.fixture
def start(tmp_path):
    """``start(out="run", **settings)``: a trainer on a fresh tiny pipeline."""

    def make(out: str = "run", *, pipe: Any = None, rewards: Any = None, **settings: Any):
        named = (
            "held_out",
            "suite",
            "allow_change",
            "call",
            "prompts",
            "inputs",
            "trainer",
            "config",
        )
        options = {name: settings.pop(name) for name in named if name in settings}
        pipe = pipe or tiny_pipeline("denoised")
        prompts = options.pop("prompts", None) or class_prompts(pipe, range(4))
        rewards = rewards or {"bright": Brightness()}
        config = options.pop("config", ACFlowConfig)(**{**SMALL, **settings})
        trainer = options.pop("trainer", ACFlowTrainer)
        rewards = rewards if isinstance(rewards, RewardSet) else RewardSet(rewards)
        return trainer(config, pipe, prompts, rewards, tmp_path / out, **options)

    return make
