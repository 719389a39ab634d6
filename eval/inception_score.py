"""Inception Score (Salimans et al. 2016): exp of the mean divergence of class predictions."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .kernel import Estimate
from .moments import check_features

Remainder = Literal["spread", "drop", "short"]


def split_ids(
    count: int,
    *,
    splits: int = 10,
    split_size: int | None = None,
    seed: int | None = 2020,
    remainder: Remainder = "spread",
) -> Tensor:
    """Which split each of ``count`` samples belongs to, shape (count,) int64; -1 is left out.

    Args:
        count: number of samples, N.
        splits: number of splits; ignored where ``split_size`` is given.
        split_size: samples a split, as ADM's evaluator counts (5,000).
        seed: of the shuffle, a private ``numpy.random.RandomState``; None keeps the order.
        remainder: where ``splits`` does not divide N: "spread" it over the splits (torch-fidelity),
            "drop" it (dgm-eval), or keep a last "short" split (ADM; the rule for ``split_size``).

    Raises:
        ValueError: if there are fewer samples than splits.
    """
    if split_size is not None:
        splits, remainder = -(-count // split_size), "short"
    if splits < 1 or splits > count:
        raise ValueError(f"splits must be between 1 and the sample count {count}, got {splits}")
    rank = np.arange(count)
    if remainder == "spread":
        bounds = np.arange(splits + 1) * count // splits
        by_rank = np.searchsorted(bounds, rank, side="right") - 1
    else:
        by_rank = rank // (split_size or count // splits)
        by_rank[by_rank >= splits] = -1 if remainder == "drop" else splits
    if seed is None:
        return torch.from_numpy(by_rank)
    ids = np.empty(count, dtype=np.int64)
    ids[np.random.RandomState(seed).permutation(count)] = by_rank
    return torch.from_numpy(ids)


def inception_score(
    logits: Tensor,
    *,
    splits: int = 10,
    split_size: int | None = None,
    seed: int | None = 2020,
    remainder: Remainder = "spread",
    from_probabilities: bool = False,
) -> Estimate:
    """Inception Score: mean and population standard deviation over splits.

    Args:
        logits: shape (N, classes), any floating dtype; computed in float64. Which logits is part of
            the protocol: FID's Inception is read without its bias.
        splits: see ``split_ids``; the defaults give torch-fidelity's numbers.
        split_size: see ``split_ids``.
        seed: see ``split_ids``. Without a shuffle, samples saved by class score 1.
        remainder: see ``split_ids``.
        from_probabilities: rows are probabilities already; zeros are allowed.

    Raises:
        ValueError: if values are not finite, or there are fewer samples than splits.
    """
    check_features(logits, "logits")
    ids = split_ids(
        len(logits), splits=splits, split_size=split_size, seed=seed, remainder=remainder
    ).to(logits.device)
    wide = logits.to(torch.float64)
    probs = wide if from_probabilities else wide.softmax(1)
    scores = [_score(probs[ids == i]) for i in range(int(ids.max()) + 1)]
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


def _score(probs: Tensor) -> float:
    marginal = probs.mean(0)
    # xlogy: a hard one-hot has p log p = 0, where p * log(p) would be NaN.
    entropy_gap = torch.special.xlogy(probs, probs).sum(1).mean()
    return float((entropy_gap - torch.special.xlogy(marginal, marginal).sum()).exp())
