"""The pictures of the comparison of AC-Flow."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from statistics import mean
from typing import Any

from _acflow_judge import pictures
from _acflow_runs import NAMES, Run

from diffsteer.pipelines import files
from diffsteer.pipelines.grid import image_grid

FD = "fd-cifar ↓"


def draw(runs: Sequence[Run], path: Path) -> bool:
    """Rewards of training samples over denoiser evaluations; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rewards = list(dict.fromkeys(run.reward for run in runs))
    figure = Figure(figsize=(4.4 * len(rewards) + 2, 3.2), layout="constrained")
    axes = figure.subplots(1, len(rewards), squeeze=False)[0]
    for axis, reward in zip(axes, rewards, strict=True):
        for method in NAMES:
            chosen = [run for run in runs if (run.reward, run.method) == (reward, method)]
            _curves(axis, [curve for run in chosen if (curve := _curve(run))], method)
        axis.set_title(reward)
        axis.set_xlabel("denoiser evaluations")
    axes[0].set_ylabel("mean reward of an epoch")
    _save(figure, axes, path)
    return True


def draw_trade(runs: Sequence[Run], path: Path) -> bool:
    """What the reward costs in fd, a point for each run; False without matplotlib or fd."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not all(run.values(FD) for run in runs):
        return False
    rewards = list(dict.fromkeys(run.reward for run in runs))
    figure = Figure(figsize=(4.4 * len(rewards) + 2, 3.4), layout="constrained")
    axes = figure.subplots(1, len(rewards), squeeze=False)[0]
    for axis, reward in zip(axes, rewards, strict=True):
        here = [run for run in runs if run.reward == reward]
        start = here[0].columns(here[0].base)
        axis.plot(start[FD], start["reward"], "k*", markersize=10, label="base model")
        for place, (method, name) in enumerate(NAMES.items()):
            points = [run.scores() for run in here if run.method == method]
            if points:
                x, y = ([point[column] for point in points] for column in (FD, "reward"))
                axis.plot(x, y, "ov^s<>DP"[place], color=f"C{place}", label=name, alpha=0.8)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter("{x:.0f}")
        axis.tick_params(axis="x", which="both", labelsize=7)
        axis.set_title(reward)
        axis.set_xlabel("fd-cifar, less is better")
    axes[0].set_ylabel("reward, more is better")
    _save(figure, axes, path)
    return True


def _save(figure: Any, axes: Sequence[Any], path: Path) -> None:
    """With one legend of what is in any of the axes."""
    labels = {}
    for axis in axes:
        handles, names = axis.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    figure.legend(labels.values(), labels, loc="outside right center", fontsize=7)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    files.write_bytes(path, buffer.getvalue())


def _curve(run: Run) -> list[tuple[int, float]]:
    """Evaluations and rewards by epoch; empty for the control of another reward."""
    name = f"reward/{run.reward}"
    return [(line["evaluations"], line[name]) for line in run.lines if name in line]


def _curves(axis: Any, curves: Sequence[Sequence[tuple[int, float]]], method: str) -> None:
    """Each seed thinly, and their mean."""
    if not curves:
        return
    color = f"C{list(NAMES).index(method)}"
    for curve in curves:
        axis.plot(*zip(*curve, strict=True), color=color, linewidth=0.6, alpha=0.4)
    x = [points[0][0] for points in zip(*curves, strict=True)]
    y = [mean(y for _, y in points) for points in zip(*curves, strict=True)]
    axis.plot(x, y, color=color, label=NAMES[method])


def draw_pictures(runs: Sequence[Run], path: Path) -> bool:
    """The same seeds under every method, first seed of training; False where there are none."""
    first = [run for run in runs if run.seed == runs[0].seed]
    rows = {"base": pictures(runs[0].folder.parent / "base")}
    rows |= {NAMES[run.method].split(" (")[0]: pictures(run.folder) for run in first}
    if not all(rows.values()):
        return False
    every = [image for row in rows.values() for image in row]
    grid = image_grid(every, len(rows["base"]), rows=list(rows), cell=64)
    files.write_png(path, grid)
    return True
