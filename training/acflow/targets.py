"""From the scores of an epoch to what actor and critic learn from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rewards import RewardScores
from .shaping import RewardShaper

__all__ = ["Targets", "constant_groups", "make_targets"]


@dataclass(frozen=True)
class Targets:
    """What is learnt from in an epoch, over all ranks, in the order of the plan.

    Attributes:
        shaped: the shaped rewards, (S,) float32; NaN where there is no reward.
        weighed: the same with NaN also where the actor shall not follow the reward.
        groups: the prompt of each, (S,).
    """

    shaped: Tensor
    weighed: Tensor
    groups: Tensor


def make_targets(
    scores: RewardScores,
    groups: Tensor,
    shaper: RewardShaper,
    *,
    drop_constant: bool,
    device: torch.device,
) -> Targets:
    """Shape the scores of all ranks; samples without a score stay out of both losses.

    Args:
        scores: in the order of the plan, (S,).
        groups: the prompt of each, (S,).
        shaper: its moments are updated.
        drop_constant: prompts whose samples score alike say nothing; their samples would weigh 1
            and train the model on itself, so the actor does not follow their reward (the
            Wasserstein-2 term stays).
        device: of the result.

    Raises:
        RewardError: no sample has a score.
    """
    scores.require_some()
    shaped = shaper(scores.values, scores.weights, groups)
    broken = scores.total.isnan()
    shaped = shaped.masked_fill(broken, torch.nan)
    weighed = shaped
    if drop_constant:
        weighed = shaped.masked_fill(constant_groups(scores.total, groups), torch.nan)
    return Targets(shaped.float().to(device), weighed.float().to(device), groups.to(device))


def constant_groups(rewards: Tensor, groups: Tensor) -> Tensor:
    """Which samples belong to a prompt of several whose known rewards are all equal, (S,)."""
    constant = torch.zeros(len(rewards), dtype=torch.bool)
    for group in groups.unique():
        here = groups == group
        known = rewards[here & ~rewards.isnan()]
        constant |= here & bool(len(known) > 1 and known.min() == known.max())
    return constant
