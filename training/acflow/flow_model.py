"""The trained model as a velocity of (state, level, condition), learnt from watching it sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.prediction import Kind, Level, from_denoised, to_denoised
from ...core.tensors import widen
from ...pipelines.observe import network_input, replay
from ...pipelines.predictions import align
from .conditioning import Conditioning

__all__ = ["FlowModel", "fit_timestep", "timestep_name"]

SIGMA_FLOOR = 0.05  # as in training a network that predicts the clean image


@dataclass(frozen=True)
class FlowModel:
    """How a pipeline's denoiser is called, and what its output means.

    Attributes:
        timestep: the argument that says the noise level.
        slope: ``timestep = slope * sigma + offset``.
        offset: see there.
        kind: what the network predicts where that is not the velocity, else None.
        sign: -1 where the pipeline negates the output.
        order: "uc" or "cu", which prediction comes first where the pipeline guides.
    """

    timestep: str
    slope: float
    offset: float
    kind: Kind | None = None
    sign: int = 1
    order: str = "uc"

    def velocity(
        self, network: Callable[..., Any], x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """The velocity ``noise - clean`` that ``network`` predicts, (B, ...), float32.

        Args:
            network: called as the pipeline calls its denoiser.
            x: noisy samples in the scheduler's layout, (B, ...).
            sigma: their levels, (B,).
            conditioning: of the same samples.
        """
        call = conditioning.call()
        recorded = conditioning.arguments[self.timestep]
        time = (self.slope * sigma + self.offset).to(x.device)
        time = time if not isinstance(recorded, Tensor) or recorded.ndim else time[0]
        output = replay(
            call,
            network,
            sample=network_input(call, x, lambda sample: sample),
            overrides={self.timestep: time},
        )
        prediction = self.sign * widen(align(output, x))
        if self.kind is None or self.kind == Kind.VELOCITY:
            return prediction
        level = Level.flow(sigma)
        denoised = to_denoised(prediction, self.kind, widen(x), level)
        return from_denoised(denoised, Kind.VELOCITY, widen(x), level)

    def guided(
        self,
        network: Callable[..., Any],
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning,
        uncond: Conditioning | None,
        scale: float,
    ) -> Tensor:
        """The same under guidance, ``v_u + scale * (v_c - v_u)``, ``v_u`` not differentiated."""
        velocity = self.velocity(network, x, sigma, cond)
        if uncond is None:
            return velocity
        with torch.no_grad():
            other = self.velocity(network, x, sigma, uncond)
        return other + scale * (velocity - other)

    def level_weight(self, sigma: Tensor) -> Tensor | None:
        """The factor on losses that keeps the velocity of an image prediction finite, (B,).

        Such a velocity error is an image error over sigma; sigma counts as 0.05 at least.
        """
        if self.kind is None or self.kind == Kind.VELOCITY:
            return None
        return (sigma / sigma.clamp(min=SIGMA_FLOOR)).square()


def timestep_name(conditioning: Conditioning) -> str:
    """The argument of the call that says the noise level.

    Raises:
        NotImplementedError: there is none by a usual name, or it has one value a token.
    """
    names = [n for n in conditioning.arguments if "timestep" in n or n in ("t", "time")]
    values = {n: conditioning.arguments[n] for n in names}
    found = [n for n, value in values.items() if isinstance(value, Tensor | float | int)]
    if not found:
        raise NotImplementedError(
            f"{type(conditioning.module).__name__} is called without a timestep that could be "
            f"recognised; its arguments are {', '.join(conditioning.arguments)}"
        )
    value = values[found[0]]
    if isinstance(value, Tensor) and value.ndim > 1:
        raise NotImplementedError(
            f"{type(conditioning.module).__name__} gets a noise level for every token "
            f"({found[0]}: {tuple(value.shape)}), which cannot be trained here"
        )
    return found[0]


def fit_timestep(
    sigmas: Sequence[float], values: Sequence[float], *, steps: float = 1000.0
) -> tuple[float, float]:
    """Slope and offset of ``value = slope * sigma + offset``.

    Of the usual maps (sigma or ``1 - sigma``, times 1 or ``steps``) the best is taken if it holds
    to rounding; else a line is fitted.

    Args:
        sigmas: noise levels of a trajectory.
        values: what the denoiser was told at each.
        steps: the scheduler's ``num_train_timesteps``.

    Raises:
        NotImplementedError: the relation is no line.
    """
    sigma = torch.tensor(list(sigmas), dtype=torch.float64)
    value = torch.tensor(list(values), dtype=torch.float64)
    size = float(value.abs().max())
    tolerance = 5e-3 * size + 1e-12  # integers of 1000, or bfloat16

    def miss(line: tuple[float, float]) -> float:
        return float((line[0] * sigma + line[1] - value).abs().max())

    usual = [(steps, 0.0), (1.0, 0.0), (-steps, steps), (-1.0, 1.0)]
    best = min(usual, key=miss)
    if miss(best) <= tolerance:
        return best
    matrix = torch.stack([sigma, torch.ones_like(sigma)], 1)
    fitted = torch.linalg.lstsq(matrix, value[:, None]).solution[:, 0].tolist()
    if len(sigma) < 3 or miss((fitted[0], fitted[1])) > tolerance:
        raise NotImplementedError(
            "the timestep that the denoiser is given is no linear function of sigma: "
            f"{[round(v, 4) for v in values]} at sigma {[round(s, 4) for s in sigmas]}"
        )
    return fitted[0], fitted[1]
