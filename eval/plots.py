"""Figures of results: distances over a sweep, precision against recall, accuracy by class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import EvalResult
from .scores import OVER_K


def _figure(width: float = 5.0, height: float = 3.6) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install diffsteer[plots]") from error
    # No pyplot: figures of a library must not touch the user's backend or open figures.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def sweep_curve(
    results: Sequence[tuple[str, EvalResult]], metric: str, axis: Sequence[float]
) -> Any:
    """One metric over the swept number, with error bars where they are known; a Figure.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if no result has the metric.
    """
    points = [
        (x, result.scores[metric])
        for x, (_, result) in sorted(zip(axis, results, strict=True), key=lambda pair: pair[0])
        if metric in result.scores
    ]
    if not points:
        raise ValueError(f"no result has the metric {metric!r}")
    figure, axes = _figure()
    errors = [score.stderr or 0.0 for _, score in points]
    axes.errorbar([x for x, _ in points], [s.value for _, s in points], errors, marker="o")
    axes.set(xlabel="guidance scale", ylabel=points[0][1].label)
    return figure


def precision_recall(results: Sequence[tuple[str, EvalResult]]) -> Any:
    """Precision against recall, one point a result; a Figure.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if no result has both.
    """
    points = [
        (title, result.values["recall"], result.values["precision"])
        for title, result in results
        if {"precision", "recall"} <= set(result.scores)
    ]
    if not points:
        raise ValueError("no result has precision and recall")
    figure, axes = _figure(4.2, 4.0)
    axes.plot([x for _, x, _ in points], [y for _, _, y in points], "o-")
    for title, x, y in points:
        axes.annotate(Path(title).name, (x, y), textcoords="offset points", xytext=(5, 5))
    axes.set(xlabel="recall", ylabel="precision")
    return figure


def class_bars(result: EvalResult, names: Sequence[str] = ()) -> Any:
    """Accuracy of each class; a Figure.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the result has no per-class accuracy.
    """
    values = result.per_class.get("accuracy")
    if values is None:
        raise ValueError("the result has no per-class accuracy: it needs labels")
    figure, axes = _figure(max(4.0, 0.5 * len(values)), 3.2)
    titles = list(names) if len(names) == len(values) else [str(i) for i in range(len(values))]
    axes.bar(range(len(values)), [0.0 if v is None else v for v in values])
    axes.set_xticks(range(len(values)), titles, rotation=45, ha="right")
    axes.set(ylabel="accuracy", ylim=(0, 1))
    return figure


def infinity_fit(result: EvalResult, metric: str) -> Any:
    """Distance over 1 / N and the line that meets the axis at infinitely many samples; a Figure.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the result has no such curve.
    """
    if metric not in result.curves:
        raise ValueError(f"the result has no curve of {metric!r}: score it with fd_infinity")
    counts, distances = result.curves[metric]
    figure, axes = _figure()
    at = [0.0, *(1 / count for count in counts)]
    value = result.values[metric]
    # The line of least squares through the points has the value as its intercept.
    slope = sum(x * (y - value) for x, y in zip(at[1:], distances, strict=True)) / sum(
        x * x for x in at
    )
    axes.plot(at[1:], distances, "o")
    axes.plot([0.0, max(at)], [value, value + slope * max(at)], "-")
    axes.set(xlabel="1 / N", ylabel=metric, xlim=(0, None))
    return figure


def curves_over_k(result: EvalResult) -> Any:
    """Precision, recall, density and coverage over the neighbour that sets the radii; a Figure.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the result has no such curves.
    """
    curves = {name: points for name, points in result.curves.items() if name.endswith(OVER_K)}
    if not curves:
        raise ValueError("the result has no curves over k: score it with over_k")
    figure, axes = _figure()
    for name, (ks, values) in curves.items():
        axes.plot(ks, values, "o-", label=name.removesuffix(OVER_K))
    axes.set(xlabel="k", xticks=ks, ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def figures_of(result: EvalResult, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """Every figure that one result has by itself, by name: fits, curves over k, bars by class.

    Raises:
        ImportError: if matplotlib is missing.
    """
    found = {f"{n} fit": infinity_fit(result, n) for n in result.curves if not n.endswith(OVER_K)}
    if len(found) < len(result.curves):
        found["scores over k"] = curves_over_k(result)
    if "accuracy" in result.per_class:
        found["accuracy by class"] = class_bars(result, class_names)
    return found
