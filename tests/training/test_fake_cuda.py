"""Training on a device that refuses what CUDA would: no update waits."""

from __future__ import annotations

import copy
import math
from concurrent.futures import Future
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from acflow_ranks import SMALL
from fake_cuda import CUDA, FakeCuda
from tiny_flow import tiny_dit, tiny_pipeline

from diffsteer.training import Trainer
from diffsteer.training.acflow import ACFlowConfig, ACFlowTrainer, GRPOConfig, GRPOTrainer
from diffsteer.training.eggroll import Eggroll
from diffsteer.training.prompts import class_prompts
from diffsteer.training.rewards import Brightness, RewardSet, pool

OBJECTIVES = {
    "flow": {},
    "flow, image": {"prediction": "denoised"},
    "flow, student": {"augment_dim": "2"},
    "kdiff, learned": {"objective": "kdiff", "k": "learned"},
    "kdiff, fixed": {"objective": "kdiff", "k": 0.3},
    "pfgmpp": {"objective": "pfgmpp", "augment_dim": "64"},
    "stable": {"stable_targets": True},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_updates_never_wait(tmp_path, images, config, name) -> None:
    """Float64 is the factor of the Student-t noise, one number a sample, and stable targets."""
    config = replace(config, **OBJECTIVES[name], accumulate=2)
    with FakeCuda(doubles=True) as gpu, patch.object(Accelerator, "device", CUDA):
        with gpu.allow():
            run = Trainer(config, images, tmp_path / "run")
        for _ in range(3):
            norm = run.update()
        assert norm.is_cuda and next(run.model.parameters()).is_cuda
        with gpu.allow():
            assert math.isfinite(float(norm)) and math.isfinite(float(run.loss_sum))
            run.checkpoint()
            again = Trainer(config, images, tmp_path / "run")
            assert again.step == 3
        again.update()


class AtOnce:
    """In the place of threads, which do not know of the device that is none."""

    def __init__(self, *_: object, **__: object) -> None:
        """Nothing to start."""

    def submit(self, function, *args):
        done = Future()
        done.set_result(function(*args))
        return done

    def shutdown(self, **_: object) -> None:
        """Nothing to wait for."""


REWARDED = [
    (ACFlowTrainer, ACFlowConfig, {"tune": "full", "ema": 0.9}),
    (
        ACFlowTrainer,
        ACFlowConfig,
        {"tune": "lora", "alpha": 0.5, "train_cfg": "both", "guidance_scale": 2.0},
    ),
    (GRPOTrainer, GRPOConfig, {}),
]


@pytest.mark.parametrize("trainer, config, settings", REWARDED)
def test_updates_by_reward_never_wait(tmp_path, monkeypatch, trainer, config, settings) -> None:
    monkeypatch.setattr(pool, "ThreadPoolExecutor", AtOnce)
    with FakeCuda(doubles=True) as gpu, patch.object(Accelerator, "device", CUDA):
        with gpu.allow():
            pipe = tiny_pipeline("denoised")
            rewards = RewardSet({"bright": Brightness()})
            config = config(**{**SMALL, **settings})
            run = trainer(config, pipe, class_prompts(pipe, range(4)), rewards, tmp_path / "run")
        learn = run.learner.learn

        def strictly(*args, **kwargs):
            gpu.waits = False
            learn(*args, **kwargs)
            gpu.waits = True

        monkeypatch.setattr(run.learner, "learn", strictly)
        before = next(iter(run.learner.policy.state_dict().values())).clone()
        with gpu.allow(), pool.RewardPool(rewards) as scoring:
            for _ in range(2):  # sampling and scoring read and copy; the first epoch warms up
                line = run.run_epoch(scoring)
            assert all(math.isfinite(v) for v in line.values() if isinstance(v, float))
            after = next(iter(run.learner.policy.state_dict().values()))
            assert not torch.equal(before, after)


EVOLUTIONS = [
    {"offload": True},
    {"optimizer": "adam", "max_step_norm": 0.1, "max_delta_norm": 0.2},
    {"noise_kind": "rademacher", "rank": 2, "evolve_bias": True},
]


@pytest.mark.parametrize("settings", EVOLUTIONS)
def test_evolution_waits_at_the_end_of_a_step_alone(settings) -> None:
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 5.0]), torch.tensor([1, 2])
    here, there = (tiny_dit(num_layers=1).eval() for _ in range(2))
    there.load_state_dict(here.state_dict())

    def scores(model, x, t, labels):
        out = model(x.repeat(4, 1, 1, 1), t.repeat(4), class_labels=labels.repeat(4))[0]
        return out.view(4, -1).mean(1)

    def generation(es, *inputs):
        with es.perturbed(range(4), rows_per_member=2):
            return scores(es.model, *inputs)

    common = {"sigma": 0.1, "population_size": 4, **settings}
    cpu = Eggroll(copy.deepcopy(here), **common)
    expected = [generation(cpu, *inputs)]
    cpu.tell(torch.tensor([1.0, 2.0, -1.0, 0.5]))
    expected.append(generation(cpu, *inputs))
    with FakeCuda() as gpu:
        with gpu.allow():  # what is offloaded is copied
            es = Eggroll(gpu.put(there), **common)
        inputs = tuple(map(gpu.put, inputs))
        with gpu.allow():  # rows are held against two members alone, once a run
            torch.testing.assert_close(gpu.fetch(generation(es, *inputs)), expected[0])
        with gpu.allow(doubles=True):
            gpu.events.clear()
            es.tell(torch.tensor([1.0, 2.0, -1.0, 0.5]))
            reads = [event for event in gpu.events if "float64" not in event.what]
        torch.testing.assert_close(gpu.fetch(generation(es, *inputs)), expected[1])
        if not settings.get("offload"):  # reads of norms, in a row after the last layer
            assert len(reads) <= len(es.layers) + 2, reads
        with gpu.allow():
            assert es.weights_hash() == cpu.weights_hash()
