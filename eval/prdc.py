"""Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

All four in one pass over the real-fake distances, in bounded memory, with the integer counts of
exact arithmetic (see ``neighbours``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gather import Share
from .neighbours import Points, exact_squared, pair_up, radii_squared, tiles, tolerance


@dataclass(frozen=True)
class PRDC:
    """The four scores in [0, 1] (density may exceed 1) and what they were computed from.

    Precision and density are means over the fake samples; their standard errors are those of these
    means, for the real samples as they are. Recall and coverage depend on the fake samples as a
    whole: ``half_samples`` gives errors of these.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    k: int
    strict: bool
    n_real: int
    n_fake: int
    precision_stderr: float
    density_stderr: float

    @classmethod
    def of_counts(
        cls, balls: Tensor, covered: Tensor, recalled: Tensor, k: int, *, strict: bool
    ) -> PRDC:
        """The scores of finished counts.

        Args:
            balls: shape (M,), integer, the real balls that each fake sample lies in.
            covered: shape (N,), bool, the real samples whose ball holds a fake sample.
            recalled: shape (N,), bool, the real samples in a fake ball.
            k: the neighbour.
            strict: whether balls excluded their surface.
        """
        precision, precision_stderr = _mean_and_error((balls > 0).long())
        _, density_stderr = _mean_and_error(balls)
        n_real, n_fake = len(recalled), len(balls)
        recall, coverage = float(recalled.sum()) / n_real, float(covered.sum()) / n_real
        return cls(
            precision, recall, int(balls.sum()) / (k * n_fake), coverage, k, strict, n_real,
            n_fake, precision_stderr, density_stderr / k,
        )  # fmt: skip


def _mean_and_error(counts: Tensor) -> tuple[float, float]:
    """Mean and its standard error from whole numbers, so that no order of rows changes a digit."""
    n, total, squares = len(counts), int(counts.sum()), int(counts.square().sum())
    return total / n, ((n * squares - total**2) / (n - 1)) ** 0.5 / n


def prdc(
    real: Tensor,
    fake: Tensor,
    k: int = 3,
    *,
    strict: bool = False,
    chunk: int = 1024,
    centre: bool = True,
    share: Share | None = None,
) -> PRDC:
    """Precision, recall, density and coverage of ``fake`` against ``real``.

    A ball around each sample reaches to its k-th nearest other sample of the same set. Precision is
    the share of fake samples in any real ball, recall the share of real samples in any fake ball,
    density the mean number of real balls around a fake sample divided by k, coverage the share of
    real balls that hold a fake sample.

    Args:
        real: shape (N, d), any floating dtype.
        fake: shape (M, d).
        k: the neighbour; 3 in the precision/recall papers, 5 in the density/coverage paper.
        strict: whether a ball excludes its surface: ``<`` (prdc, dgm-eval) instead of ``<=`` (the
            paper, ADM, torch-fidelity). It matters only where samples repeat.
        chunk: rows and columns of a tile; changes speed and memory, never a count.
        centre: subtract the real mean from the float32 copies first. Distances do not change.
        share: the part of the rows that this rank does, where all ranks hold the same features and
            call this together; each gets the whole result, which no number of ranks changes.

    Raises:
        ValueError: if a side has not more than ``k`` samples, the widths differ, or a value is not
            finite.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    for name, side in (("real", real), ("fake", fake)):
        if side.ndim == 2 and len(side) <= k:
            raise ValueError(
                f"precision and recall with k = {k} need more than {k} samples a side, got "
                f"{len(side)} {name} samples; use more samples or a smaller k"
            )
    points_real, points_fake = pair_up(real, fake, centre=centre)
    share = share or Share()
    radius_real = radii_squared(points_real, k, chunk=chunk, share=share)
    radius_fake = radii_squared(points_fake, k, chunk=chunk, share=share)
    balls, covered, recalled = _count(
        points_real, points_fake, radius_real, radius_fake, strict, chunk, share
    )
    return PRDC.of_counts(balls, covered, recalled, k, strict=strict)


def _count(
    real: Points,
    fake: Points,
    radius_real: Tensor,
    radius_fake: Tensor,
    strict: bool,
    chunk: int,
    share: Share,
) -> tuple[Tensor, Tensor, Tensor]:
    """Real balls around each fake; real balls that hold a fake; reals that lie in a fake ball."""
    device = real.exact.device
    balls = torch.zeros(len(fake), dtype=torch.int64, device=device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=device)
    rough_real, rough_fake = radius_real.float(), radius_fake.float()
    # Casting a radius to float32 adds half a unit in its last place.
    slack = tolerance(real, fake) * 1.01
    for row, column, tile in tiles(fake, real, chunk, share.rows(len(fake))):
        rows, columns = slice(row, row + len(tile)), slice(column, column + tile.shape[1])
        near_fake = tile - rough_fake[rows, None]
        near_real = tile.sub_(rough_real[columns])
        in_real, in_fake = near_real < 0, near_fake < 0
        doubtful = (near_real.abs_() <= slack).logical_or_(near_fake.abs_() <= slack)
        if bool(doubtful.any()):
            i, j = doubtful.nonzero(as_tuple=True)
            exact = exact_squared(fake, i + row, real, j + column)
            in_real[i, j] = _inside(exact, radius_real[j + column], strict)
            in_fake[i, j] = _inside(exact, radius_fake[i + row], strict)
        balls[rows] += in_real.sum(1)
        covered[columns] |= in_real.any(0)
        recalled[columns] |= in_fake.any(0)
    return share.total(balls), share.anywhere(covered), share.anywhere(recalled)


def _inside(distance: Tensor, radius: Tensor, strict: bool) -> Tensor:
    return distance < radius if strict else distance <= radius
