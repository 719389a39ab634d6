"""The tables and curves of the comparison of AC-Flow, as Markdown."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from _acflow_judge import pictures

from diffsteer.pipelines import files
from diffsteer.pipelines.grid import image_grid
from diffsteer.training.acflow.run_files import read_log

BEGIN = "<!-- from here on written by scripts/reproduce_acflow.py -->"
END = "<!-- up to here -->"
NAMES = {
    "acflow": "AC-Flow", "orw": "ORW-CFM-W2", "reward-weighted": "reward-weighted (alpha 0)",
    "advantage-matching": "advantage matching (signed)", "grpo": "Flow-GRPO",
    "control": "control (all weights 1)",
}  # fmt: skip
COLUMNS = {
    "reward": 4, "held-out class p": 3, "fd-cifar ↓": 1, "diversity ↑": 3, "W2 proxy": 4,
    "effective share": 2, "evaluations": 0, "minutes": 1,
}  # fmt: skip
LAST = 3  # epochs that shares and explained variances are averaged over


@dataclass(frozen=True)
class Setting:
    """What was run."""

    budget: int
    rate: float
    samples: int
    settings: Mapping[str, Any]
    threads: int
    command: str

    @classmethod
    def of(cls, args: argparse.Namespace, settings: Mapping[str, Any], threads: int) -> Setting:
        seeds = " ".join(map(str, args.seeds))
        command = (
            f"python scripts/reproduce_acflow.py --budget {args.budget} --rate {args.rate} "
            f"--seeds {seeds} --samples {args.samples} --toy-seeds {args.toy_seeds} "
            f"--rewards {' '.join(args.rewards)} --methods {' '.join(args.methods)}"
        )
        return cls(args.budget, args.rate, args.samples, settings, threads, command)


@dataclass(frozen=True)
class Run:
    """One finished run: its log, how it was judged, and how the base model was."""

    reward: str
    method: str
    seed: int
    lines: list[dict[str, Any]]
    judged: dict[str, float]
    base: dict[str, float]
    folder: Path

    @classmethod
    def read(cls, reward: str, method: str, seed: int, folder: Path) -> Run:
        judged, base = (
            json.loads((place / "judged.json").read_text())["scores"]
            for place in (folder, folder.parent / "base")
        )
        return cls(reward, method, seed, read_log(folder), judged, base, folder)

    def columns(self, found: Mapping[str, float]) -> dict[str, float]:
        """Scores of a judgement under the names of the columns; too few images have not all."""
        names = {
            "reward": f"reward/{self.reward}",
            "held-out class p": "held_out/class",
            "fd-cifar ↓": "fd-cifar",
            "diversity ↑": "diversity",
            "W2 proxy": "w2_proxy",
        }
        return {column: found[name] for column, name in names.items() if name in found}

    def scores(self) -> dict[str, float]:
        """Everything of the table's columns, at the end."""
        share = _mean([n.get("effective_share") for n in self.lines if "flow_loss" in n][-LAST:])
        extra = {
            "effective share": share,
            "evaluations": float(self.lines[-1]["evaluations"]),
            "minutes": sum(line.get("seconds", 0) for line in self.lines) / 60,
        }
        known = {name: value for name, value in extra.items() if value is not None}
        return self.columns(self.judged) | known

    def explained(self) -> list[float | None]:
        """The critic's explained variance by level, clean to noise, over the last epochs."""
        rows = [line["explained"] for line in self.lines if "explained" in line][-LAST:]
        return (
            [_mean([row[place] for row in rows]) for place in range(len(rows[0]))] if rows else []
        )


