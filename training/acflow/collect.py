"""An epoch's samples and their scores: one batch is scored while the next one is sampled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..prompts import Prompt
from ..rewards import RewardPool, RewardScores
from .observer import Replace
from .plan import Plan
from .sampling import Rollouts, Sampler

__all__ = ["Collected", "collect", "everyones_scores"]


@dataclass
class Collected:
    """What one rank sampled.

    Attributes:
        data: the samples.
        scores: theirs.
        sampled: start and end of each batch's sampling, in seconds since the epoch began.
        scored: the same for scoring: from the hand-over to the result.
    """

    data: Rollouts
    scores: RewardScores
    sampled: list[tuple[float, float]] = field(default_factory=list)
    scored: list[tuple[float, float]] = field(default_factory=list)


def collect(
    sampler: Sampler,
    pool: RewardPool,
    prompts: Sequence[Prompt],
    plan: Plan,
    mine: Sequence[int],
    *,
    steps: int,
    batch: int,
    replace: Callable[[Sequence[int]], Replace | None] = lambda seeds: None,
) -> Collected:
    """Sample and score the positions ``mine`` of ``plan``.

    Args:
        sampler: draws, with the weights as they are.
        pool: scores in the background.
        prompts: that the plan's numbers mean.
        plan: of the epoch.
        mine: positions, in the order in which they are trained on.
        steps: solver steps.
        batch: samples drawn at once.
        replace: from the seeds of a batch to what `Observer` takes.

    Raises:
        RewardError: a reward gives the wrong number of scores, or no numbers.
    """
    began, runs, futures = time.monotonic(), [], []
    sampled: list[tuple[float, float]] = []
    scored: list[tuple[float, float]] = []
    for start in range(0, len(mine), batch):
        rows = mine[start : start + batch]
        chosen = [prompts[plan.prompts[row]] for row in rows]
        seeds = [plan.seeds[row] for row in rows]
        at = time.monotonic() - began
        images, observed = sampler(chosen, seeds, steps=steps, replace=replace(seeds))
        over = time.monotonic() - began
        sampled.append((at, over))
        runs.append(observed)
        texts, metadata = [p.text for p in chosen], [p.metadata for p in chosen]
        future = pool.submit(images, texts, metadata)
        future.add_done_callback(
            lambda _, over=over: scored.append((over, time.monotonic() - began))  # type: ignore[misc]
        )
        futures.append(future)
    scores = RewardScores.cat([future.result() for future in futures])
    if sampler.model is None:
        raise RuntimeError("the sampler must have learnt the model first: Sampler.learn")
    return Collected(Rollouts.of(runs, sampler.model.timestep), scores, sampled, scored)


def everyones_scores(
    scores: RewardScores, plan: Plan, *, updates: int, accelerator: Any
) -> RewardScores:
    """The scores of all ranks in the order of the plan, the same on every rank.

    Args:
        scores: of this rank.
        plan: of the epoch.
        updates: of an epoch.
        accelerator: accelerate's.
    """
    ranks = accelerator.num_processes
    order = [p for rank in range(ranks) for p in plan.mine(rank, ranks, updates)]
    place = torch.tensor(order)

    def gathered(values: Tensor) -> Tensor:
        everyone = accelerator.gather(values.to(accelerator.device)).cpu()
        return torch.empty_like(everyone).index_copy_(0, place, everyone)

    values = {name: gathered(value) for name, value in scores.values.items()}
    failed = {name: gathered(flags.float()) > 0 for name, flags in scores.failed.items()}
    return RewardScores(values, failed, scores.weights, scores.errors)
