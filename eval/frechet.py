"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017), to 1e-10 relative.

The trace of the square root is taken through symmetric factors, never of the product of both
covariances: the square root of that product's rounding noise costs five digits where there are
fewer samples than features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import Moments, check_features

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Gaussian:
    """Mean, covariance and a factor of it: a reference that is scored against many times.

    Args:
        mean: shape (d,), float64.
        covariance: shape (d, d), float64, symmetric.
        factor: shape (d, r) with ``factor @ factor.T == covariance``; r is the numerical rank.
    """

    mean: Tensor
    covariance: Tensor
    factor: Tensor

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor) -> Gaussian:
        """Factor ``covariance`` once.

        Raises:
            ValueError: if the shapes do not fit, values are not finite, or the covariance is not
                symmetric or has an eigenvalue below ``-1e-6 * trace / d``.
        """
        mean, covariance = mean.to(torch.float64), covariance.to(torch.float64)
        _check_gaussian(mean, covariance)
        return cls(mean, covariance, covariance_factor(covariance))


def covariance_factor(covariance: Tensor) -> Tensor:
    """A factor R with ``R @ R.T == covariance``, shape (d, r), float64; r is the numerical rank.

    Cholesky where the matrix is safely positive definite, Cholesky with pivots where its rank is
    lower (fewer samples than features), and eigenvectors where that leaves too much behind.

    Raises:
        ValueError: if an eigenvalue is below ``-1e-6 * trace / d``: no covariance of real numbers.
    """
    dim = covariance.shape[0]
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(covariance)
    pivots = lower.diagonal().square()
    if not bool(failed) and bool(pivots.min() > 1e-10 * pivots.max()):
        return lower
    factor, left = pivoted_cholesky(covariance)
    if left <= 1e-6 * float(covariance.trace()) / dim**2:
        return factor
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(covariance)
    lowest, trace = float(values[0]), float(values.sum())
    if lowest < -1e-6 * max(trace, 0.0) / dim - 1e-300:
        raise ValueError(
            f"the covariance has an eigenvalue of {lowest:.3g} (trace {trace:.3g}), so it is none; "
            "the statistics are corrupt or were summed in too low a precision"
        )
    keep = values > dim * _EPS * values[-1].clamp_min(0)
    return vectors[:, keep] * values[keep].sqrt()


def pivoted_cholesky(matrix: Tensor, *, block: int = 96) -> tuple[Tensor, float]:
    """A factor of a positive semi-definite matrix, one column for each pivot above rounding noise.

    The largest remaining diagonal entry is eliminated next, so the number of columns is the
    numerical rank: d r² operations where the eigenvectors take ten d³.

    Args:
        matrix: shape (d, d), float64, symmetric.
        block: columns between two updates of the whole matrix.

    Returns:
        The factor, (d, r), and the largest magnitude of what it leaves of the matrix.
    """
    dim, rest = matrix.shape[0], matrix.clone()
    diagonal = rest.diagonal().clone()
    floor = dim * _EPS * diagonal.max().clamp_min(0)
    used = torch.zeros(dim, dtype=torch.bool, device=matrix.device)
    columns: list[Tensor] = []
    for _ in range(0, dim, block):
        part = rest.new_zeros(block, dim)  # a row is a column of the factor
        for j in range(block):  # the index stays on the device: no wait for it
            at = diagonal.argmax().view(1)
            pivot = diagonal.index_select(0, at)
            column = rest.index_select(0, at)[0]
            if j:
                column = torch.addmv(column, part[:j].T, part[:j].index_select(1, at)[:, 0],
                                     alpha=-1)  # fmt: skip
            root = torch.where(pivot > floor, pivot.clamp_min(floor).rsqrt(), 0)
            part[j] = column * root
            diagonal = diagonal.addcmul(part[j], part[j], value=-1).index_fill(0, at, -torch.inf)
            used.index_fill_(0, at, True)
        columns.append(part[part.any(1)])
        rest.addmm_(part.T, part, alpha=-1)
        diagonal = rest.diagonal().masked_fill(used, -torch.inf)
        if len(columns[-1]) < block or not bool(diagonal.max() > floor):
            break
    return torch.cat(columns).T, float(rest.abs().max())


def frechet_distance(
    mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor
) -> float:
    """Fréchet distance ``|ma - mb|² + tr(A + B - 2 (A B)^(1/2))`` of two Gaussians.

    Args:
        mean_a: shape (d,).
        covariance_a: shape (d, d), symmetric positive semi-definite.
        mean_b: shape (d,).
        covariance_b: shape (d, d).

    Returns:
        The squared 2-Wasserstein distance, in squared feature units, computed in float64.

    Raises:
        ValueError: if shapes do not fit, values are not finite, or a matrix is no covariance.
    """
    return frechet_distance_to(Gaussian.of(mean_a, covariance_a), mean_b, covariance_b)


