"""Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) as pure functions: the baseline of the comparison.

Sampling is made stochastic without changing the marginals, which gives every step a Gaussian
density, and the steps are reinforced by a clipped ratio with a KL penalty.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.tensors import widen

__all__ = ["GRPOLoss", "gaussian_kl", "grpo_loss", "sde_step", "step_log_density"]


def sde_step(
    x: Tensor, velocity: Tensor, sigma: Tensor, following: Tensor, *, noise_level: float = 0.7
) -> tuple[Tensor, Tensor]:
    """Mean (B, ...) and deviation (B,) of the next state of the stochastic sampler; float32.

    ``dx = (v + s^2 / (2 sigma) * (x + (1 - sigma) v)) dsigma + s dw`` with
    ``s = noise_level * sqrt(sigma / (1 - sigma))``, one Euler step to the level ``following``.

    Args:
        x: states, (B, ...).
        velocity: predicted at them, same shape.
        sigma: their levels, (B,). At 1 the diffusion is unbounded, and the level ``following``
            takes its place there, as in Flow-GRPO; here also less than a tenth of the step below 1,
            where schedulers begin that turn diffusion grids into flow levels (0.999, say).
        following: the levels after the step, (B,).
        noise_level: the size of the diffusion; 0 is the deterministic sampler.
    """
    step = following - sigma
    at = torch.where(1 - sigma < -0.1 * step, following, sigma)
    diffusion = noise_level * (sigma / (1 - at)).sqrt()

    def over(value: Tensor) -> Tensor:
        return value.reshape(-1, *[1] * (x.ndim - 1))

    wide, v = widen(x), widen(velocity)
    pull = over(diffusion.square() / (2 * sigma)) * (wide + over(1 - sigma) * v)
    return wide + (v + pull) * over(step), diffusion * (-step).sqrt()


def step_log_density(after: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of the state after a step, per dimension (the mean over them), (B,)."""
    scale = std.reshape(-1, *[1] * (mean.ndim - 1))
    error = ((widen(after).detach() - mean) / scale).square().flatten(1).mean(1)
    return -error / 2 - std.log() - math.log(2 * math.pi) / 2


def gaussian_kl(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """KL of two Gaussians of one deviation, per dimension (the mean over them), (B,)."""
    scale = std.reshape(-1, *[1] * (mean.ndim - 1))
    return ((mean - reference.detach()) / scale).square().flatten(1).mean(1) / 2


class GRPOLoss(NamedTuple):
    """The loss (B,), and the share of ratios that were clipped (B,), 0 or 1."""

    total: Tensor
    clipped: Tensor


def grpo_loss(
    log_density: Tensor, before: Tensor, advantages: Tensor, *, clip: float = 1e-3
) -> GRPOLoss:
    """``-min(ratio * A, clip(ratio, 1 - clip, 1 + clip) * A)`` a step, (B,).

    Args:
        log_density: of the steps under the model as it is, (B,).
        before: under the model that took them, (B,).
        advantages: (B,).
        clip: how far a ratio may leave 1; small, since densities are means over dimensions.
    """
    ratio = (log_density - before.detach()).exp()
    bounded = ratio.clamp(1 - clip, 1 + clip)
    total = torch.maximum(-advantages * ratio, -advantages * bounded)
    return GRPOLoss(total, (ratio != bounded).to(total.dtype))
