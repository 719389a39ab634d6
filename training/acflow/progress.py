"""How far a run has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config import ACFlowConfig

__all__ = ["Progress"]


@dataclass
class Progress:
    """What an epoch changes beside the weights.

    Attributes:
        config: the settings.
        epoch: epochs that are done.
        evaluations: network passes made so far, of one sample each, on all ranks.
        warm_end: the epoch at which the warm-up ended; None while it lasts.
        stopped: whether the drift from the reference has used up its budget.
    """

    config: ACFlowConfig
    epoch: int = 0
    evaluations: int = 0
    warm_end: int | None = None
    stopped: bool = False

    def __post_init__(self) -> None:
        if self.config.warmup.over(0, None):
            self.warm_end = 0

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return self.stopped or self.epoch >= self.config.epochs

    @property
    def rate(self) -> float:
        """The factor on the actor's learning rate in the coming epoch."""
        return self.config.warmup.rate(self.epoch, self.warm_end)

    def advance(self, measured: Mapping[str, Any], evaluations: int) -> None:
        """An epoch is done: it may end the warm-up, or the run by its drift."""
        self.epoch += 1
        self.evaluations += evaluations
        if self.warm_end is None:
            explained = measured.get("explained_late")
            self.warm_end = self.epoch if self.config.warmup.over(self.epoch, explained) else None
        budget = self.config.w2_budget
        self.stopped = bool(budget and measured.get("drift", 0.0) > budget)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many epochs, and at the end, is due."""
        return self.over or (every > 0 and self.epoch % every == 0)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the config."""
        names = ("epoch", "evaluations", "warm_end", "stopped")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        for name, value in state.items():
            setattr(self, name, value)
