"""Scores of single samples: how real each looks, and whether it copies a real one."""

from __future__ import annotations

import torch
from torch import Tensor

from .gather import Share
from .neighbours import exact_squared, nearest, pair_up, radii_squared


def realism(
    real: Tensor, fake: Tensor, k: int = 3, *, chunk: int = 1024, share: Share | None = None
) -> Tensor:
    """Realism of each fake sample (Kynkäänniemi et al. 2019, eq. 3), shape (M,), float64.

    The largest ratio of a real sample's k-NN radius to its distance from the fake sample, over the
    real samples whose radius is at most the median. Above 1 the sample lies in such a ball.

    Args:
        real: shape (N, d).
        fake: shape (M, d).
        k: the neighbour that sets the radius.
        chunk: fake samples at a time.
        share: the part of the rows that this rank does (see ``prdc``).

    Raises:
        ValueError: if there are not more than ``k`` real samples, or a value is not finite.
    """
    points, _ = pair_up(real, fake)
    share = share or Share()
    radius = radii_squared(points, k, chunk=chunk, share=share).sqrt()
    # The lower of two middle values would drop one ball more: the paper's code takes their mean.
    kept = (radius <= torch.quantile(radius, 0.5)).nonzero().flatten()
    dense, others = pair_up(points.exact[kept], fake)
    best = torch.zeros(len(fake), dtype=torch.float64, device=radius.device)
    mine = share.rows(len(fake))
    for start in mine[::chunk]:
        block = others.exact[start : min(start + chunk, mine.stop)].double()
        distance = torch.cdist(block, dense.exact.double(), compute_mode="use_mm_for_euclid_dist")
        # The product finds the ball, the exact distance gives the number.
        winner = (radius[kept] / distance.clamp_min(1e-12)).argmax(1)
        rows = torch.arange(start, start + len(block), device=radius.device)
        gap = exact_squared(others, rows, dense, winner).sqrt()
        best[rows] = radius[kept][winner] / gap
    return share.total(best)


def authentic(
    real: Tensor, fake: Tensor, *, chunk: int = 1024, share: Share | None = None
) -> Tensor:
    """Whether each fake sample is no copy (Alaa et al. 2022), shape (M,), bool.

    A sample counts as a copy where it lies closer to its nearest real sample than that one lies to
    its own nearest neighbour. AuthPct is 100 times the mean.

    Args:
        real: shape (N, d), the training data.
        fake: shape (M, d).
        chunk: rows at a time.
        share: the part of the rows that this rank does (see ``prdc``).

    Raises:
        ValueError: if there are fewer than two real samples, or a value is not finite.
    """
    points_real, points_fake = pair_up(real, fake)
    spacing = radii_squared(points_real, 1, chunk=chunk, share=share)
    distance, index = nearest(points_fake, points_real, 1, chunk=chunk, share=share)
    return distance[:, 0] > spacing[index[:, 0]]
