"""Count, mean and covariance of feature rows as one mergeable statistic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and centred scatter of feature rows in float64; adding two merges both sets.

    Centred scatters, rather than raw sums of squares, lose nothing where a mean is far from zero
    (Chan et al. 1979); merging is exact arithmetic up to rounding, in any order and grouping.

    Args:
        count: number of rows.
        mean: shape (d,), float64; zeros where ``count`` is 0.
        scatter: shape (d, d), float64, the sum of outer products of the rows about ``mean``.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def zero(cls, dim: int, device: torch.device | str = "cpu") -> Moments:
        """The statistic of no rows at all: what an empty rank contributes."""
        mean = torch.zeros(dim, dtype=torch.float64, device=device)
        return cls(0, mean, torch.zeros(dim, dim, dtype=torch.float64, device=device))

    @classmethod
    def of(cls, features: Tensor, *, chunk: int = 8192) -> Moments:
        """Moments of ``features``, shape (N, d), any floating dtype; summed in float64.

        Devices without float64 (MPS) are summed on the CPU.

        Raises:
            TypeError: if ``features`` is not a floating-point tensor.
            ValueError: if it is not a matrix, or holds NaN or infinity.
        """
        check_features(features, "features")
        device = "cpu" if features.device.type == "mps" else features.device
        merged = cls.zero(features.shape[1], device)
        for start in range(0, len(features), chunk):
            wide = features[start : start + chunk].to(device=device, dtype=torch.float64)
            mean = wide.mean(0)
            wide = wide - mean
            merged = merged + cls(len(wide), mean, _gram(wide))
        return merged

    @classmethod
    def merge(cls, parts: Iterable[Moments]) -> Moments:
        """Moments of the union of ``parts``.

        Raises:
            ValueError: if there are no parts, or they differ in dimension.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("nothing to merge: expected at least one Moments")
        merged = parts[0]
        for part in parts[1:]:
            merged = merged + part
        return merged

    def __add__(self, other: Moments) -> Moments:
        if self.dim != other.dim:
            raise ValueError(
                f"cannot add moments of {self.dim} and {other.dim} dimensions; "
                "they come from different feature extractors"
            )
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count, gap = self.count + other.count, other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        weight = self.count * other.count / count
        scatter = torch.addr(self.scatter, gap, gap, alpha=weight).add_(other.scatter)
        return Moments(count, mean, scatter)

    def packed(self) -> Tensor:
        """Count, mean and scatter as one float64 row, (1 + d + d²,), for collectives."""
        return torch.cat([self.mean.new_tensor([self.count]), self.mean, self.scatter.flatten()])

    @classmethod
    def unpacked(cls, row: Tensor) -> Moments:
        """The moments of a row of ``packed``."""
        dim = round(math.sqrt(len(row) - 0.75) - 0.5)
        return cls(int(row[0]), row[1 : 1 + dim], row[1 + dim :].view(dim, dim))

    @property
    def dim(self) -> int:
        """Number of features, d."""
        return self.mean.shape[0]

    @property
    def covariance(self) -> Tensor:
        """Sample covariance (ddof 1, as every FID implementation), shape (d, d), float64.

        Raises:
            ValueError: if there are fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return (self.scatter + self.scatter.T) / (2 * (self.count - 1))


def _gram(rows: Tensor, *, block: int = 512) -> Tensor:
    """``rows.T @ rows``, (d, d), without computing its two equal halves twice."""
    dim = rows.shape[1]
    out = rows.new_empty(dim, dim)
    for start in range(0, dim, block):
        end = min(start + block, dim)
        out[start:, start:end] = rows[:, start:].T @ rows[:, start:end]
        out[start:end, end:] = out[end:, start:end].T
    return out


def check_features(features: Tensor, name: str) -> None:
    """Refuse what no metric can use: not a matrix, or not finite.

    Raises:
        TypeError: if ``features`` is not a floating-point tensor.
        ValueError: if it is not of shape (N, d), or holds NaN or infinity.
    """
    if not isinstance(features, Tensor) or not features.is_floating_point():
        kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"{name} must be a floating-point tensor of shape (N, d), got {kind}")
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} must have shape (N, d), got {tuple(features.shape)}")
    finite = torch.isfinite(features).all(1)
    if not bool(finite.all()):
        rows = torch.nonzero(~finite).flatten()
        raise ValueError(
            f"{name} hold NaN or infinity in {len(rows)} of {len(features)} rows (first: row "
            f"{int(rows[0])}); run the extractor in float32, or drop those samples and say so"
        )
