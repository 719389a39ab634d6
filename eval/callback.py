"""Scores during training: generate from the current weights every so many steps, and compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .report import EvalResult
from .suite import EvalSuite


class Generated(NamedTuple):
    """What a training loop made for an evaluation: images, and what they were asked to show.

    Args:
        images: shape (B, 3, H, W), uint8, or floats in [0, 1].
        labels: shape (B,), integer, or None.
        prompts: one an image, or None.
    """

    images: Tensor
    labels: Tensor | None = None
    prompts: Sequence[str] | None = None


# From seeds to images; a tuple of images and labels will do.
Generate = Callable[[Sequence[int]], Generated | tuple[Tensor, Tensor | None]]


@dataclass
class PeriodicEvaluation:
    """Call it after every training step; it acts on every ``every``-th.

    The reference is read once, by the suite, and kept. The same seeds are used each time, so curves
    show the model and not the draw. All ranks must call it; each generates its share of the seeds.

    Args:
        suite: metrics, extractors and reference.
        generate: from seeds to ``Generated`` (or images and labels), with the weights as they are
            (usually averaged).
        every: steps between evaluations.
        seeds: one image each.
        batch_size: images generated at once.
    """

    suite: EvalSuite
    generate: Generate
    every: int
    seeds: Sequence[int] = range(1000)
    batch_size: int = 100

    def __post_init__(self) -> None:
        if self.every < 1 or self.batch_size < 1 or len(self.seeds) == 0:
            raise ValueError(
                f"every and batch_size must be at least 1 and seeds not empty, got {self.every}, "
                f"{self.batch_size} and {len(self.seeds)} seeds"
            )

    def __call__(self, step: int) -> dict[str, float] | None:
        """Scores by name under "eval/", for ``accelerator.log``; None where it was not yet time."""
        if step == 0 or step % self.every:
            return None
        return {f"eval/{name}": value for name, value in self.evaluate().values.items()}

    @torch.no_grad()
    def evaluate(self) -> EvalResult:
        """Generate and score now."""
        joined = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        mine = list(self.seeds)[rank::world]
        self.suite.reset(keep_reference=True)
        for start in range(0, len(mine), self.batch_size):
            made = Generated(*self.generate(mine[start : start + self.batch_size]))
            self.suite.update(made.images, labels=made.labels, prompts=made.prompts)
        self.suite.sync()
        return self.suite.compute(together=joined)
