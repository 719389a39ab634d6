"""Deterministic steps of the probability-flow equation, over ``denoise(x, sigma)``.

With ``x = clean + sigma * noise`` (EDM) and with ``x = (1 - sigma) * clean + sigma * noise`` (flow)
alike the equation reads ``dx / dsigma = (x - denoised) / sigma``; so Euler and Heun need not know
which it is. The multistep solver works in log-SNR and takes the ``level`` that says what a sigma
means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.denoiser import Denoise
from ..core.prediction import Level

Memory = dict[str, Any]


def look(denoise: Denoise, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The sample and its denoised prediction at the start of a step.

    A guidance rule may put another sample in the place of ``x`` (manifold projection); a
    ``GuidedDenoiser`` says so in its ``moved``.
    """
    denoised = denoise(x, sigma)
    moved: Tensor | None = getattr(denoise, "moved", None)
    return (x if moved is None else moved), denoised


def slope(x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """``dx / dsigma`` of the probability-flow equation; the noise (EDM) or the velocity (flow)."""
    return (x - denoised) / sigma


def toward(denoised: Tensor, x: Tensor, share: Tensor) -> Tensor:
    """``denoised + share * (x - denoised)`` in one pass; ``share`` has shape ()."""
    if denoised.dtype != x.dtype or share.device.type != "cpu":
        return denoised + share * (x - denoised)
    # A number, read on the CPU without waiting: no operation is spent on it.
    return torch.lerp(denoised, x, float(share))


def plus(x: Tensor, gap: Tensor, share: Tensor) -> Tensor:
    """``x + share * gap`` in one pass; ``share`` has shape ()."""
    if gap.dtype != x.dtype or share.device.type != "cpu":
        return x + share * gap
    return torch.add(x, gap, alpha=float(share))


def euler_step(
    denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Memory | None = None
) -> Tensor:
    """One Euler step, order 1, one evaluation; exact on arrival at sigma 0.

    Args:
        denoise: ``denoise(x, sigma) -> denoised``.
        x: the sample at ``sigma``, (B, ...).
        sigma: shape (), greater than 0.
        sigma_next: shape (), smaller than ``sigma``.
        memory: unused; Euler remembers nothing.

    Returns:
        The sample at ``sigma_next``.
    """
    x, denoised = look(denoise, x, sigma)
    return toward(denoised, x, sigma_next / sigma)


def heun_step(
    denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Memory | None = None
) -> Tensor:
    """A trial Euler step, then the mean of both slopes: order 2 (Karras et al. 2022, Algorithm 1).

    Arguments as ``euler_step``. At ``sigma_next`` = 0 the second slope is undefined and the Euler
    step is taken, which is exact there.
    """
    x, denoised = look(denoise, x, sigma)
    trial = toward(denoised, x, sigma_next / sigma)
    if sigma_next == 0:
        return trial
    # With the second slope alone one would arrive elsewhere; halfway between the two is the mean.
    gap = trial - denoise(trial, sigma_next)
    other = plus(x, gap, (sigma_next - sigma) / sigma_next)
    return (trial + other) / 2 if trial.dtype != other.dtype else torch.lerp(trial, other, 0.5)


def dpmpp_2m_step(
    denoise: Denoise,
    x: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    memory: Memory | None = None,
    *,
    level: Callable[[Tensor], Level] = Level.ve,
) -> Tensor:
    """DPM-Solver++(2M): order 2 from one evaluation a step (Lu et al. 2022, Algorithm 2).

    Arguments as ``euler_step``, and:
        memory: the trajectory's dictionary; holds the last prediction. Without it, and on the first
            step and on arrival at sigma 0, the step is the first-order one (the exponential Euler
            step).
        level: what a sigma means: ``Level.ve`` (default) or ``Level.flow``.
    """
    x, denoised = look(denoise, x, sigma)
    if sigma_next == 0:
        return denoised
    now, then = level(sigma), level(sigma_next)
    # Numbers, not tensors: on the CPU, where ``integrate`` keeps its grid, reading them is free.
    ratio, guess = float(now.ratio), denoised
    if memory is not None:
        if "dpmpp_2m" in memory:
            guess = _foreseen(denoised, memory["dpmpp_2m"], ratio, float(then.ratio))
        memory["dpmpp_2m"] = (denoised, ratio)
    keep = float(then.sigma / now.sigma)
    share = float(then.alpha) - keep * float(now.alpha)
    if guess.dtype != x.dtype:
        return keep * x + share * guess
    if abs(keep + share - 1) < 8 * torch.finfo(x.dtype).eps:  # in a flow and in EDM it always is
        return torch.lerp(guess, x, keep)
    return torch.add(share * guess, x, alpha=keep)


def _foreseen(
    denoised: Tensor, last: tuple[Tensor, float], ratio: float, ratio_next: float
) -> Tensor:
    """The denoised prediction carried on by half a step along the line through the last two.

    In log-SNR; that of pure noise (sigma = 1 of a flow) is infinite, which is no correction.
    """
    before, ratio_before = last
    r = math.log(ratio_before / ratio) / math.log(ratio / ratio_next)
    return torch.lerp(before, denoised, 1 + 1 / (2 * r))
