"""Guidance scales that change over a trajectory: ramps, or any function of progress."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ..core.step import Step
from .checks import check_number

_SCALE_REMEDY = "1 is no guidance, 2 to 10 is usual"


@runtime_checkable
class ScaleSchedule(Protocol):
    """Any function from progress in [0, 1] (first step 0, last step 1) to a guidance scale."""

    def __call__(self, progress: float) -> float:
        """The guidance scale at ``progress``."""
        ...


Scale = float | ScaleSchedule


@dataclass(frozen=True)
class _Ramp:
    """What all ramps have: their ends."""

    start: float
    end: float

    def __post_init__(self) -> None:
        """Refuse scales that are no numbers."""
        check_number("start", self.start, remedy=_SCALE_REMEDY)
        check_number("end", self.end, remedy=_SCALE_REMEDY)


class LinearScale(_Ramp):
    """A straight line from ``start`` at the first step to ``end`` at the last.

    Args:
        start: guidance scale of the first (noisiest) step.
        end: guidance scale of the last step.

    Raises:
        ValueError: if a scale is not finite.
        TypeError: if a scale is not a number.

    Example:
        >>> LinearScale(1.0, 9.0)(0.5)
        5.0
    """

    def __call__(self, progress: float) -> float:
        """The guidance scale at ``progress`` in [0, 1]."""
        return self.start + (self.end - self.start) * progress


class CosineScale(_Ramp):
    """Half a cosine from ``start`` at the first step to ``end`` at the last: flat at both ends.

    Args:
        start: guidance scale of the first (noisiest) step.
        end: guidance scale of the last step.

    Raises:
        ValueError: if a scale is not finite.
        TypeError: if a scale is not a number.

    Example:
        >>> CosineScale(1.0, 9.0)(1.0)
        9.0
    """

    def __call__(self, progress: float) -> float:
        """The guidance scale at ``progress`` in [0, 1]."""
        return self.start + (self.end - self.start) * (1 - math.cos(math.pi * progress)) / 2


def check_scale(scale: Any, name: str = "scale") -> None:
    """Refuse what is neither a finite number nor a function of progress.

    Raises:
        TypeError: for a string or any other object.
        ValueError: for NaN and infinities.
    """
    if isinstance(scale, type) or not callable(scale):
        check_number(name, scale, remedy=_SCALE_REMEDY)


def scale_at(scale: Scale, step: Step) -> float:
    """The guidance scale of this step; every stage of a multi-stage solver gets the same.

    Args:
        scale: a number, or a function of progress = ``step.index / (step.count - 1)``.
        step: the step; only ``index`` and ``count`` are read.

    Raises:
        ValueError: if a schedule returns something that is not finite.
    """
    if not callable(scale):
        return float(scale)
    progress = min(max(step.index / max(step.count - 1, 1), 0.0), 1.0)
    value = scale(progress)
    check_number(f"the scale at step {step.index}", value, remedy="mend the schedule")
    return float(value)


def parse_scale(text: str) -> Scale:
    """Read a scale from a command line: ``4``, ``linear:1:8`` or ``cosine:8:1``.

    Raises:
        ValueError: if ``text`` is none of these.

    Example:
        >>> parse_scale("cosine:8:1")
        CosineScale(start=8.0, end=1.0)
    """
    shape, *ends = text.split(":")
    try:
        if not ends:
            scale: Scale = float(text)
            check_scale(scale)
            return scale
        start, end = (float(value) for value in ends)
        ramps: dict[str, type[LinearScale] | type[CosineScale]]
        ramps = {"linear": LinearScale, "cosine": CosineScale}
        return ramps[shape](start, end)
    except (KeyError, ValueError):
        raise ValueError(
            f"scale must look like 4, linear:START:END or cosine:START:END, got {text!r}"
        ) from None