def write(
    path: Path, runs: Sequence[Run], toys: Sequence[Mapping[str, Any]], what: Setting
) -> None:
    """Put the tables between the markers of the page; the text around them stays."""
    picture = path.parent.parent / "images" / "acflow_curves.png"
    body = [BEGIN, "", _introduction(what), ""]
    for reward in dict.fromkeys(run.reward for run in runs):
        chosen = [run for run in runs if run.reward == reward]
        body += [f"### Reward: {reward}", "", *_table(chosen), ""]
        grid = picture.with_name(f"acflow_{reward}.png")
        if draw_pictures(chosen, grid):
            body += [
                f"![The same ten seeds under every method, reward {reward}](../images/{grid.name})",
                "",
            ]
    body += _critic(runs)
    if draw(runs, picture):
        body += [f"![Rewards over denoiser evaluations](../images/{picture.name})", ""]
    if toys:
        body += [*_toy(toys), ""]
    text = path.read_text() if path.exists() else f"# AC-Flow, measured\n\n{BEGIN}\n{END}\n"
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    files.write_bytes(path, (before + "\n".join(body) + END + after).encode())


def _introduction(what: Setting) -> str:
    s = what.settings
    return (
        f"`{what.command}`: {what.budget:,} denoiser evaluations a run (forward passes of one "
        "image, in sampling and in training), "
        f"{s['prompts_per_epoch']} classes x {s['images_per_prompt']} images an epoch in "
        f"{s['sample_steps']} steps, all weights trained at {what.rate}, "
        f"{what.samples} images an evaluation on the same seeds, {what.threads} thread(s)."
    )


def _table(runs: Sequence[Run]) -> list[str]:
    rows = ["| method | runs | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    rows.append(_row("base model", 0, [runs[0].columns(runs[0].base)]))
    for method in dict.fromkeys(run.method for run in runs):
        chosen = [run for run in runs if run.method == method]
        rows.append(_row(NAMES[method], len(chosen), [run.scores() for run in chosen]))
    return rows


def _row(name: str, count: int, scores: Sequence[Mapping[str, float]]) -> str:
    cells = [_cell([s[c] for s in scores if c in s], digits) for c, digits in COLUMNS.items()]
    return f"| {name} | {count or '-'} | " + " | ".join(cells) + " |"


def _cell(values: Sequence[float], digits: int) -> str:
    """The mean, and the range where runs differ."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):,.{digits}f}"
    if max(values) - min(values) < 0.5 * 10**-digits:
        return mean
    return f"{mean} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def _critic(runs: Sequence[Run]) -> list[str]:
    found = [run for run in runs if run.method == "acflow" and run.explained()]
    if not found:
        return []
    bins = len(found[0].explained())
    heads = [f"{i / bins:.1f} to {(i + 1) / bins:.1f}" for i in range(bins)]
    rows = [
        f"Explained variance of AC-Flow's critic by noise level (mean of the last {LAST} epochs, "
        "on samples that it had not seen):", "",
        "| reward | seed | " + " | ".join(heads) + " |", "|---|---|" + "---|" * bins,
    ]  # fmt: skip
    for run in found:
        cells = ["-" if v is None else f"{v:.2f}" for v in run.explained()]
        rows.append(f"| {run.reward} | {run.seed} | " + " | ".join(cells) + " |")
    return [*rows, ""]


def _toy(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"### The toy, {seeds} seeds", "",
        "Mean and 95 % interval over seeds (Student's t). Entropy is that of the modes, 1 is all "
        "eight alike; distance is to the nearest mode.", "",
        "| weights | alpha | reward | entropy | distance |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, alpha in dict.fromkeys((row["name"], row["alpha"]) for row in rows):
        chosen = [row for row in rows if (row["name"], row["alpha"]) == (name, alpha)]
        cells = [
            _interval([row[key] for row in chosen]) for key in ("reward", "entropy", "distance")
        ]
        lines.append(f"| {name} | {alpha:g} | " + " | ".join(cells) + " |")
    return lines


T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def _interval(values: Sequence[float]) -> str:
    mean, count = statistics.mean(values), len(values)
    if count < 2:
        return f"{mean:.3f}"
    half = T95.get(count, 1.96) * statistics.stdev(values) / count**0.5
    return f"{mean:.3f} ± {half:.3f}"


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


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None
