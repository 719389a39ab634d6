"""A report as one HTML file: table, figures and image grids, nothing loaded from outside."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from .plots import figures_of, precision_recall, sweep_curve
from .report import EvalResult, write_text

# A caption, and images (uint8, (3, H, W)) with a caption each.
Grid = tuple[str, Sequence[tuple[Tensor, str]]]

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr + tr { border-top: 1px solid #8884; }
figure { display: inline-block; margin: 1rem 1rem 0 0; width: 30rem; max-width: 100%; }
figure img { max-width: 100%; } figcaption { font-size: .9em; }
.grid img { image-rendering: pixelated; margin: 2px; vertical-align: bottom; }
pre { overflow: auto; background: #8881; padding: 1rem; } .warning { color: #b50; }
"""


def write_html(
    path: Path,
    results: Sequence[tuple[str, EvalResult]],
    *,
    axis: Sequence[float] | None = None,
    grids: Sequence[Grid] = (),
    class_names: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Write a self-contained report.

    Args:
        path: the .html file.
        results: a title and a result each; several give one column each.
        axis: the swept number of each result, for curves.
        grids: a caption and images with captions each; images are uint8 (3, H, W).
        class_names: labels of the per-class bars.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: if the file exists and ``overwrite`` is false.
        ImportError: if matplotlib is missing.
    """
    body = [
        "<h1>Evaluation</h1>",
        _table(results),
        *(_warnings(title, result) for title, result in results),
        *_figures(results, axis, class_names),
        *(_grid(caption, images) for caption, images in grids),
        *(_details(title, result) for title, result in results),
    ]
    text = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title>'
        f"<style>{_STYLE}</style><body>{''.join(body)}</body></html>\n"
    )
    write_text(path, text, overwrite=overwrite)


def _table(results: Sequence[tuple[str, EvalResult]]) -> str:
    names = list(dict.fromkeys(name for _, result in results for name in result.scores))
    heads = "".join(f"<th>{html.escape(title or 'value')}</th>" for title, _ in results)
    rows = []
    for name in names:
        cells = []
        for _, result in results:
            score = result.scores.get(name)
            error = "" if score is None or not score.stderr else f" ± {score.stderr:.2g}"
            value = (
                "-" if score is None else f"{score.value:.5g}{error} <small>@{score.count}</small>"
            )
            cells.append(f"<td>{value}</td>")
        better = next(r.scores[name].higher_is_better for _, r in results if name in r.scores)
        arrow = {True: " ↑", False: " ↓", None: ""}[better]
        rows.append(f"<tr><td>{html.escape(name)}{arrow}</td>{''.join(cells)}</tr>")
    return f"<table><tr><th>metric</th>{heads}</tr>{''.join(rows)}</table>"


def _warnings(title: str, result: EvalResult) -> str:
    notes = [*dict.fromkeys(result.warnings)]
    notes += [f"no {name}: {reason}" for name, reason in result.skipped.items()]
    items = "".join(f'<li class="warning">{html.escape(note)}</li>' for note in notes)
    return f"<h2>Notes {html.escape(title)}</h2><ul>{items}</ul>" if items else ""


def _figures(
    results: Sequence[tuple[str, EvalResult]],
    axis: Sequence[float] | None,
    class_names: Sequence[str],
) -> list[str]:
    figures: list[tuple[str, Any]] = []
    if axis is not None and len(results) > 1:
        shared = set.intersection(*(set(result.scores) for _, result in results))
        wanted = [name for name in results[0][1].scores if name in shared]
        figures += [(name, sweep_curve(results, name, axis)) for name in wanted]
    if len(results) > 1 and all({"precision", "recall"} <= set(r.scores) for _, r in results):
        figures.append(("precision and recall", precision_recall(results)))
    for title, result in results:
        own = figures_of(result, class_names)
        figures += [(f"{name} {title}".strip(), figure) for name, figure in own.items()]
    return [_figure(caption, figure) for caption, figure in figures]


def _figure(caption: str, figure: Any) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return (
        f'<figure><img alt="{html.escape(caption)}" src="{_data(file.getvalue())}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _grid(caption: str, images: Sequence[tuple[Tensor, str]]) -> str:
    cells = []
    for image, note in images:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(file, "PNG")
        width = max(64, image.shape[2])
        cells.append(
            f'<img width="{width}" alt="{html.escape(note)}" title="{html.escape(note)}" '
            f'src="{_data(file.getvalue())}">'
        )
    return f'<h2>{html.escape(caption)}</h2><div class="grid">{"".join(cells)}</div>'


def _details(title: str, result: EvalResult) -> str:
    meta = html.escape(json.dumps(result.as_dict()["meta"], indent=2))
    name = html.escape(title)
    return f"<details><summary>How this was made {name}</summary><pre>{meta}</pre></details>"


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
