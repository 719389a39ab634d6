"""Schedules of calibrated classifier guidance (arXiv 2310.11311): how hard to push, and when."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.prediction import Level


def posterior_variance(now: Level, following: Level) -> Tensor:
    """Variance of the forward posterior, ``sigma'^2 (1 - (alpha sigma' / (alpha' sigma))^2)``."""
    gain = (now.alpha * following.sigma) / (following.alpha * now.sigma)
    return following.sigma**2 * (1 - gain**2).clamp_min(0)


def sine_boost(index: int, count: int, gamma: float, largest: Tensor, variance: Tensor) -> Tensor:
    """``w / Sigma = 1 + gamma * (V_max / Sigma) * sin(pi t / N)``, t from N - 1 down to 0 (E2).

    Args:
        index: number of the step, from 0.
        count: N.
        gamma: weight of the sine term.
        largest: V_max, the largest posterior variance so far.
        variance: Sigma of this step; where it is 0 there is no boost.
    """
    sine = math.sin(math.pi * (count - 1 - index) / count)
    ratio = torch.where(
        variance > 0, largest / variance.clamp_min(1e-30), torch.zeros_like(variance)
    )
    return 1 + gamma * sine * ratio


def direction_size(index: int, count: int, largest: float, bump: float) -> float:
    """Size of the EDM form's push relative to the sample (E3): linear decay plus a sine bump.

    ``max(G (L - i) / L, 1e-5) + bump * G sin(pi i / (L - 1))`` with L = count + 1; 0 if G is 0.
    """
    if largest == 0:
        return 0.0
    length = count + 1
    sine = math.sin(math.pi * index / (length - 1))
    return max(largest * (length - index) / length, 1e-5) + bump * largest * sine
