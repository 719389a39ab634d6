"""The tables, plots and the picture of a sweep, from its finished points."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..eval.pareto import Mark, trade_off
from ..eval.report import Score
from .files import write_bytes, write_json, write_png
from .grid import image_grid
from .image_folder import ImageFolder, ImageRequest, plain

if TYPE_CHECKING:
    from .sweep import PointResult

FORMAT = "diffsteer-sweep-1"
COLUMNS = 10
PLOTS = {
    "fd_accuracy": ("accuracy", "distance"),
    "precision_recall": ("recall", "precision"),
    "saturation_scale": ("scale", "saturation"),
}


def write_report(
    out: Path,
    results: Sequence[PointResult],
    requests: Sequence[ImageRequest],
    about: dict[str, Any],
    *,
    pictures: bool = False,
) -> None:
    """Write ``sweep.json`` and ``sweep.csv``, each whole or not at all.

    Args:
        out: folder of the sweep.
        results: finished points.
        requests: what every point has made.
        about: what else ``sweep.json`` says.
        pictures: also write ``grid.png`` and the plots that the scores allow.
    """
    table = [row(result) for result in results]
    notes = _pictures(out, results, requests) if pictures else {}
    records = [{**line, "guidance": plain(found.point.rule), **_remarks(found)}
               for line, found in zip(table, results, strict=True)]  # fmt: skip
    write_json(out / "sweep.json", plain({"format": FORMAT, **about, **notes, "points": records}))
    write_bytes(out / "sweep.csv", csv_text(table).encode())


def row(found: PointResult) -> dict[str, Any]:
    """One line of the table: the setting, its price, and every score with its standard error."""
    point, cost, seconds = found.point, found.cost, found.seconds_per_image
    scores = {name: score.value for name, score in found.result.scores.items()}
    errors = {f"{name}_stderr": value for name, value in found.result.stderr.items()}
    return {
        "name": point.name,
        "family": point.family,
        "scale": point.scale,
        "steps": point.steps,
        "nfe": cost.nfe,
        "rows": cost.rows,
        "classifier_calls": cost.classifier_calls,
        "classifier_seconds_per_step": cost.classifier_seconds,
        "classifier_batch_size": None if cost.classifier_seconds is None else cost.batch_size,
        "seconds_per_image": None if seconds is None else round(seconds, 5),
        "count": max((score.count for score in found.result.scores.values()), default=0),
        **scores,
        **errors,
    }


def csv_text(table: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV with a heading; what a row does not have is empty."""
    names = list(dict.fromkeys(name for line in table for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def picture(results: Sequence[PointResult], requests: Sequence[ImageRequest]) -> Image.Image:
    """One row a point, the same seeds all the way down a column."""
    shown = requests[:COLUMNS]
    images = [image for found in results for image in ImageFolder(found.folder).open(shown)]
    heads = [_head(request) for request in shown]
    return image_grid(images, len(shown), heads=heads, rows=[_title(found) for found in results])


def plots(results: Sequence[PointResult]) -> tuple[dict[str, Any], dict[str, str]]:
    """The figures that the scores allow, by name, and why the others are missing.

    Raises:
        ImportError: if matplotlib is missing.
    """
    figures: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, (x, y) in PLOTS.items():
        marks = [mark for found in results if (mark := _mark(found, x, y)) is not None]
        if not marks:
            missing[name] = f"no point has both {x} and {y}"
            continue
        labels = [_label(results, axis) for axis in (x, y)]
        front = (True, y == "precision") if x != "scale" else None
        figures[name] = trade_off(marks, x_label=labels[0], y_label=labels[1], higher=front)
    return figures, missing


def distance(found: PointResult) -> Score | None:
    """The Fréchet distance of a point, in whatever space it was taken."""
    scores = found.result.scores
    names = [name for name in scores if name == "fid" or name.startswith("fd-")]
    return scores[names[0]] if names else None


def _pictures(
    out: Path, results: Sequence[PointResult], requests: Sequence[ImageRequest]
) -> dict[str, Any]:
    write_png(out / "grid.png", picture(results, requests))
    try:
        figures, missing = plots(results)
    except ImportError as error:
        return {"plots_missing": {name: str(error) for name in PLOTS}}
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        write_bytes(out / f"{name}.png", buffer.getvalue())
    return {"plots_missing": missing}


def _remarks(found: PointResult) -> dict[str, Any]:
    return {"skipped": found.result.skipped, "warnings": found.result.warnings}


def _score(found: PointResult, axis: str) -> Score | None:
    if axis == "scale":
        scale = found.point.scale
        return None if scale is None else Score("scale", scale)
    return distance(found) if axis == "distance" else found.result.scores.get(axis)


def _mark(found: PointResult, x: str, y: str) -> Mark | None:
    across, up = _score(found, x), _score(found, y)
    if across is None or up is None:
        return None
    scale = "" if found.point.scale is None or x == "scale" else f"{found.point.scale:g}"
    return Mark(found.point.family, scale, across.value, up.value, across.stderr, up.stderr)


def _label(results: Sequence[PointResult], axis: str) -> str:
    scores = [score for found in results if (score := _score(found, axis)) is not None]
    return "guidance scale" if axis == "scale" else scores[0].label


def _title(found: PointResult) -> str:
    lines = [found.point.name, f"{found.cost.nfe} evaluations"]
    accuracy = found.result.values.get("accuracy")
    return "\n".join(lines if accuracy is None else [*lines, f"{accuracy:.0%} recognised"])


def _head(request: ImageRequest) -> str:
    if request.prompt is None:
        return request.name or f"class {request.label}"
    return request.prompt if len(request.prompt) <= 16 else request.prompt[:15] + "…"
