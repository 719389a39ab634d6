"""The curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from ...pipelines.files import write_bytes

__all__ = ["draw_curves"]

PANELS = {
    "rewards in training": ("reward/",),
    "evaluation": ("evaluation",),
    "drift |v - v_ref|²": ("drift",),
    "critic: explained variance (cleaner half)": ("explained_late",),
    "share of samples that count": ("effective_share",),
}


def draw_curves(lines: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw what the log holds, one panel a quantity; False without matplotlib (an extra).

    Args:
        lines: of the log.
        path: of the PNG.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels = {title: _series(lines, names[0]) for title, names in PANELS.items()}
    panels = {title: series for title, series in panels.items() if series}
    if not panels:
        return False
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, series) in zip(axes, panels.items(), strict=True):
        for name, points in series.items():
            axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 9 else "")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("epoch")
        if len(series) > 1 or title in ("evaluation", "rewards in training"):
            axis.legend(fontsize=7)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_bytes(path, buffer.getvalue())
    return True


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> dict[str, list[tuple[int, float]]]:
    """Points (epoch, value) by name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        source = line.get("evaluation", {}) if name == "evaluation" else line
        for key, value in source.items():
            wanted = "/" in key if name == "evaluation" else key.startswith(name)
            if wanted and not key.endswith(("_std", "_se", "_failed")) and value is not None:
                found.setdefault(key, []).append((line["epoch"], value))
    return found
