"""One setting of a sweep."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..core.step import Guidance


@dataclass(frozen=True)
class SweepPoint:
    """One setting of a sweep.

    Args:
        name: of its folder; letters, digits, ``.``, ``-``, ``_`` and ``=``.
        rule: the guidance method, or None.
        steps: solver steps.
        family: points of a family differ in scale alone and are joined by a line in plots.
        scale: where on that line; None without a number.

    Raises:
        ValueError: if the name cannot be that of a folder, or there is no step.
    """

    name: str
    rule: Guidance | None = None
    steps: int = 20
    family: str = "no guidance"
    scale: float | None = None

    def __post_init__(self) -> None:
        """Refuse names that lead elsewhere."""
        if not re.fullmatch(r"[\w=-][\w.=-]*", self.name):
            raise ValueError(
                f"a point's name may hold letters, digits, '.', '-', '_' and '=', got {self.name!r}"
            )
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"{self.name}: steps must be at least 1, got {self.steps!r}")
