"""Log-likelihood by the probability-flow equation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..core.denoiser import Denoise
from ..core.tensors import sample_dot
from .grids import check_sigmas
from .ode import slope

Field = Callable[[Tensor, Tensor], Tensor]


def exact_divergence(field: Field, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Value and divergence of ``field`` at ``x``, by one backward pass a dimension.

    Args:
        field: maps (x, sigma) to a tensor like x, each sample on its own.
        x: shape (B, ...).
        sigma: shape ().

    Returns:
        The field, (B, ...), and its divergence, (B,), both detached.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = field(leaf, sigma)
        flat = value.flatten(1)
        total = torch.zeros_like(flat[:, 0])
        for i in range(flat.shape[1]):
            (row,) = torch.autograd.grad(flat[:, i].sum(), leaf, retain_graph=True)
            total = total + row.flatten(1)[:, i]
    return value.detach(), total.detach()


def hutchinson_divergence(
    field: Field, x: Tensor, sigma: Tensor, probes: Tensor
) -> tuple[Tensor, Tensor]:
    """Value and an unbiased estimate of the divergence: the mean of ``probe . J probe``.

    Args:
        field: as for ``exact_divergence``.
        x: shape (B, ...).
        sigma: shape ().
        probes: shape (P, B, ...), zero mean and unit covariance; signs have the least variance.

    Returns:
        The field, (B, ...), and the estimate, (B,), both detached.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = field(leaf, sigma)
        total = torch.zeros(x.shape[0], dtype=value.dtype, device=x.device)
        for probe in probes:
            (row,) = torch.autograd.grad(value, leaf, grad_outputs=probe, retain_graph=True)
            total = total + sample_dot(row, probe)
    return value.detach(), total.detach() / len(probes)


def log_likelihood(
    denoise: Denoise, x: Tensor, sigmas: Tensor | Sequence[float], *, probes: Tensor | None = None
) -> Tensor:
    """Natural log density of ``x`` under the model, for ``x = clean + sigma * noise``.

    Solves ``dx / dsigma = (x - denoised) / sigma`` upwards together with the log density, whose
    rate is minus the divergence (Song et al. 2021, eq. 39), by Heun's method. The prior at the
    largest sigma is taken as a Gaussian of variance ``sigma^2`` about 0, so that sigma has to dwarf
    the data: the error of one sample is of the order of (data scale / sigma), that of a mean over
    samples of its square.

    Args:
        denoise: differentiable ``denoise(x, sigma)``, each sample on its own.
        x: samples at the *smallest* sigma of the grid, (B, ...).
        sigmas: decreasing grid without 0, as for sampling; its last value is where the density is
            meant.
        probes: (P, B, ...) for Hutchinson's estimate; None is exact and costs one backward pass a
            dimension.

    Returns:
        Shape (B,), in nats.

    Raises:
        ValueError: if the grid is not valid or ends in 0, where the equation is singular.
    """
    grid = check_sigmas(sigmas).flip(0)
    if grid[0] == 0:
        raise ValueError("the grid must end above 0: the density is singular there; use e.g. 0.002")
    if x.dtype != torch.float64:
        grid = grid.float()

    def rate(at: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        def field(y: Tensor, s: Tensor) -> Tensor:
            return slope(y, denoise(y, s), s)

        if probes is None:
            return exact_divergence(field, at, sigma)
        return hutchinson_divergence(field, at, sigma, probes)

    gained = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
    for low, high in pairwise(grid):
        d, div = rate(x, low)
        d_next, div_next = rate(x + (high - low) * d, high)
        x = x + (high - low) * (d + d_next) / 2
        gained = gained + (high - low) * (div + div_next) / 2
    dims = x[0].numel()
    prior = -sample_dot(x, x) / (2 * grid[-1] ** 2) - dims * (
        grid[-1].log() + math.log(2 * math.pi) / 2
    )
    return prior + gained
