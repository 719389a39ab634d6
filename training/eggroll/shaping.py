"""From scores to the weights of an update: centred, scaled, antithetic; failures count as zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SHAPINGS", "Shaped", "shape_fitness"]

SHAPINGS = ("zscore", "ranks", "sign_pairs", "none")
_NOTHING = 1e-8  # of the largest score: below this, differences are rounding


@dataclass(frozen=True, eq=False)
class Shaped:
    """What an update needs to know of a population.

    Attributes:
        values: the weight of each member, (N,), float64 on the CPU.
        count: members with a usable score; the update divides by its root.
        deviation: of the centred scores, before any scaling; 0 where they do not differ.
    """

    values: Tensor
    count: int
    deviation: float


def shape_fitness(
    scores: Tensor,
    *,
    method: str = "zscore",
    antithetic: bool = True,
    group_size: int | None = None,
    baseline: Tensor | None = None,
) -> Shaped:
    """Weights of the members from their scores (more is better).

    Scores are centred at each prompt (over the members, or by ``baseline``), scaled, and averaged
    over prompts. Not a number means "no score": with pairs, both members then count as zero at
    that prompt. Scores that do not differ give zeros, so that the step is skipped.

    Args:
        scores: (N,) or (N, Q), one row a member and one column a prompt.
        method: "zscore": divided by one deviation, that of all centred scores (population, ddof 0;
            Eggroll section 6.3 divides by that of the raw scores, which differences between
            prompts inflate). "ranks": ranks at each prompt, from -1/2 (worst) to 1/2, ties shared;
            the deviation of the weights is then 0.29 and not 1. "sign_pairs": which of a pair is
            better over all prompts, +1 and -1. "none": centred only.
        antithetic: rows 2p and 2p + 1 are a pair.
        group_size: members that are compared with each other, if not all: each contiguous group
            had prompts of its own.
        baseline: (Q,) scores of the mean parameters, to centre by instead of the members' mean.

    Raises:
        ValueError: the shape does not fit, N is odd with pairs, a group splits a pair, a score is
            infinite, or the method is unknown or does not go with the other arguments.
    """
    table = _as_table(scores)
    members = table.shape[0]
    size = members if group_size is None else group_size
    _check(table, method, antithetic, size, baseline)
    valid = ~table.isnan()
    if antithetic:
        valid = valid.view(-1, 2, table.shape[1]).all(1).repeat_interleave(2, 0)
    values = table.where(valid, 0.0)
    grouped, seen = values.view(-1, size, table.shape[1]), valid.view(-1, size, table.shape[1])
    if baseline is None:
        middle = grouped.sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)
    else:
        middle = baseline.to(table).view(1, 1, -1)
    centred = ((grouped - middle) * seen).view_as(table)
    count = int(valid.any(1).sum())
    # With a baseline the centred scores have a mean; a deviation is about the mean.
    total = valid.sum().clamp(min=1)
    spread = centred - centred.sum() / total * valid
    deviation = float((spread.square().sum() / total).sqrt())
    if deviation <= _NOTHING * float(values.abs().max()):
        return Shaped(torch.zeros(members, dtype=torch.float64), count, 0.0)
    return Shaped(_weights(centred, valid, method, deviation, size), count, deviation)


def _weights(centred: Tensor, valid: Tensor, method: str, deviation: float, size: int) -> Tensor:
    if method == "zscore":
        return centred.mean(1) / deviation
    if method == "ranks":
        shape = (-1, size, centred.shape[1])
        return _centred_ranks(centred.view(shape), valid.view(shape)).view_as(centred).mean(1)
    if method == "sign_pairs":
        pairs = centred.mean(1).view(-1, 2)
        sign = (pairs[:, 0] - pairs[:, 1]).sign()
        return torch.stack([sign, -sign], 1).flatten()
    return centred.mean(1)


def _centred_ranks(values: Tensor, valid: Tensor) -> Tensor:
    """Ranks along dimension 1 in [-1/2, 1/2], the best 1/2; ties get their mean rank, (G, S, Q)."""
    across = values.transpose(1, 2)
    seen = valid.transpose(1, 2)
    mine, other = across[..., :, None], across[..., None, :]
    counted = seen[..., None, :]
    below = ((other < mine) & counted).sum(-1)
    equal = ((other == mine) & counted).sum(-1)
    rank = below.double() + (equal - 1) / 2
    last = (seen.sum(-1, keepdim=True) - 1).clamp(min=1)
    return ((rank / last - 0.5) * seen).transpose(1, 2)


def _as_table(scores: Tensor) -> Tensor:
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a tensor, got {type(scores).__name__}")
    table = scores.detach().to("cpu", torch.float64)
    if table.dim() == 1:
        table = table[:, None]
    if table.dim() != 2 or table.numel() == 0:
        raise ValueError(
            f"scores must have shape (members,) or (members, prompts), got {tuple(scores.shape)}"
        )
    return table


def _check(
    table: Tensor, method: str, antithetic: bool, size: int, baseline: Tensor | None
) -> None:
    members, prompts = table.shape
    if method not in SHAPINGS:
        raise ValueError(f"fitness shaping must be one of {', '.join(SHAPINGS)}, got {method!r}")
    if antithetic and members % 2:
        raise ValueError(f"with antithetic pairs the population must be even, got {members} scores")
    if size < 1 or members % size:
        raise ValueError(f"group_size must divide the {members} members, got {size}")
    if antithetic and size % 2:
        raise ValueError(f"group_size {size} splits a pair: with antithetic pairs it must be even")
    if method == "sign_pairs" and not antithetic:
        raise ValueError("sign_pairs compares the members of pairs: it needs antithetic=True")
    if baseline is not None and (baseline.shape != (prompts,) or size != members):
        raise ValueError(
            f"baseline must be one score for each of {prompts} prompts, with all members in one "
            f"group; got shape {tuple(baseline.shape)} and groups of {size}"
        )
    if baseline is not None and not baseline.isfinite().all():
        raise ValueError(
            "a score of the baseline member is not finite: without it nothing can be "
            "centred; centre by the members' mean (baseline=None)"
        )
    if table.isinf().any():
        row = int(table.isinf().any(1).nonzero()[0])
        raise ValueError(
            f"the score of member {row} is infinite; give NaN for a member that failed, which then "
            "counts as zero"
        )
