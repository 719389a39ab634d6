"""The pictures of the comparison of AC-Flow."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from _acflow_judge import pictures
from _acflow_runs import NAMES, Run

from diffsteer.pipelines import files
from diffsteer.pipelines.grid import image_grid


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
        for run in (run for run in runs if run.reward == reward):
            lines = [line for line in run.lines if f"reward/{reward}" in line]
            if not lines:  # the control of another reward
                continue
            x, y = zip(*((n["evaluations"], n[f"reward/{reward}"]) for n in lines), strict=True)
            label = NAMES[run.method] if run.seed == runs[0].seed else None
            axis.plot(x, y, label=label, color=f"C{list(NAMES).index(run.method)}", alpha=0.8)
        axis.set_title(reward)
        axis.set_xlabel("denoiser evaluations")
    axes[0].set_ylabel("mean reward of an epoch")
    fullest = max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    figure.legend(*fullest.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    files.write_bytes(path, buffer.getvalue())
    return True


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
