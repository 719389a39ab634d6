"""Precision and recall as ADM's evaluator prints them: with its float16 distances."""

from __future__ import annotations

import torch
from torch import Tensor

from .neighbours import pair_up
from .prdc import PRDC


def prdc_adm_float16(real: Tensor, fake: Tensor, k: int = 3, *, chunk: int = 2048) -> PRDC:
    """Precision, recall, density and coverage from squared distances rounded as ADM rounds them.

    ADM casts features to float16, takes ``|u|² - 2 u·v + |v|²`` there, and falls back to float32
    for a block whose distances overflow. That moves recall by some 0.002; use it to compare with
    numbers that ADM's script printed, and ``prdc`` for everything else. A reconstruction of the
    TensorFlow graph (Dhariwal & Nichol 2021, evaluations/evaluator.py): products are accumulated in
    float32 and rounded, which TensorFlow leaves to the hardware; ADM's blocks are of 10,000 rows,
    so a fallback reaches other pairs there.

    Args:
        real: shape (N, d).
        fake: shape (M, d).
        k: the neighbour.
        chunk: rows of a block.

    Raises:
        ValueError: if a side has not more than ``k`` samples, the widths differ, or a value is not
            finite.
    """
    pair_up(real, fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(
            f"precision and recall with k = {k} need more than {k} samples a side, got "
            f"{len(real)} real and {len(fake)} generated samples; use more samples or a smaller k"
        )
    radius_real, radius_fake = (_radii(rows, k, chunk) for rows in (real, fake))
    balls = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=fake.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=fake.device)
    for row in range(0, len(fake), chunk):
        rows = slice(row, row + chunk)
        for column in range(0, len(real), chunk):
            columns = slice(column, column + chunk)
            tile = adm_squared_distances(fake[rows], real[columns])
            in_real = tile <= radius_real[columns]
            balls[rows] += in_real.sum(1)
            covered[columns] |= in_real.any(0)
            recalled[columns] |= (tile <= radius_fake[rows, None]).any(0)
    return PRDC.of_counts(balls, covered, recalled, k, strict=False)


def adm_squared_distances(u: Tensor, v: Tensor) -> Tensor:
    """Squared distances of all pairs of rows, (N, M), float32, rounded to float16 on the way."""
    found = _distances(u, v, torch.float16)
    return found if bool(torch.isfinite(found).all()) else _distances(u, v, torch.float32)


def _distances(u: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    u, v = u.to(dtype), v.to(dtype)
    norm_u, norm_v = (x.square().float().sum(1).to(dtype) for x in (u, v))
    product = (u.float() @ v.float().T).to(dtype)
    return (norm_u[:, None] - 2 * product + norm_v).clamp_min(0).float()


def _radii(rows: Tensor, k: int, chunk: int) -> Tensor:
    """Squared distance to the k-th nearest other row; a row's distance to itself counts as one."""
    radii = torch.empty(len(rows), device=rows.device)
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        tiles = [adm_squared_distances(part, rows[c : c + chunk])
                 for c in range(0, len(rows), chunk)]  # fmt: skip
        radii[start : start + chunk] = torch.cat(tiles, 1).kthvalue(k + 1, dim=1).values
    return radii
