"""Distances to nearest neighbours, certified: fast float32 products, exact decisions.

A matrix product gives all squared distances quickly but not exactly, and a comparison of two nearly
equal distances then depends on the hardware. Here every comparison that falls within the rounding
error of the product is decided again from the float64 distance, so counts are those of exact
arithmetic, on any device and for any tile size, at the speed of the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .gather import Share
from .moments import check_features

# Safety factor on the rounding error of a dot product of d terms, about sqrt(d) units in the last
# place; the largest error seen in tests is under a tenth of the bound.
_SAFETY = 4.0
# Relative rounding of the factors of a product: none, TF32, bfloat16.
_ROUNDING = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-9}


@dataclass(frozen=True)
class Points:
    """Feature rows prepared for distances: exact values, and a centred float32 copy.

    Args:
        exact: shape (N, d), as given; differences are taken in float64.
        centre: shape (d,), float64, subtracted from the float32 copy. Distances do not change, the
            rounding error of the product shrinks by orders of magnitude.
    """

    exact: Tensor
    centre: Tensor

    @cached_property
    def centred(self) -> Tensor:
        """Float32 rows about the centre, shape (N, d)."""
        if self.exact.dtype == torch.float32:
            shift = self.centre.to(torch.float32)
            return self.exact - shift
        return (self.exact.double() - self.centre).float()

    @cached_property
    def norms(self) -> Tensor:
        """Squared norms of the centred rows, shape (N,), float32."""
        return self.centred.square().sum(1)

    @cached_property
    def largest_norm(self) -> float:
        """The largest squared norm, which bounds the rounding error of any distance."""
        return float(self.norms.max()) if len(self.exact) else 0.0

    def __len__(self) -> int:
        return len(self.exact)


def pair_up(a: Tensor, b: Tensor, *, centre: bool = True) -> tuple[Points, Points]:
    """Prepare two sets on a common centre, the mean of ``a``; inputs (N, d) and (M, d).

    Raises:
        ValueError: if the widths differ, a set is empty, or a value is not finite.
    """
    check_features(a, "real features")
    check_features(b, "fake features")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"real and fake features have {a.shape[1]} and {b.shape[1]} columns; "
            "expected the same extractor on both sides"
        )
    if min(len(a), len(b)) == 0:
        raise ValueError(f"expected samples on both sides, got {len(a)} real and {len(b)} fake")
    a, b = (x.cpu() if x.device.type == "mps" else x for x in (a, b))
    middle = torch.zeros(a.shape[1], dtype=torch.float64, device=a.device)
    if centre:
        # Both float32 copies must subtract the same rounded value, or distances would change.
        middle = a.mean(0, dtype=torch.float64).float().double()
    return Points(a, middle), Points(b.to(a.device), middle)


def exact_squared(a: Points, rows: Tensor, b: Points, columns: Tensor) -> Tensor:
    """Float64 squared distances of listed pairs, shape (P,); equal pairs give equal values."""
    out = torch.empty(len(rows), dtype=torch.float64, device=a.exact.device)
    step = max(1, 2**21 // a.exact.shape[1])  # 16 MiB of float64 differences at a time
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        gap = a.exact[rows[part]].double() - b.exact[columns[part]].double()
        out[part] = gap.square_().sum(1)
    return out


def tolerance(a: Points, b: Points) -> float:
    """Bound on the error of a squared distance from the product, at the precision in force.

    Two parts: sums of d terms, and factors that are rounded first where the user allowed TF32 or
    bfloat16 products (``torch.set_float32_matmul_precision``). The second is a worst case
    (Cauchy-Schwarz), so those products only send more pairs to the exact comparison.
    """
    sums = _SAFETY * torch.finfo(torch.float32).eps * math.sqrt(max(a.exact.shape[1], 16))
    try:
        factors = _ROUNDING[torch.get_float32_matmul_precision()]
    except (RuntimeError, KeyError):  # set through the newer, finer switches
        factors = _ROUNDING["medium"]
    return (sums + 2 * factors) * (a.largest_norm + b.largest_norm)


def tiles(
    a: Points, b: Points, chunk: int, rows: range | None = None, *, upper: bool = False
) -> Iterator[tuple[int, int, Tensor]]:
    """Approximate squared distances, tile by tile: (first row, first column, (R, C) float32).

    ``rows`` are those of ``a`` that are wanted, a block; all by default. ``upper`` leaves out the
    tiles below the diagonal, which for one set of points repeat those above.
    """
    rows = range(len(a)) if rows is None else rows
    for row in rows[::chunk]:
        last = min(row + chunk, rows.stop)
        x, x_norm = a.centred[row:last], a.norms[row:last, None]
        for column in range(row if upper else 0, len(b), chunk):
            y, y_norm = b.centred[column : column + chunk], b.norms[column : column + chunk]
            yield row, column, torch.addmm(x_norm + y_norm, x, y.T, alpha=-2)


def radii_squared(
    points: Points, k: int, *, chunk: int = 1024, share: Share | None = None
) -> Tensor:
    """Exact squared distance of each row to its k-th nearest *other* row, shape (N,), float64.

    Args:
        points: N rows.
        k: the neighbour.
        chunk: rows at a time.
        share: the part that this rank does; all ranks get the whole.

    Raises:
        ValueError: if there are not more than ``k`` rows.
    """
    share = share or Share()
    found, _ = _nearest(points, points, k, chunk, share, skip_self=True, only_last=True)
    return share.total(found[:, -1])


def nearest(
    a: Points, b: Points, k: int, *, chunk: int = 1024, share: Share | None = None
) -> tuple[Tensor, Tensor]:
    """Exact squared distances and indices of the k rows of ``b`` nearest to each row of ``a``.

    Args:
        a: N rows.
        b: M rows.
        k: how many neighbours.
        chunk: rows of ``a`` at a time.
        share: the part that this rank does; all ranks get the whole.

    Returns:
        (N, k) float64, ascending, and (N, k) int64. Ties go to any of the tied rows.

    Raises:
        ValueError: if ``b`` has too few rows.
    """
    share = share or Share()
    found, index = _nearest(a, b, k, chunk, share, skip_self=False, only_last=False)
    return share.total(found), share.total(index)


def _nearest(
    a: Points, b: Points, k: int, chunk: int, share: Share, *, skip_self: bool, only_last: bool
) -> tuple[Tensor, Tensor]:
    """Distances and indices for this rank's rows, zeros for the others."""
    available = len(b) - int(skip_self)
    if not 1 <= k <= available:
        raise ValueError(
            f"k = {k} nearest neighbours asked for, but only {available} other samples there are; "
            "use more samples or a smaller k"
        )
    slack = tolerance(a, b)
    distances = torch.zeros(len(a), k, dtype=torch.float64, device=a.exact.device)
    indices = torch.zeros(len(a), k, dtype=torch.int64, device=a.exact.device)
    mine, count = share.rows(len(a)), min(k + 8, available)
    # Alone with one set of points, half of the products are enough.
    every = _own_candidates(a, count, chunk) if skip_self and share.world == 1 else None
    for start in mine[::chunk]:
        rows = torch.arange(start, min(start + chunk, mine.stop), device=a.exact.device)
        rough, candidates = (
            _candidates(a, b, rows, count, skip_self) if every is None else (t[rows] for t in every)
        )
        found, order = _exact_rows(a, rows, b, candidates, rough, k, slack, only_last)
        distances[rows], indices[rows] = found, candidates.gather(1, order)
        # What was not a candidate is at least this far, give or take the rounding error.
        if candidates.shape[1] < available:
            doubtful = rows[found[:, -1] > rough[:, -1].double() - slack]
            for first in range(0, len(doubtful), 64):
                row = doubtful[first : first + 64]
                distances[row], indices[row] = _brute_force(a, row, b, k, skip_self)
    return distances, indices


