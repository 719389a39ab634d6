"""The scores of a batch under several rewards, with what failed counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .protocol import RewardError

__all__ = ["RewardScores"]


@dataclass(frozen=True)
class RewardScores:
    """Scores by reward.

    Args:
        values: (B,) float32 on the CPU for each reward; NaN where it does not apply or failed.
        failed: (B,) bool for each reward: it raised, or gave no finite number.
        weights: of each reward in the total.
        errors: the last error of each reward that raised.
    """

    values: Mapping[str, Tensor]
    failed: Mapping[str, Tensor]
    weights: Mapping[str, float]
    errors: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    @property
    def total(self) -> Tensor:
        """The weighted sum, (B,) float32.

        A reward that does not apply to an image is left out there. The total is NaN where a reward
        failed, as the sum of the others would be no fair comparison, and where none applies.
        """
        values = torch.stack(list(self.values.values())).double()
        weights = torch.tensor(list(self.weights.values()), dtype=torch.float64)
        total = (values * weights[:, None]).nansum(0)
        broken = torch.stack(list(self.failed.values())).any(0) | values.isnan().all(0)
        return total.masked_fill(broken, float("nan")).float()

    @property
    def failures(self) -> dict[str, int]:
        """How many images each reward failed on."""
        return {name: int(flags.sum()) for name, flags in self.failed.items()}

    def require_some(self) -> RewardScores:
        """These scores, if at least one image has a total.

        Raises:
            RewardError: no image has one; the message says why for each reward.
        """
        if self.total.isnan().all():
            raise RewardError(f"no image got a score: {'; '.join(map(self._why, self.values))}")
        return self

    def summary(self) -> dict[str, float]:
        """Mean, standard deviation and number of failures of each reward, for logs."""
        entries = {f"reward/{name}": value for name, value in self.values.items()}
        if len(self.values) > 1:
            entries["reward/total"] = self.total
        result: dict[str, float] = {}
        for name, value in entries.items():
            known = value[~value.isnan()].double()
            if len(known):
                result[name] = float(known.mean())
                result[f"{name}_std"] = float(known.std(correction=0))
        return result | {f"reward/{n}_failed": float(k) for n, k in self.failures.items() if k}

    @staticmethod
    def cat(parts: Sequence[RewardScores]) -> RewardScores:
        """The scores of several batches in a row.

        Raises:
            ValueError: there is none, or they are of different rewards.
        """
        if not parts or any(part.weights != parts[0].weights for part in parts):
            raise ValueError("expected the scores of at least one batch, all of the same rewards")
        names = list(parts[0].values)
        errors: dict[str, str] = {}
        for part in parts:
            errors |= part.errors
        return RewardScores(
            {name: torch.cat([part.values[name] for part in parts]) for name in names},
            {name: torch.cat([part.failed[name] for part in parts]) for name in names},
            parts[0].weights,
            errors,
        )

    def _why(self, name: str) -> str:
        failures = self.failures[name]
        if not failures:
            return f"{name} applies to none of the {len(self)} images (it gave None)"
        reason = self.errors.get(name, "it gave NaN or infinity")
        return f"{name} failed on {failures} of {len(self)} images: {reason}"
