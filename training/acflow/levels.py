"""Noise levels and noise of an update: functions of the seed and of the update's number."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Draw", "draw_levels", "draw_update"]

EDGE = 1e-3  # levels stay this far from 0 and 1


class Draw(NamedTuple):
    """Levels (B, m) and noise (B, m, ...) of an update."""

    sigma: Tensor
    noise: Tensor

    def part(self, start: int, stop: int) -> Draw:
        """The draws of some samples, flattened to (B * m,) and (B * m, ...)."""
        return Draw(self.sigma[start:stop].flatten(0, 1), self.noise[start:stop].flatten(0, 1))


def draw_levels(
    samples: int,
    repeats: int,
    generator: torch.Generator,
    *,
    levels: str = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Levels sigma in (0, 1), (samples, repeats), stratified over the repeats of each sample.

    Args:
        samples: how many.
        repeats: levels of each; the j-th is drawn from the j-th part of the distribution.
        generator: decides; the result lives where it does.
        levels: "uniform", or "logit-normal" (sigma is the sigmoid of a normal number).
        mean: of that normal number; above 0 is noisier.
        std: of that normal number.
    """
    device = generator.device
    uniform = torch.rand(samples, repeats, generator=generator, device=device)
    share = (torch.arange(repeats, device=device) + uniform) / repeats
    if levels == "logit-normal":
        normal = math.sqrt(2) * torch.erfinv(2 * share.double() - 1).float()
        share = torch.sigmoid(mean + std * normal.clamp(-6, 6))
    return share.clamp(EDGE, 1 - EDGE)


def draw_update(
    shape: tuple[int, ...],
    repeats: int,
    *,
    seed: int,
    device: torch.device,
    levels: str = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
) -> Draw:
    """The draws of a whole update, the same whatever ranks and passes it is split over.

    Args:
        shape: of the clean samples of all ranks, (B, ...).
        repeats: levels of each sample.
        seed: of this update.
        device: where the draws are made: they differ between kinds of device.
        levels: see `draw_levels`.
        mean: see there.
        std: see there.
    """
    generator = torch.Generator(device).manual_seed(seed)
    sigma = draw_levels(shape[0], repeats, generator, levels=levels, mean=mean, std=std)
    noise = torch.randn((shape[0], repeats, *shape[1:]), generator=generator, device=device)
    return Draw(sigma, noise)