def frechet_distance_to(
    reference: Gaussian, mean: Tensor, covariance: Tensor, *, rank: int | None = None
) -> float:
    """Fréchet distance to a reference whose factor is at hand: two products and one ``eigvalsh``.

    Args:
        reference: factored once.
        mean: shape (d,).
        covariance: shape (d, d).
        rank: of ``covariance`` at most, where that is known (one less than the samples). Where it
            is far below the reference's, the smaller factor is used; the result is the same.

    Raises:
        ValueError: as ``frechet_distance``.
    """
    device = reference.factor.device
    mean = mean.to(device, torch.float64)
    covariance = covariance.to(device, torch.float64)
    _check_gaussian(mean, covariance)
    if mean.shape != reference.mean.shape:
        raise ValueError(
            f"the two Gaussians have {len(reference.mean)} and {len(mean)} dimensions; "
            "they come from different feature extractors"
        )
    factor, other = reference.factor, covariance
    if rank is not None and 2 * rank <= factor.shape[1]:
        factor, other = covariance_factor(covariance), reference.covariance
    values = torch.linalg.eigvalsh(_sandwich(factor, other))
    # Below this an eigenvalue is rounding noise, and its root would be far larger than itself.
    floor = len(mean) * _EPS * values[-1:].clamp_min(0)
    root_trace = torch.where(values > floor, values, 0).sqrt().sum()
    traces = reference.covariance.trace() + covariance.trace()
    return _finish(reference.mean - mean, traces, root_trace)


def _sandwich(factor: Tensor, middle: Tensor, *, block: int = 256) -> Tensor:
    """The lower triangle of ``factor.T @ middle @ factor``, which is all that ``eigvalsh`` reads.

    Block by block, so that neither the other half nor the zeros of a Cholesky factor are computed:
    a third of the operations.

    Args:
        factor: shape (d, r).
        middle: shape (d, d), symmetric.
        block: columns at a time.
    """
    dim, rank = factor.shape
    triangular = dim == rank and not bool(factor.triu(1).any())
    out = factor.new_zeros(rank, rank)
    for start in range(0, rank, block):
        columns, top = slice(start, start + block), start if triangular else 0
        part = middle[top:, top:] @ factor[top:, columns]
        out[start:, columns] = factor[top:, start:].T @ part
    return out


def frechet_distance_of_moments(a: Moments, b: Moments) -> float:
    """Fréchet distance of two sets of samples from their moments; see ``frechet_distance``."""
    few, many = (a, b) if a.count <= b.count else (b, a)  # fewer samples, smaller factor
    return frechet_distance(few.mean, few.covariance, many.mean, many.covariance)


def frechet_distance_from_features(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of feature rows.

    Where both sets have at most 4 d rows the covariances are never formed: the nuclear norm of the
    product of the two centred data matrices is the trace term, to full precision at any rank. With
    more rows covariances are well enough conditioned, and faster.

    Args:
        a: shape (N, d), any floating dtype; computed in float64.
        b: shape (M, d).

    Raises:
        ValueError: if a set has fewer than two rows, the widths differ, or a value is not finite.
    """
    check_features(a, "features a")
    check_features(b, "features b")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features have {a.shape[1]} and {b.shape[1]} columns; expected the same")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"expected at least 2 samples on each side, got {len(a)} and {len(b)}")
    if max(len(a), len(b)) > 4 * a.shape[1]:
        return frechet_distance_of_moments(Moments.of(a), Moments.of(b))
    mean_a, factor_a = _centred_factor(a)
    mean_b, factor_b = _centred_factor(b)
    traces = factor_a.square().sum() + factor_b.square().sum()
    root_trace = torch.linalg.svdvals(factor_a @ factor_b.T).sum()
    return _finish(mean_a - mean_b, traces, root_trace)


def _centred_factor(features: Tensor) -> tuple[Tensor, Tensor]:
    wide = features.to(torch.float64)
    mean = wide.mean(0)
    rows: Tensor = (wide - mean) / (len(wide) - 1) ** 0.5
    if len(rows) > rows.shape[1]:  # the triangular factor has the same singular values, fewer rows
        rows = torch.linalg.qr(rows, mode="r").R
    return mean, rows


def _finish(gap: Tensor, traces: Tensor, root_trace: Tensor) -> float:
    distance = float(gap.dot(gap) + traces - 2 * root_trace)
    if distance < -1e-6 * max(float(traces), 1e-300):
        raise ValueError(
            f"the Fréchet distance came out as {distance:.3g}, far below zero; the statistics are "
            "corrupt or were summed in too low a precision"
        )
    return max(distance, 0.0)


def _check_gaussian(mean: Tensor, covariance: Tensor) -> None:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            "expected a mean of shape (d,) and a covariance of shape (d, d), got "
            f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    low, high = covariance.aminmax()  # one pass; NaN comes through
    if not bool(torch.isfinite(mean).all() & torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError("the mean or the covariance holds NaN or infinity")
    scale = float(torch.maximum(high, -low))
    skew = float((covariance - covariance.T).amax())  # it is antisymmetric: no need for abs
    if skew > 1e-6 * scale:
        raise ValueError(f"the covariance is not symmetric: entries differ by {skew:.3g}")
