"""Noise-level grids: decreasing sigmas that end in 0, one more than there are steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _steps(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    return steps


def karras_sigmas(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """The grid of Karras et al. 2022, eq. 5, for ``x = clean + sigma * noise``.

    Args:
        steps: number of solver steps; with one step the grid is (sigma_max, 0).
        sigma_min: the last sigma before 0.
        sigma_max: the first sigma.
        rho: how strongly the grid crowds at small sigmas.

    Returns:
        Shape (steps + 1,), float64 on the CPU, from ``sigma_max`` down to 0.

    Raises:
        ValueError: if ``steps`` < 1, or unless 0 < sigma_min < sigma_max and rho > 0.
    """
    if not 0 < sigma_min < sigma_max < math.inf or not rho > 0:
        raise ValueError(
            "karras_sigmas needs 0 < sigma_min < sigma_max and rho > 0, got "
            f"sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}"
        )
    ramp = torch.linspace(0, 1, _steps(steps), dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    sigmas[0] = sigma_max  # the power and its root leave a rounding error
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def linear_sigmas(steps: int, sigma_max: float = 1.0) -> Tensor:
    """Evenly spaced sigmas from ``sigma_max`` to 0, (steps + 1,), float64 on the CPU.

    Raises:
        ValueError: if ``steps`` < 1, or ``sigma_max`` is not positive and finite.
    """
    if not 0 < sigma_max < math.inf:
        raise ValueError(f"linear_sigmas needs a positive, finite sigma_max, got {sigma_max}")
    return torch.linspace(sigma_max, 0, _steps(steps) + 1, dtype=torch.float64)


def flow_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """The shifted grid of flow models, ``shift * s / (1 + (shift - 1) * s)`` of a linear one.

    Args:
        steps: number of solver steps.
        shift: 1 is linear; SD3 samples at 3. Larger values spend more steps at high noise.

    Returns:
        Shape (steps + 1,), float64 on the CPU, from 1 down to 0, for
        ``x = (1 - sigma) * clean + sigma * noise`` (Esser et al. 2024, eq. 23).

    Raises:
        ValueError: if ``steps`` < 1, or ``shift`` is not positive and finite.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"flow_sigmas needs a positive, finite shift, got {shift}")
    s = linear_sigmas(steps)
    return shift * s / (1 + (shift - 1) * s)


def check_sigmas(sigmas: Tensor | Sequence[float]) -> Tensor:
    """A user's own grid as a float64 CPU tensor.

    Raises:
        ValueError: unless the grid is one-dimensional, has at least two values, is finite,
            not negative and strictly decreasing.
    """
    grid = torch.as_tensor(sigmas, dtype=torch.float64).detach().cpu()
    if grid.ndim != 1 or grid.numel() < 2:
        raise ValueError(
            "sigmas must be a list of at least two levels (from, to), "
            f"got shape {tuple(grid.shape)}"
        )
    if not bool(torch.isfinite(grid).all()) or bool((grid < 0).any()):
        raise ValueError(f"sigmas must be finite and not negative, got {grid.tolist()}")
    rising = (grid[1:] >= grid[:-1]).nonzero()
    if rising.numel():
        i = int(rising[0])
        raise ValueError(
            f"sigmas must decrease strictly, but sigmas[{i + 1}]={grid[i + 1]:g} follows "
            f"sigmas[{i}]={grid[i]:g}"
        )
    return grid
