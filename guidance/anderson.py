"""Anderson acceleration of a fixed-point iteration, each sample on its own."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.tensors import per_sample, sample_dot, sample_norm


def anderson_mix(
    xs: list[Tensor],
    gs: list[Tensor],
    *,
    damping: float = 1.0,
    ridge: float = 1e-4,
    clamp: float = 1.0,
    growth: float = 2.0,
) -> Tensor:
    """The next iterate of ``x -> g(x)`` from the last m + 1 points and their images.

    With residuals ``f = g - x`` and their differences dF, gamma minimises
    ``|f_k - dF gamma|^2 + ridge * |f_k|^2 |gamma|^2`` and the iterate is
    ``(1 - damping) (x_k - dX gamma) + damping (g_k - dG gamma)``.

    Args:
        xs: the points, oldest first, m + 1 tensors of shape (B, ...), float32 or wider.
        gs: their images, likewise. A single pair gives the plain (Picard) step.
        damping: beta; 1 is undamped.
        ridge: relative to the squared residual, so that it means the same at every scale; without
            one, nearly parallel residuals give a gamma in the hundreds.
        clamp: largest |gamma|.
        growth: a sample whose residual grew by more than this factor takes the plain step, and so
            does one whose gamma is not finite.

    Returns:
        Shape (B, ...). No sample looks at another.
    """
    x, g = xs[-1], gs[-1]
    plain = (1 - damping) * x + damping * g
    if len(xs) < 2:
        return plain
    residuals = [image - point for point, image in zip(xs, gs, strict=True)]
    last = residuals[-1]
    steps = torch.stack([last - old for old in reversed(residuals[:-1])], 1)  # (B, m, ...)
    gamma = _least_squares(steps.flatten(2), last.flatten(1), ridge)  # (B, m)
    ratio = sample_norm(last) / sample_norm(residuals[-2]).clamp_min(1e-30)
    sound = torch.isfinite(gamma).all(1) & (ratio <= growth)
    gamma = torch.where(sound[:, None], gamma.clamp(-clamp, clamp), torch.zeros_like(gamma))
    mixed = plain
    for i, (old_x, old_g) in enumerate(zip(reversed(xs[:-1]), reversed(gs[:-1]), strict=True)):
        weight = per_sample(gamma[:, i], x)
        mixed = mixed - weight * ((1 - damping) * (x - old_x) + damping * (g - old_g))
    return mixed


def _least_squares(rows: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Coefficients (B, m) of ``target`` (B, n) in ``rows`` (B, m, n), with a relative ridge."""
    floor = (ridge * sample_dot(target, target)).clamp_min(1e-30)
    right = torch.einsum("bmn,bn->bm", rows, target)
    if rows.shape[1] == 1:  # no factorization for the usual case
        return right / (rows.square().sum(-1) + floor[:, None])
    gram = rows @ rows.mT + torch.diag_embed(floor[:, None].expand(-1, rows.shape[1]))
    solution: Tensor = torch.linalg.solve_ex(gram, right)[0]
    return solution


@dataclass
class Anderson:
    """The history of one fixed-point iteration; make a new one for each.

    Args:
        window: how many earlier points take part (m); 0 is the plain iteration.
        damping: see ``anderson_mix``.
        ridge: see ``anderson_mix``.
    """

    window: int = 1
    damping: float = 1.0
    ridge: float = 1e-4
    _points: deque[tuple[Tensor, Tensor]] = field(default_factory=deque)

    def __call__(self, x: Tensor, g: Tensor) -> Tensor:
        """The next point, after ``g`` was found at ``x``."""
        self._points.append((x, g))
        while len(self._points) > self.window + 1:
            self._points.popleft()
        xs, gs = zip(*self._points, strict=True)
        return anderson_mix(list(xs), list(gs), damping=self.damping, ridge=self.ridge)
