"""Figures and an HTML page of one or several evaluated folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .grids import best_and_worst, nearest_real
from .html import Grid, write_html
from .images import open_images
from .plots import figures_of, precision_recall, sweep_curve
from .report import EvalResult
from .runs import sweep_axis
from .suite import EvalSuite


def grids_of(suite: EvalSuite, samples: str, reference: str | None) -> list[Grid]:
    """Most and least real samples, and those closest to real images where those were read.

    Args:
        suite: that has just evaluated ``samples``.
        samples: the folder.
        reference: the real images, if the reference was images.
    """
    fake, real = suite.seen(), suite.seen(real=True)
    space, k = suite.extractors[0].space, suite.settings.k
    rows = suite.reference_features()
    source = open_images(samples)
    grids: list[Grid] = []
    if rows is not None and len(rows) > k:
        grids += best_and_worst(source, fake, rows, space, k=k)
    if reference is not None and len(real):
        grids += nearest_real(source, fake, open_images(reference), real, space)
    return [(f"{title}: {samples}", images) for title, images in grids]


def write_page(
    path: Path,
    results: dict[str, EvalResult],
    grids: Sequence[Grid],
    *,
    class_names: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Write the HTML report of results by folder.

    Raises:
        FileExistsError: if the file exists and ``overwrite`` is false.
        ImportError: if matplotlib is missing.
    """
    names = list(results)
    titles = [("" if len(names) == 1 else name, results[name]) for name in names]
    write_html(path, titles, axis=sweep_axis(names), grids=grids, class_names=class_names,
               overwrite=overwrite)  # fmt: skip


def write_plots(
    folder: Path, results: dict[str, EvalResult], *, class_names: Sequence[str] = ()
) -> list[Path]:
    """Curves over the guidance scale and precision against recall, as PNG; what was written.

    A single result gives its own figures too: accuracy by class, scores over k, the fit of
    ``fd_infinity``.

    Raises:
        ImportError: if matplotlib is missing.
    """
    names, pairs = list(results), list(results.items())
    axis = sweep_axis(names)
    figures = {}
    shared = set.intersection(*(set(result.scores) for result in results.values()))
    if axis is not None:
        figures = {name: sweep_curve(pairs, name, axis) for name in sorted(shared)}
    if {"precision", "recall"} <= shared:
        figures["precision_recall"] = precision_recall(pairs)
    if len(pairs) == 1:
        own = figures_of(pairs[0][1], class_names)
        figures |= {name.replace(" ", "_"): figure for name, figure in own.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    return [folder / f"{name}.png" for name in figures]
