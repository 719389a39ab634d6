"""The pictures of reproduce_targets.py: curves, what noise and coarse weights cost, samples."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _targets_points import Point
from PIL import Image
from torch import Tensor

from diffsteer.pipelines import files, image_grid

CLASSES = "plane car bird cat deer dog frog horse ship truck".split()


def figure(columns: int) -> tuple[Any, Any]:
    """Axes side by side.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install diffsteer[plots]") from error

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(5 * columns, 3.6), layout="constrained")


def save(made: Any, path: Path) -> None:
    """Write a figure, whole or not at all, and close it."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=110)
    pyplot.close(made)
    files.write_bytes(path, buffer.getvalue())


def plot_learned(curves: Mapping[int, Sequence[tuple[int, float]]], dims: int, path: Path) -> None:
    """How a learned k moved on data of each intrinsic dimension, and where the rules put it."""
    made, (left, right) = figure(2)
    for d, curve in curves.items():
        (line,) = left.plot(*zip((1, 0.5), *curve, strict=False), marker="o", label=f"d = {d}")
        left.axhline(dims / (dims + d), color=line.get_color(), linestyle=":", linewidth=1)
        at = math.sqrt(dims) / (math.sqrt(dims) + math.sqrt(d))
        end = curve[-1][1]
        right.plot(dims / (dims + d), end, "o", color=line.get_color(), label=f"d = {d}")
        right.plot(at, end, "x", color=line.get_color())
    right.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1)
    left.set(xscale="log", xlabel="update", ylabel="learned k (dotted: D / (D + d))")
    right.set(xlabel="rule: o D / (D + d), x root rule", ylabel="learned k at the end")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    save(made, path)


def plot_curves(found: Mapping[str, Point], path: Path) -> None:
    """Loss over updates at every k (seed 0), and the learned k of every seed."""
    made, (left, right) = figure(2)
    for name, point in found.items():
        k, seed = name.removeprefix("k-").rsplit("-", 1)
        curve = point["curve"][len(point["curve"]) // 12 :]  # the fall of the start hides the rest
        steps, losses = [row[0] for row in curve], [row[1] for row in curve]
        windows = [losses[max(0, i - 4) : i + 5] for i in range(len(losses))]
        smooth = [sum(window) / len(window) for window in windows]
        if seed == "0":
            left.plot(steps, smooth, label=f"k = {k}" if k[0].isdigit() else k, linewidth=1.2)
        if k == "learned":
            rows = point["curve"]
            right.plot([r[0] for r in rows], [r[2] for r in rows], label=f"seed {seed}")
    left.set(xlabel="update", ylabel="velocity loss")
    right.set(xlabel="update", ylabel="learned k")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    save(made, path)


def plot_robustness(
    found: Mapping[str, Point], alphas: Sequence[float], bits: Sequence[int], path: Path
) -> None:
    """Fréchet distance over the injected noise and over the bits of the weights, at every D."""
    made, (left, right) = figure(2)
    runs: dict[str, list[Point]] = {}
    for name, point in found.items():
        runs.setdefault(name.split("-")[1], []).append(point["cases"])
    marks = [f"{b} bits" for b in sorted(bits, reverse=True)]
    for dim, cases in runs.items():

        def mean(case: str, cases: list[Point] = cases) -> float:
            return sum(float(c[case]["fd-cifar"]) for c in cases) / len(cases)

        noisy = [mean("alpha 0"), *(mean(f"alpha {a}") for a in alphas)]
        (line,) = left.plot([0, *alphas], noisy, marker="o", label=f"D = {dim}")
        told = mean(f"alpha {alphas[-1]}, told")
        left.plot(alphas[-1], told, "x", color=line.get_color(), markersize=8)
        right.plot(["as trained", *marks], [noisy[0], *map(mean, marks)], marker="o",
                   label=f"D = {dim}")  # fmt: skip
    left.set(
        xlabel="noise injected at each step, alpha (x: the network is told)", ylabel="fd-cifar"
    )
    right.set(xlabel="weights", ylabel="fd-cifar")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    save(made, path)


def save_strip(images: Tensor, path: Path) -> None:
    """Images in [-1, 1] side by side, as they are."""
    pixels = (images.detach().float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
    files.write_png(path, Image.fromarray(pixels.permute(2, 0, 3, 1).flatten(1, 2).numpy()))


def plot_strips(strips: Mapping[str, Path], path: Path) -> None:
    """Saved strips below each other, labelled, one column a class."""
    cells = []
    for strip in strips.values():
        whole = Image.open(strip)
        side = whole.height
        cells += [whole.crop((i * side, 0, (i + 1) * side, side)) for i in range(len(CLASSES))]
    sheet = image_grid(cells, len(CLASSES), heads=CLASSES, rows=list(strips), cell=4 * side)
    files.write_png(path, sheet)
