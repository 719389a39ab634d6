"""The plots of the study of guidance."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsteer.eval.pareto import Mark, trade_off
from diffsteer.pipelines import files, image_grid
from diffsteer.pipelines.image_folder import ImageFolder, ImageRequest

if TYPE_CHECKING:
    from _science_page import Study

SHOWN = (
    "none", "cfg-2", "cfg-6", "cfg-12", "apg-6", "apg-12", "auto-2", "auto-gfcg-2", "cfg2-gfcg-1",
    "elucd-0.5", "cfg2-elucd", "mp2-4", "cfg30-4",
)  # fmt: skip
PLOTTED = (  # as many as there are colours
    "no guidance", "CFG", "APG", "GFCG-style", "CFG 2 + GFCG-style", "EluCD", "CFG 2 + EluCD",
    "CFG-MP, K=1, 18 steps", "autoguidance", "CFG 6 in (0.2, 0.9]",
)  # fmt: skip


def write(study: Study, folder: Path) -> list[Path]:
    """Every plot that the measurements allow, as ``guidance_*.png``; what was written."""
    makers: dict[str, Callable[[Study], Any]] = {
        "fd_accuracy": lambda s: _trade(s, "accuracy", "fd", (True, False)),
        "precision_recall": lambda s: _trade(s, "recall", "precision", (True, True)),
        "saturation": _saturation,
        "push": _push,
        "gap": _gap,
        "calibration": _calibration,
    }
    written = []
    for name, make in makers.items():
        figure = make(study)
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=110)
            written.append(folder / f"guidance_{name}.png")
            files.write_bytes(written[-1], buffer.getvalue())
    written.append(folder / "guidance_grid.png")
    files.write_png(written[-1], _grid(study))
    return written


def _trade(study: Study, x: str, y: str, higher: tuple[bool, bool]) -> Any:
    marks = []
    for found in (f for f in study.results if f.point.family in PLOTTED):
        across, up = (study.scores[found.point.name][axis] for axis in (x, y))
        scale = "" if found.point.scale is None else f"{found.point.scale:g}"
        marks.append(Mark(found.point.family, scale, across.value, up.value))
    return trade_off(marks, x_label=x, y_label=y, higher=higher)


def _saturation(study: Study) -> Any:
    marks = [
        Mark(
            found.point.family, "", found.point.scale or 1.0, score.value, None, 1.96 * score.stderr
        )
        for family in ("CFG", "APG", "autoguidance")
        for found in study.of(family)
        for score in [study.scores[found.point.name]["saturation"]]
    ]
    if not marks:
        return None
    figure = trade_off(marks, x_label="guidance scale", y_label="saturation")
    if "saturation" in study.real:
        axes = figure.axes[0]
        axes.axhline(study.real["saturation"], color="0.5", linestyle=":", label="real images")
        axes.legend(fontsize=7, frameon=False)
    return figure


def _push(study: Study) -> Any:
    marks = []
    for family in ("CFG", "APG"):
        for found in study.of(family):
            if found.point.name in study.pushes:
                score = study.scores[found.point.name]["fd"]
                push = study.pushes[found.point.name]
                label = f"{found.point.scale:g}"
                marks.append(Mark(family, label, push, score.value, None, 1.96 * score.stderr))
    if not marks:
        return None
    return trade_off(marks, x_label="effective push, rms of D - D_c", y_label="fd")


def _gap(study: Study) -> Any:
    marks = [
        Mark(f"{study.point(name).point.family}, scale {study.point(name).point.scale:g}", "", x, y)
        for name, found in study.gaps.items()
        if name.endswith("-4")
        for x, y in zip(found["sigma"], found["gap"], strict=True)
    ]
    if not marks:
        return None
    return trade_off(marks, x_label="sigma", y_label="prediction gap, rms of v_c - v_u")


def _calibration(study: Study) -> Any:
    if study.honesty is None:
        return None
    marks = [
        Mark(name, "", x, y)
        for name, curve in study.honesty["curves"].items()
        for x, y in zip(study.honesty["sigma"], curve["ece"], strict=True)
    ]
    return trade_off(marks, x_label="sigma", y_label="expected calibration error")


def _grid(study: Study) -> Any:
    rows = [found for found in study.results if found.point.name in SHOWN]
    images: list[Any] = []
    heads: list[str] = []
    for found in rows:
        run = ImageFolder(found.folder).read() or {"images": []}
        records = [{k: v for k, v in image.items() if k != "file"} for image in run["images"][:10]]
        requests = [ImageRequest(**record) for record in records]
        heads = [request.name or str(request.label) for request in requests]
        images += ImageFolder(found.folder).open(requests)
    return image_grid(images, len(heads), heads=heads, rows=[found.point.name for found in rows])
