"""Reward shaping: from raw rewards to targets of unit size that a critic can learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["SHAPINGS", "RewardShaper", "RunningMoments", "combine", "shape_rewards"]

SHAPINGS = ("prompt", "running", "minmax", "none")
EPSILON = 1e-4  # what Flow-GRPO adds to the deviation


@dataclass(frozen=True)
class RunningMoments:
    """Mean and deviation of a stream of batches, exponentially averaged and bias-corrected.

    Attributes:
        momentum: in [0, 1), how much of the past an update keeps.
        first: the average of the means, not yet corrected.
        second: the average of the mean squares, not yet corrected.
        updates: batches seen.
    """

    momentum: float = 0.9
    first: float = 0.0
    second: float = 0.0
    updates: int = 0

    def update(self, values: Tensor) -> RunningMoments:
        """The moments after ``values`` (N,); NaN and empty batches count for nothing."""
        kept = values[~values.isnan()].double()
        if not len(kept):
            return self
        share = 1 - self.momentum
        return RunningMoments(
            self.momentum,
            self.momentum * self.first + share * float(kept.mean()),
            self.momentum * self.second + share * float(kept.square().mean()),
            self.updates + 1,
        )

    @property
    def mean(self) -> float:
        """The corrected mean; 0 before the first update."""
        return self.first / self._total if self.updates else 0.0

    @property
    def std(self) -> float:
        """The corrected deviation; 1 before the first update."""
        if not self.updates:
            return 1.0
        return max(0.0, self.second / self._total - self.mean**2) ** 0.5

    @property
    def _total(self) -> float:
        return 1 - self.momentum**self.updates


def shape_rewards(
    rewards: Tensor,
    groups: Tensor,
    *,
    mode: str = "prompt",
    limit: float = 5.0,
    moments: RunningMoments | None = None,
) -> Tensor:
    """Shaped rewards ``z``, (N,) float64; NaN stays NaN.

    Reconstruction (AC-Flow's own shaping is not public). The modes:
        ``"prompt"``: ``(R - mean of the prompt) / (deviation of all + 1e-4)``, as Flow-GRPO, with
            the deviation about the mean of all rewards. With one image a prompt it would be zero
            everywhere, and the mean of all is subtracted instead.
        ``"running"``: ``(R - mean) / (deviation + 1e-4)`` with the moments of a stream.
        ``"minmax"``: ``(R - min) / (max - min)``; 0 where all are equal.
        ``"none"``: the rewards as they are, neither centred nor clipped.

    Args:
        rewards: raw rewards of the whole batch, on all ranks, (N,).
        groups: integer, the prompt of each, (N,).
        mode: see above.
        limit: largest size of a result of "prompt" and "running".
        moments: for "running", with this batch already in them.

    Raises:
        ValueError: the mode is unknown, or "running" has no moments.
    """
    values = rewards.detach().double()
    kept = values[~values.isnan()]
    if mode == "none" or not len(kept):
        return values
    if mode == "minmax":
        low, high = kept.min(), kept.max()
        return (values - low) / (high - low) if high > low else values - low
    if mode == "prompt":
        several = len(kept) > len(groups[~values.isnan()].unique())
        centre: Tensor | float = _group_means(values, groups) if several else float(kept.mean())
        spread = float(kept.std(unbiased=False))
    elif mode == "running":
        if moments is None:
            raise ValueError("mode 'running' needs the moments of the stream")
        centre, spread = moments.mean, moments.std
    else:
        raise ValueError(f"mode must be one of {', '.join(SHAPINGS)}, got {mode!r}")
    return ((values - centre) / (spread + EPSILON)).clamp(-limit, limit)


def _group_means(values: Tensor, groups: Tensor) -> Tensor:
    """The mean of each value's group without the NaN ones, (N,)."""
    member = groups.unique(return_inverse=True)[1]
    valid = ~values.isnan()
    count = torch.zeros(int(member.max()) + 1, dtype=torch.float64)
    sums = count.clone().index_add_(0, member[valid], values[valid])
    count = count.index_add_(0, member[valid], torch.ones_like(values[valid]))
    return (sums / count.clamp(min=1))[member]


def combine(shaped: Mapping[str, Tensor], weights: Mapping[str, float], *, unit: bool) -> Tensor:
    """The weighted mean of several shaped rewards, (N,); NaN only where every one is.

    Weights count by their share of the sum of their sizes, so a single reward keeps its scale (and
    a negative weight turns its sign).

    Args:
        shaped: by name, (N,) each; NaN is "not applicable".
        weights: by name.
        unit: bring the result back to unit deviation where there are several rewards.
    """
    stack = torch.stack([shaped[name] for name in shaped])
    weight = torch.tensor([weights[name] for name in shaped], dtype=torch.float64)[:, None]
    known = ~stack.isnan()
    total = (weight.abs() * known).sum(0)
    mean = (weight * stack.nan_to_num()).sum(0) / total
    mean = torch.where(total > 0, mean, torch.nan)
    if not unit or len(shaped) == 1:
        return mean
    spread = mean[~mean.isnan()].std(unbiased=False) if bool((total > 0).any()) else torch.ones(())
    return mean / (spread + EPSILON)


@dataclass
class RewardShaper:
    """Shapes each reward on its own, then combines them; holds the moments of mode "running".

    The statistics are updated once a batch and then frozen for it, so the critic and the actor see
    the same targets.

    Args:
        mode: see `shape_rewards`.
        limit: largest size of a shaped reward.
        momentum: of the running moments.
    """

    mode: str = "prompt"
    limit: float = 5.0
    momentum: float = 0.9
    moments: dict[str, RunningMoments] = field(default_factory=dict)

    def __call__(
        self, rewards: Mapping[str, Tensor], weights: Mapping[str, float], groups: Tensor
    ) -> Tensor:
        """Shaped rewards (N,), float64, of raw ones by name over the whole batch."""
        shaped = {}
        for name, values in rewards.items():
            before = self.moments.get(name, RunningMoments(self.momentum))
            self.moments[name] = before.update(values)
            shaped[name] = shape_rewards(
                values,
                groups,
                mode=self.mode,
                limit=self.limit,
                moments=self.moments[name],
            )
        unit = self.mode in ("prompt", "running")
        total = combine(shaped, weights, unit=unit)
        return total.clamp(-self.limit, self.limit) if unit else total

    def state_dict(self) -> dict[str, Any]:
        """The running moments by reward."""
        return {name: [m.first, m.second, m.updates] for name, m in self.moments.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over saved moments."""
        self.moments = {name: RunningMoments(self.momentum, *row) for name, row in state.items()}
