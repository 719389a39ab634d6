"""The picture of a run: rewards of the population and of the mean parameters by generation."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ...pipelines.files import write_bytes
from ..run_folder import read_lines
from .records import CURVE, EVALUATION

__all__ = ["draw_curves"]


def draw_curves(out: str | Path) -> Path | None:
    """Draw ``curves.png`` in the folder of a run.

    Returns:
        The picture, or None where there is nothing to draw yet, or no matplotlib.
    """
    out = Path(out)
    lines = [line for line in _lines(out / CURVE) if "reward" in line]
    points = _lines(out / EVALUATION)
    names = [name for name in (points[0] if points else {}) if "/" in name]
    names = [name for name in names if not name.endswith(("_std", "_failed"))]
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not lines and not names:
        return None
    figure = Figure(figsize=(4.6 * (1 + len(names)), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, 1 + len(names), squeeze=False)[0])
    axes[0].plot([x["generation"] for x in lines], [x["reward"] for x in lines], lw=0.8)
    axes[0].set(xlabel="generation", ylabel="all members, fresh images", title="mean reward")
    for axis, name in zip(axes[1:], names, strict=True):
        known = [point for point in points if name in point]
        axis.plot([p["generation"] for p in known], [p[name] for p in known], "o-")
        axis.set(xlabel="generation", ylabel="mean parameters, fixed images", title=name)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(out / "curves.png", buffer.getvalue())
    return out / "curves.png"


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_lines(path) if path.exists() else []