def _candidates(
    a: Points, b: Points, rows: Tensor, count: int, skip_self: bool
) -> tuple[Tensor, Tensor]:
    """The ``count`` roughly nearest rows of ``b``, in ascending rough distance, (R, count)."""
    block = slice(int(rows[0]), int(rows[-1]) + 1)
    best = torch.empty(len(rows), 0, device=a.exact.device)
    where = torch.empty(len(rows), 0, dtype=torch.int64, device=a.exact.device)
    width = max(16384, count)
    for column in range(0, len(b), width):
        columns = slice(column, column + width)
        tile = torch.addmm(b.norms[columns], a.centred[block], b.centred[columns].T, alpha=-2)
        if skip_self:
            own = rows - column
            mine = (own >= 0) & (own < tile.shape[1])
            tile[mine.nonzero().flatten(), own[mine]] = torch.inf
        value, index = tile.topk(min(count, tile.shape[1]), dim=1, largest=False, sorted=False)
        best, where = torch.cat([best, value], 1), torch.cat([where, index + column], 1)
    best, order = best.topk(count, dim=1, largest=False, sorted=True)
    return best + a.norms[block, None], where.gather(1, order)


def _own_candidates(points: Points, count: int, block: int) -> tuple[Tensor, Tensor]:
    """``_candidates`` of all rows among the others of the same set: each tile serves both sides."""
    size, device = len(points), points.exact.device
    best = torch.full((size, count), torch.inf, device=device)
    where = torch.zeros(size, count, dtype=torch.int64, device=device)

    def keep(rows: slice, tile: Tensor, first: int) -> None:
        value, index = tile.topk(min(count, tile.shape[1]), dim=1, largest=False, sorted=False)
        both, ids = torch.cat([best[rows], value], 1), torch.cat([where[rows], index + first], 1)
        best[rows], order = both.topk(count, dim=1, largest=False, sorted=True)
        where[rows] = ids.gather(1, order)

    for row, column, tile in tiles(points, points, block, upper=True):
        if row == column:
            tile.fill_diagonal_(torch.inf)
        keep(slice(row, row + len(tile)), tile, column)
        if column > row:
            keep(slice(column, column + tile.shape[1]), tile.T.contiguous(), row)
    return best, where


