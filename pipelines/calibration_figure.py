"""Reliability diagrams along a trajectory."""

from __future__ import annotations

import math
from typing import Any

from ..guidance.calibration import Calibration


def reliability_figure(result: Calibration, columns: int = 5) -> Any:
    """A reliability diagram for each stage, and the error over the noise level; a Figure.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install diffsteer[plots]") from error
    count = len(result.stages)
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(2.2 * columns, 2.3 * rows + 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.3 * rows, 2.6])
    top, bottom = parts
    grid = top.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for axes, stage in zip(grid.flat, result.stages, strict=False):
        _diagram(axes, stage)
    for axes in grid[:, 0]:
        axes.set_ylabel("share right")
    for axes in grid[-1]:
        axes.set_xlabel("confidence")
    _errors(bottom.subplots(), result)
    return figure


def _diagram(axes: Any, stage: Any) -> None:
    edges = stage.diagram.edges.tolist()
    full = [i for i, n in enumerate(stage.diagram.count.tolist()) if n]
    left, width = [edges[i] for i in full], edges[1] - edges[0]
    right = [float(stage.diagram.accuracy[i]) for i in full]
    sure = [float(stage.diagram.confidence[i]) for i in full]
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    axes.bar(left, right, width, align="edge", color="#4477aa", edgecolor="white", linewidth=0.5)
    axes.plot(sure, right, "o", color="#cc3311", markersize=2.5)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"sigma {stage.ratio:.3g}, ECE {stage.error:.3f}", fontsize=8)


def _errors(axes: Any, result: Calibration) -> None:
    stages = [stage for stage in result.stages if math.isfinite(stage.ratio)]
    levels = [stage.ratio for stage in stages]
    lines = [
        ("error", "o-", "#cc3311", "ECE"),
        ("error_fitted", "o--", "#ee7733", f"ECE at T = {result.temperature:.2f}"),
        ("accuracy", "s-", "#4477aa", "accuracy"),
    ]
    for name, style, color, label in lines:
        values = [getattr(stage, name) for stage in stages]
        axes.plot(levels, values, style, color=color, label=label)
    high = result.high if math.isfinite(result.high) else max(levels)
    axes.axvspan(max(result.low, min(levels)), high, color="0.9", zorder=0, label="interval")
    axes.set(xscale="log", xlabel="noise-to-signal ratio sigma", ylim=(0, 1.02))
    axes.invert_xaxis()
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
