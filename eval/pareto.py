"""Trade-offs between two scores: which settings nothing else beats in both, and their plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .plots import _figure

_STYLES = ("o-", "s-", "^-", "D-", "v-", "P-", "X-", "<-", ">-", "*-")


@dataclass(frozen=True)
class Mark:
    """One setting in a plot.

    Args:
        family: settings of a family are joined by a line, in the order given, and share a colour.
        label: written beside the mark, e.g. the guidance scale; "" for none.
        x: value on the horizontal axis.
        y: value on the vertical axis.
        x_error: half the length of the error bar; None for none.
        y_error: likewise.
    """

    family: str
    label: str
    x: float
    y: float
    x_error: float | None = None
    y_error: float | None = None


def pareto_front(points: Sequence[tuple[float, float]], higher: tuple[bool, bool]) -> list[int]:
    """Which points no other point beats: those not worse in both and better in one.

    Args:
        points: pairs of scores.
        higher: for each of the two, whether more is better.

    Returns:
        Indices, in the order of the first score. Points with a NaN are never among them.

    Example:
        >>> pareto_front([(1.0, 5.0), (2.0, 3.0), (3.0, 4.0)], higher=(False, False))
        [0, 1]
    """
    signs = [1.0 if up else -1.0 for up in higher]
    turned = [(signs[0] * x, signs[1] * y) for x, y in points]
    front = [
        index
        for index, (x, y) in enumerate(turned)
        if x == x and y == y and not any(a >= x and b >= y and (a, b) != (x, y) for a, b in turned)
    ]
    return sorted(front, key=lambda index: points[index])


def trade_off(
    marks: Sequence[Mark], *, x_label: str, y_label: str, higher: tuple[bool, bool] | None = None
) -> Any:
    """Marks by family, and a grey line through those that nothing beats; a Figure.

    Args:
        marks: at least one.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        higher: whether more is better in x and in y; None draws no front.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if there is no mark.
    """
    if not marks:
        raise ValueError("there is nothing to plot")
    figure, axes = _figure(6.4, 4.4)
    if higher is not None:
        front = pareto_front([(mark.x, mark.y) for mark in marks], higher)
        best = [marks[index] for index in front]
        axes.plot([m.x for m in best], [m.y for m in best], color="0.8", linewidth=6, zorder=0,
                  solid_capstyle="round", label="not beaten in both")  # fmt: skip
    for number, family in enumerate(dict.fromkeys(mark.family for mark in marks)):
        own = [mark for mark in marks if mark.family == family]
        axes.errorbar(
            [mark.x for mark in own], [mark.y for mark in own],
            xerr=_bars([mark.x_error for mark in own]), yerr=_bars([mark.y_error for mark in own]),
            fmt=_STYLES[number % len(_STYLES)], markersize=4, linewidth=1.2, capsize=2,
            elinewidth=0.8, label=family,
        )  # fmt: skip
    for mark in marks:
        axes.annotate(mark.label, (mark.x, mark.y), textcoords="offset points", xytext=(4, 4),
                      fontsize=7, color="0.35")  # fmt: skip
    axes.set(xlabel=_arrow(x_label, higher, 0), ylabel=_arrow(y_label, higher, 1))
    axes.legend(fontsize=7, frameon=False)
    return figure


def _bars(errors: Sequence[float | None]) -> list[float] | None:
    known = [0.0 if error is None or error != error else error for error in errors]
    return known if any(known) else None


def _arrow(label: str, higher: tuple[bool, bool] | None, which: int) -> str:
    return label if higher is None else f"{label} {'↑' if higher[which] else '↓'}"