def _exact_rows(
    a: Points,
    rows: Tensor,
    b: Points,
    candidates: Tensor,
    rough: Tensor,
    k: int,
    slack: float,
    only_last: bool,
) -> tuple[Tensor, Tensor]:
    """The k nearest candidates by exact distance; with ``only_last`` the k-th alone is exact.

    Candidates that are nearer or farther than the k-th by more than the error need no exact
    distance to be told from it, and most need none.
    """
    middle = rough[:, k - 1, None]
    wanted = rough <= middle + 2 * slack
    if only_last:
        wanted &= rough >= middle - 2 * slack
    exact = torch.where(rough < middle, -torch.inf, torch.inf).double()
    row, column = wanted.nonzero(as_tuple=True)
    exact[row, column] = exact_squared(a, rows[row], b, candidates[row, column])
    return exact.topk(k, dim=1, largest=False, sorted=True)


def _brute_force(
    a: Points, rows: Tensor, b: Points, k: int, skip_self: bool
) -> tuple[Tensor, Tensor]:
    """Exact neighbours of a few rows whose candidates cannot be certified (many near ties)."""
    everyone = torch.arange(len(b), device=rows.device).expand(len(rows), -1)
    flat = rows[:, None].expand_as(everyone).reshape(-1)
    exact = exact_squared(a, flat, b, everyone.reshape(-1)).view(everyone.shape)
    if skip_self:
        exact[torch.arange(len(rows), device=rows.device), rows] = torch.inf
    return exact.topk(k, dim=1, largest=False, sorted=True)
