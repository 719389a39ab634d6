"""Compare at equal price: how many steps a budget of network evaluations buys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .image_folder import ImageRequest
from .sweep_cost import point_cost
from .sweep_point import SweepPoint


def at_budget(
    pipe: Any,
    request: ImageRequest,
    points: Sequence[SweepPoint],
    budget: int,
    *,
    weak: Any = None,
    call: dict[str, Any] | None = None,
) -> list[SweepPoint]:
    """The same points with as many steps as ``budget`` evaluations of an image allow.

    Steps are counted, not calculated, so rules that act at some noise levels only are priced as
    they are.

    Raises:
        ValueError: if a single step of a point costs more than the budget.
    """
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f"budget must be an integer of at least 1, got {budget!r}")

    def fitted(point: SweepPoint) -> SweepPoint:
        def nfe(steps: int) -> int:
            return point_cost(pipe, request, point.rule, steps=steps, weak=weak, call=call).nfe

        try:
            steps = steps_for_budget(nfe, budget)
        except ValueError as error:
            raise ValueError(f"point {point.name}: {error}") from error
        return replace(point, name=f"{point.name}-steps={steps}", steps=steps)

    return [fitted(point) for point in points]


def steps_for_budget(nfe: Callable[[int], int], budget: int) -> int:
    """The largest number of steps whose evaluations do not exceed ``budget``.

    Args:
        nfe: evaluations of an image at so many steps, at least one a step and non-decreasing; asked
            for a few numbers only.
        budget: evaluations an image.

    Raises:
        ValueError: if a single step costs more.
    """
    one = nfe(1)
    if one > budget:
        raise ValueError(f"a single step needs {one} evaluations, more than the budget of {budget}")
    low, high, price = 1, budget, float(one)
    while low < high:
        trial = min(max(int(budget / price), low + 1), high)
        found = nfe(trial)
        price = found / trial  # what a step costs near here; gates make it depend on the number
        low, high = (trial, high) if found <= budget else (low, trial - 1)
    return low
