"""Everything random in an update as a function of (seed, step): any step can be replayed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..core.prediction import Level
from ..core.tensors import send
from .data import EpochOrder, Images, derive_seed
from .flow import Network
from .noise import stable_pair

__all__ = ["Batch", "Objective", "draw_batch"]


class Objective(Protocol):
    """What is learnt: which noise and levels to draw, and the loss of each sample.

    Three attributes are read if they are there: ``kind`` (what the output means, for previews),
    ``learned`` (a ``LearnedK`` or None) and, as in ``NoiseLaw``, ``stable_targets``.
    """

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Level]:
        """Noise of ``shape`` (B, ...) and levels of shape (B,), on the generator's device."""

    def __call__(
        self, network: Network, clean: Tensor, noise: Tensor, level: Level, labels: Tensor
    ) -> Tensor:
        """The loss of each sample, (B,)."""


@dataclass(frozen=True)
class Batch:
    """One update's input.

    Attributes:
        clean: images in [-1, 1], (B, C, H, W).
        noise: what the objective drew, same shape.
        level: alpha and sigma, (B,).
        labels: class indices with the dropped ones replaced, (B,).
    """

    clean: Tensor
    noise: Tensor
    level: Level
    labels: Tensor

    def part(self, index: int, count: int) -> Batch:
        """The ``index``-th of ``count`` equal parts."""
        size = len(self.labels) // count
        cut = slice(index * size, (index + 1) * size)
        level = Level(self.level.alpha[cut], self.level.sigma[cut])
        return Batch(self.clean[cut], self.noise[cut], level, self.labels[cut])


def draw_batch(
    step: int,
    *,
    images: Images,
    order: EpochOrder,
    objective: Objective,
    batch_size: int,
    seed: int,
    flip: bool,
    label_dropout: float,
    device: torch.device,
) -> Batch:
    """The whole batch of update ``step``, the same whatever ranks and passes it is then split over.

    Labels are replaced by ``len(images.names)``, the null class, with probability
    ``label_dropout``. Noise is drawn on ``device``, so it differs between kinds of device.
    """
    host = torch.Generator().manual_seed(derive_seed(seed, "host", step))
    indices = order.stretch(step * batch_size, batch_size)
    mirrored = (torch.rand(batch_size, generator=host) < 0.5) & flip
    dropped = torch.rand(batch_size, generator=host) < label_dropout
    clean, labels = images.take(indices, mirrored)
    classes, null = send(labels, device), len(images.names)
    labels, clean = send(torch.where(dropped, null, labels), device), send(clean, device)
    there = torch.Generator(device=device).manual_seed(derive_seed(seed, "noise", step))
    noise, level = objective.draw(tuple(clean.shape), there)
    if getattr(objective, "stable_targets", False):
        dim = objective.augment_dim  # type: ignore[attr-defined]
        clean, noise = stable_pair(clean, noise, level, labels, classes, null=null, augment_dim=dim)
    return Batch(clean, noise, level, labels)
