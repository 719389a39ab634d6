"""Run a solver step over a grid of noise levels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal, Protocol, overload

import torch
from torch import Tensor

from ..core.denoiser import Denoise
from .grids import check_sigmas
from .ode import Memory


class SolverStep(Protocol):
    """One step of a solver: from the sample at ``sigma`` to the sample at ``sigma_next``."""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        memory: Memory | None = None,
    ) -> Tensor:
        """The sample at ``sigma_next``."""
        ...


@overload
def integrate(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    step: SolverStep,
    *,
    trajectory: Literal[False] = False,
    progress: bool = False,
) -> Tensor: ...
@overload
def integrate(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    step: SolverStep,
    *,
    trajectory: Literal[True],
    progress: bool = False,
) -> list[Tensor]: ...
def integrate(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    step: SolverStep,
    *,
    trajectory: bool = False,
    progress: bool = False,
) -> Tensor | list[Tensor]:
    """Carry ``x`` from the first sigma to the last.

    Args:
        denoise: ``denoise(x, sigma) -> denoised``; a ``GuidedDenoiser`` is told where trajectories
            and steps begin, so that its rule's memory is fresh and later stages are known as such.
        x: the sample at ``sigmas[0]``, (B, ...): noise times ``sigmas[0]`` to generate from
            nothing.
        sigmas: strictly decreasing, at least two values; see ``grids``.
        step: ``euler_step``, ``heun_step``, ``dpmpp_2m_step``, ``AncestralStep(...)``,
            ``ChurnStep(...)``, ``StudentChurnStep(...)``.
        trajectory: return the sample at every sigma instead of the last one alone.
        progress: show a bar, if the standard error is a terminal.

    Returns:
        The sample at the last sigma, or the list of ``len(sigmas)`` samples, the first being ``x``.

    Raises:
        ValueError: if the grid is not valid (see ``grids.check_sigmas``).
    """
    # The grid stays on the CPU: as () scalars it mixes with samples on any device, and asking
    # whether it reached 0 does not wait for the device.
    grid = check_sigmas(sigmas)
    if x.dtype != torch.float64:
        grid = grid.float()
    levels = grid.unbind()
    if begin := getattr(denoise, "begin", None):
        begin(count=len(grid) - 1)
    begin_step = getattr(denoise, "begin_step", None)
    memory: Memory = {}
    samples = [x]
    for i in _bar(len(grid) - 1, progress):
        if begin_step:
            begin_step(i, levels[i + 1])
        x = step(denoise, x, levels[i], levels[i + 1], memory)
        if trajectory:
            samples.append(x)
    return samples if trajectory else x


def _bar(count: int, progress: bool) -> Sequence[int]:
    if not (progress and sys.stderr.isatty()):
        return range(count)
    from tqdm import tqdm

    bar: Sequence[int] = tqdm(range(count), desc="sampling", unit="step")
    return bar
