"""Fréchet distance extrapolated to infinitely many samples (Chong & Forsyth 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .frechet import Gaussian, frechet_distance_to
from .moments import Moments, check_features


@dataclass(frozen=True)
class Extrapolation:
    """The intercept of distance against 1 / N, its standard error, and the points it was fitted to.

    ``counts`` and ``distances`` have shape (points,), float64.
    """

    value: float
    stderr: float
    slope: float
    counts: Tensor
    distances: Tensor


def fd_infinity(
    reference: Gaussian, fake: Tensor, *, points: int = 15, smallest: int | None = None
) -> Extrapolation:
    """Fréchet distance at N going to infinity: a straight line through 1 / N.

    The bias of the distance falls as 1 / N, so a line through nested subsets of growing size has
    the unbiased distance as its intercept. Subsets are the first rows of ``fake``: bring them into
    an order that means nothing (``content.canonical_order``) first. The points share samples, so
    the standard error is that of the line's fit and too small for claims.

    Args:
        reference: real mean and covariance; only the bias of the fake side is removed.
        fake: shape (M, d).
        points: number of subsets, sizes evenly spaced.
        smallest: size of the smallest; the larger of M / 10 and 2 d by default, at most M / 2.

    Raises:
        ValueError: if there are too few samples, or a value is not finite.
    """
    check_features(fake, "fake features")
    count, dim = fake.shape
    if smallest is None:
        smallest = min(max(count // 10, 2 * dim), count // 2)
    if points < 3 or smallest < 2 or count - smallest < points:
        raise ValueError(
            f"extrapolation needs at least 3 different subset sizes, the smallest at least 2, got "
            f"points = {points} from {smallest} to {count} samples; use more samples"
        )
    sizes = np.linspace(smallest, count, points).astype(int)
    moments, start, distances = Moments.zero(dim, fake.device), 0, []
    for size in sizes:
        moments, start = moments + Moments.of(fake[start:size]), int(size)
        distances.append(frechet_distance_to(reference, moments.mean, moments.covariance))
    value, slope, stderr = _line(1 / sizes, np.array(distances))
    counts = torch.from_numpy(sizes).double()
    return Extrapolation(value, stderr, slope, counts, torch.tensor(distances, dtype=counts.dtype))


def _line(x: NDArray[Any], y: NDArray[Any]) -> tuple[float, float, float]:
    """Intercept, slope, standard error of the intercept."""
    centred = x - x.mean()
    spread = float((centred**2).sum())
    slope = float((centred * y).sum()) / spread
    residual = y - y.mean() - slope * centred
    variance = float((residual**2).sum()) / (len(x) - 2)
    stderr = (variance * (1 / len(x) + float(x.mean()) ** 2 / spread)) ** 0.5
    return float(y.mean()) - slope * float(x.mean()), slope, stderr
