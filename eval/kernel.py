"""Kernel distance (KID, Bińkowski et al. 2018): squared MMD with a cubic polynomial kernel."""

from __future__ import annotations

from collections.abc import Iterator
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
        seed: of a private generator; no global state is read or changed.
        convention: whose index stream; the estimator is the same. "torch-fidelity" (fake subset
            first) and "clean-fid" (and dgm-eval: real first) draw by
            ``numpy.random.RandomState.choice``, "torchmetrics" by ``torch.randperm``, real first;
            "k-diffusion" draws nothing: ``subset_size`` is the size at most of contiguous blocks.

    Returns:
        Mean and population standard deviation over the subsets.

    Raises:
        ValueError: if ``subset_size`` is above either sample count, or the convention is unknown.
    """
    real, fake = _check_pair(real, fake)
    if subset_size < 2 or (convention != "k-diffusion" and subset_size > min(len(real), len(fake))):
        raise ValueError(
            f"subset_size must be between 2 and the smaller sample count, got {subset_size} with "
            f"{len(real)} real and {len(fake)} fake samples"
        )
    if convention not in ("torch-fidelity", "clean-fid", "torchmetrics", "k-diffusion"):
        raise ValueError(
            "convention must be 'torch-fidelity', 'clean-fid', 'torchmetrics' or 'k-diffusion', "
            f"got {convention!r}"
        )
    values = [
        kernel_distance(real[rows], fake[others], blocks=1).value
        for rows, others in _subsets(len(real), len(fake), subsets, subset_size, seed, convention)
    ]
    return Estimate(float(np.mean(values)), float(np.std(values)))


def _subsets(
    n: int, m: int, subsets: int, size: int, seed: int, convention: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices of the real and of the fake subset, one pair after the other."""
    if convention == "k-diffusion":
        parts = -(-max(n, m) // size)
        for i in range(parts):
            yield (
                torch.arange(round(i * n / parts), round((i + 1) * n / parts)),
                torch.arange(round(i * m / parts), round((i + 1) * m / parts)),
            )
        return
    if convention == "torchmetrics":
        permuting = torch.Generator().manual_seed(seed)
        for _ in range(subsets):
            rows = torch.randperm(n, generator=permuting)[:size]
            yield rows, torch.randperm(m, generator=permuting)[:size]
        return
    random = np.random.RandomState(seed)
    order = (m, n) if convention == "torch-fidelity" else (n, m)
    for _ in range(subsets):
        first, second = (
            torch.from_numpy(random.choice(count, size, replace=False)) for count in order
        )
        yield (second, first) if convention == "torch-fidelity" else (first, second)


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
