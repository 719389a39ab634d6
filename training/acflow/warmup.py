"""When the actor may start: once the critic explains something, or time is up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["WarmUp", "late_explained"]


@dataclass(frozen=True)
class WarmUp:
    """Epochs in which the critic alone learns, then a linear rise of the actor's learning rate.

    While the actor stands still the samples all come from one model, so the critic's data are
    independent and identically distributed.

    Attributes:
        least: epochs that the warm-up lasts at least.
        most: epochs after which it ends whatever the critic explains.
        threshold: explained variance that ends it in between.
        ramp: epochs over which the actor's learning rate then rises.
    """

    least: int = 20
    most: int = 100
    threshold: float = 0.1
    ramp: int = 10

    def __post_init__(self) -> None:
        """Refuse counts that contradict each other."""
        if not 0 <= self.least <= self.most or self.ramp < 0:
            raise ValueError(
                f"warm-up needs 0 <= least <= most and ramp >= 0, got least={self.least}, "
                f"most={self.most}, ramp={self.ramp}"
            )

    def over(self, epochs: int, explained: float | None) -> bool:
        """Whether the warm-up is over after ``epochs``; ``explained`` is of the last of them."""
        if epochs >= self.most:
            return True
        good = explained is not None and explained > self.threshold
        return epochs >= self.least and good

    def rate(self, epoch: int, ended: int | None) -> float:
        """The factor on the actor's learning rate in ``epoch``; 0 while the warm-up lasts."""
        if ended is None:
            return 0.0
        return min(1.0, (epoch - ended + 1) / self.ramp) if self.ramp else 1.0


def late_explained(explained: Sequence[float | None]) -> float | None:
    """The mean explained variance of the cleaner half of the levels; None where none is known.

    Args:
        explained: by bins of sigma, from clean to noise, see `explained_variance`.
    """
    half = [value for value in explained[: len(explained) // 2] if value is not None]
    return sum(half) / len(half) if half else None
