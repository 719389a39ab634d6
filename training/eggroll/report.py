"""What one step of evolution did."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """What one step did.

    Attributes:
        generation: steps made, this one included.
        count: members that had a score.
        deviation: of the centred scores.
        step_norm: Euclidean norm of the change of all weights.
        offset_norm: of all that has changed since the start.
        skipped: the scores did not differ, so the weights are as they were.
    """

    generation: int
    count: int
    deviation: float
    step_norm: float
    offset_norm: float
    skipped: bool
