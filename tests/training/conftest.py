"""A data set of a few images and a training run of a few thousand weights."""

from __future__ import annotations

import pytest
import torch

from diffsteer.training import LabelledImages, TrainConfig


class Killed(BaseException):
    """Stands for a kill: nothing of ours handles it."""


@pytest.fixture
def killed_at(monkeypatch):
    """``killed_at(trainer, step)`` runs a trainer to the update at which it dies."""

    def run(trainer, step):
        update = trainer.update

        def update_or_die():
            if trainer.step == step:
                raise Killed
            return update()

        monkeypatch.setattr(trainer, "update", update_or_die)
        with pytest.raises(Killed):
            trainer.run()

    return run


@pytest.fixture
def images() -> LabelledImages:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (24, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return LabelledImages(pixels, torch.arange(24) % 3, ("ant", "bee", "cat"))


@pytest.fixture
def config() -> TrainConfig:
    sizes = {"resolution": 8, "patch_size": 4, "layers": 2, "heads": 2, "head_dim": 8}
    pace = {"batch_size": 8, "steps": 8, "warmup": 2, "learning_rate": 1e-2, "precision": "fp32"}
    return TrainConfig(**sizes, **pace, checkpoint_every=3, log_every=2, preview_every=0)
