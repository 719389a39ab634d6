"""Kernel distance (KID, Bińkowski et al. 2018): squared MMD with a cubic polynomial kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .moments import check_features


@dataclass(frozen=True)
class Estimate:
    """A value with the standard error (or, for subsets, the spread) that belongs to it."""

    value: float
    stderr: float


def polynomial_kernel(
    a: Tensor, b: Tensor, *, degree: int = 3, gamma: float | None = None, coef: float = 1.0
) -> Tensor:
    """``(gamma <a, b> + coef) ** degree`` of all pairs of rows, (N, M); gamma defaults to 1 / d."""
    gamma = 1.0 / a.shape[1] if gamma is None else gamma
    return (a @ b.T).mul_(gamma).add_(coef).pow_(degree)


def kernel_distance(
    real: Tensor,
    fake: Tensor,
    *,
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    blocks: int = 20,
    chunk: int = 4096,
) -> Estimate:
    """Unbiased squared MMD over *all* samples, with a jackknife standard error.

    The peers average 100 random subsets of 1,000; this is the estimator those averages scatter
    around, and it needs no random numbers. It is unbiased, so it may be slightly negative.

    Args:
        real: shape (N, d), any floating dtype; computed in float64.
        fake: shape (M, d).
        degree: of the polynomial kernel.
        gamma: scale of the inner product; 1 / d by default.
        coef: constant of the kernel.
        blocks: number of blocks that the jackknife leaves out one by one. Rows are dealt to blocks
            in turn, so the error (never the value) depends on the order of rows.
        chunk: rows of a kernel tile; memory is one tile of chunk x chunk float64.

    Returns:
        The value and its standard error (NaN where there are fewer than four rows a side). Where
        both distributions are the same the statistic is degenerate and the error about twice too
        large.

    Raises:
        ValueError: if a side has fewer than two rows, the widths differ, or a value is not finite.
    """
    real, fake = _check_pair(real, fake)
    count = max(1, min(blocks, len(real) // 2, len(fake) // 2))
    kernel = {"degree": degree, "gamma": gamma, "coef": coef}
    pairs = ((real, None), (fake, None), (real, fake))
    tiles = [_block_sums(x, y, count, chunk, kernel) for x, y in pairs]
    sizes = [torch.bincount(torch.arange(len(x)) % count, minlength=count).double().to(real.device)
             for x in (real, fake)]  # fmt: skip
    value = _unbiased(tiles, sizes, None)
    if count < 2:
        return Estimate(value, float("nan"))
    left_out = torch.tensor([_unbiased(tiles, sizes, i) for i in range(count)], dtype=torch.float64)
    spread = (left_out - left_out.mean()).square().sum() * (count - 1) / count
    return Estimate(value, float(spread.sqrt()))


def kernel_distance_subsets(
    real: Tensor,
    fake: Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    convention: str = "torch-fidelity",
) -> Estimate:
    """The mean over random subsets that papers print, with the spread over subsets.

    Args:
        real: shape (N, d); computed in float64.
        fake: shape (M, d).
        subsets: number of subsets.
        subset_size: rows drawn without replacement from each side.
        seed: of a private ``numpy.random.RandomState``; no global state is read or changed.
        convention: whose index stream: "torch-fidelity" draws the fake subset first, "clean-fid"
            (and dgm-eval) the real one; the estimator is the same.

    Returns:
        Mean and population standard deviation over the subsets.

    Raises:
        ValueError: if ``subset_size`` is above either sample count, or the convention is unknown.
    """
    real, fake = _check_pair(real, fake)
    if subset_size > min(len(real), len(fake)) or subset_size < 2:
        raise ValueError(
            f"subset_size must be between 2 and the smaller sample count, got {subset_size} with "
            f"{len(real)} real and {len(fake)} fake samples"
        )
    if convention not in ("torch-fidelity", "clean-fid"):
        raise ValueError(f"convention must be 'torch-fidelity' or 'clean-fid', got {convention!r}")
    random = np.random.RandomState(seed)
    pair = (fake, real) if convention == "torch-fidelity" else (real, fake)
    values = []
    for _ in range(subsets):
        x, y = (
            side[torch.from_numpy(random.choice(len(side), subset_size, replace=False))]
            for side in pair
        )
        values.append(kernel_distance(x, y, blocks=1).value)
    return Estimate(float(np.mean(values)), float(np.std(values)))


def _block_sums(
    x: Tensor, y: Tensor | None, blocks: int, chunk: int, kernel: dict[str, float | int | None]
) -> Tensor:
    """Kernel sums over pairs of blocks, (blocks, blocks); ``y`` None: pairs of different ``x``."""
    member_x = _membership(len(x), blocks, x.device)
    other = x if y is None else y
    member_y = _membership(len(other), blocks, x.device)
    sums = torch.zeros(blocks, blocks, dtype=torch.float64, device=x.device)
    for row in range(0, len(x), chunk):
        rows = slice(row, row + chunk)
        for column in range(row if y is None else 0, len(other), chunk):
            columns = slice(column, column + chunk)
            tile = polynomial_kernel(x[rows], other[columns], **kernel)  # type: ignore[arg-type]
            if y is None and row == column:
                tile.fill_diagonal_(0)
            part = member_x[rows].T @ tile @ member_y[columns]
            sums += part if y is not None or row == column else part + part.T
    return sums


def _membership(count: int, blocks: int, device: torch.device) -> Tensor:
    index = torch.arange(count, device=device) % blocks
    return torch.nn.functional.one_hot(index, blocks).double()


def _unbiased(tiles: list[Tensor], sizes: list[Tensor], left_out: int | None) -> float:
    """Squared MMD from block sums, without block ``left_out``."""
    keep = torch.ones_like(sizes[0])
    if left_out is not None:
        keep[left_out] = 0
    real_real, fake_fake, real_fake = (keep @ tile @ keep for tile in tiles)
    n, m = (size.dot(keep) for size in sizes)
    within = real_real / (n * (n - 1)) + fake_fake / (m * (m - 1))
    return float(within - 2 * real_fake / (n * m))


def _check_pair(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    check_features(real, "real features")
    check_features(fake, "fake features")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"real and fake features have {real.shape[1]} and {fake.shape[1]} columns; "
            "expected the same extractor on both sides"
        )
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"expected at least 2 samples a side, got {len(real)} and {len(fake)}")
    return real.double(), fake.double()
