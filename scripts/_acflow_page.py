"""The tables of the comparison of AC-Flow, as Markdown."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _acflow_figures import draw, draw_pictures, draw_trade
from _acflow_pairs import difference, half_width, shown
from _acflow_runs import LAST, NAMES, Run, mean_of
from _page import END, begin, rewrite

from diffsteer.pipelines import files

SCRIPT = "reproduce_acflow.py"
COLUMNS = {
    "reward": 4, "held-out class p": 3, "fd-cifar ↓": 1, "diversity ↑": 3, "W2 proxy": 4,
    "effective share": 2, "evaluations": 0, "minutes": 1,
}  # fmt: skip
PAIRED = {"reward": 4, "held-out class p": 3, "fd-cifar ↓": 1}


@dataclass(frozen=True)
class Setting:
    """What was run."""

    args: argparse.Namespace
    threads: int

    @property
    def command(self) -> str:
        """That makes the runs and the page."""
        a = self.args
        lists = {"seeds": a.seeds, "rewards": a.rewards, "methods": a.methods}
        chosen = " ".join(f"--{name} {' '.join(map(str, each))}" for name, each in lists.items())
        return (
            f"python scripts/reproduce_acflow.py --budget {a.budget} --rate {a.rate} "
            f"--steps {a.steps} --per-class {a.per_class} --samples {a.samples} "
            f"--toy-seeds {a.toy_seeds} {chosen}"
        )

    def __str__(self) -> str:
        a = self.args
        return (
            f"`{self.command}`: {a.budget:,} denoiser evaluations a run (forward passes of one "
            f"image, in sampling and in training), 10 classes x {a.per_class} images an epoch in "
            f"{a.steps} steps, all weights trained at {a.rate}, {a.samples} images an evaluation "
            f"on the same seeds, {self.threads} thread(s)."
        )


def write(
    path: Path, runs: Sequence[Run], toys: Sequence[Mapping[str, Any]], what: Setting
) -> None:
    """Put the tables between the markers of the page; the text around them stays."""
    picture = path.parent.parent / "images" / "acflow_curves.png"
    body = [str(what), ""]
    for reward in dict.fromkeys(run.reward for run in runs):
        chosen = [run for run in runs if run.reward == reward]
        body += [f"### Reward: {reward}", "", *_table(chosen), "", *_differences(chosen), ""]
        grid = picture.with_name(f"acflow_{reward}.png")
        if draw_pictures(chosen, grid):
            body += [
                f"![The same ten seeds under every method, reward {reward}](../images/{grid.name})",
                "",
            ]
    trade = picture.with_name("acflow_trade.png")
    if draw_trade(runs, trade):
        body += [f"![Reward against fd-cifar, a point for each run](../images/{trade.name})", ""]
    body += _critic(runs)
    if draw(runs, picture):
        body += [f"![Rewards over denoiser evaluations](../images/{picture.name})", ""]
    if toys:
        body += [*_toy(toys), ""]
    if not path.exists():
        files.write_bytes(path, f"# AC-Flow, measured\n\n{begin(SCRIPT)}\n{END}\n".encode())
    rewrite(path, SCRIPT, "\n".join(body).rstrip("\n"))


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
    """The mean over seeds."""
    return f"{statistics.mean(values):,.{digits}f}" if values else "-"


def _differences(runs: Sequence[Run]) -> list[str]:
    """Each method beside the base model and beside the control, and AC-Flow beside ORW."""
    heads = " | ".join(f"{column} - {other}" for column in PAIRED for other in ("base", "control"))
    rows = [f"| paired, 95 % | {heads} |", "|---|" + "---|" * (2 * len(PAIRED))]
    by_method = {
        m: [r for r in runs if r.method == m] for m in dict.fromkeys(r.method for r in runs)
    }
    for method, chosen in by_method.items():
        cells = []
        for column, digits in PAIRED.items():
            ours = {run.seed: run.values(column) for run in chosen}
            base = {run.seed: run.values(column, base=True) for run in chosen}
            control = {run.seed: run.values(column) for run in by_method.get("control", [])}
            cells.append(shown(difference(ours, base), digits))
            cells.append("" if method == "control" else shown(difference(ours, control), digits))
        rows.append(f"| {NAMES[method]} | " + " | ".join(cells) + " |")
    return rows


def _critic(runs: Sequence[Run]) -> list[str]:
    """What the critic explains, and what it changes beside ORW."""
    rewards = list(dict.fromkeys(run.reward for run in runs))
    found = {n: [r for r in runs if (r.reward, r.method) == (n, "acflow")] for n in rewards}
    explained = {n: [run.explained() for run in chosen] for n, chosen in found.items() if chosen}
    if not explained:
        return []
    bins = len(next(iter(explained.values()))[0])
    heads = [f"{i / bins:.1f} to {(i + 1) / bins:.1f}" for i in range(bins)]
    rows = [
        "### The critic", "",
        f"Explained variance of AC-Flow's critic by noise level (mean of the last {LAST} epochs "
        "and of the seeds, on samples that it had not seen):", "",
        "| reward | " + " | ".join(heads) + " |", "|---|" + "---|" * bins,
    ]  # fmt: skip
    for name, each in explained.items():
        means = [mean_of([one[place] for one in each]) for place in range(bins)]
        rows.append(
            f"| {name} | " + " | ".join("-" if v is None else f"{v:.2f}" for v in means) + " |"
        )
    return [*rows, "", *_beside_orw(runs, found), ""]


def _beside_orw(runs: Sequence[Run], found: Mapping[str, Sequence[Run]]) -> list[str]:
    columns = {**PAIRED, "diversity ↑": 4, "effective share": 2}
    rows = [
        "AC-Flow minus ORW-CFM-W2, paired, 95 %:",
        "",
        "| reward | " + " | ".join(columns) + " |",
    ]
    rows.append("|---|" + "---|" * len(columns))
    for name, chosen in found.items():
        other = [run for run in runs if (run.reward, run.method) == (name, "orw")]
        cells = []
        for column, digits in columns.items():
            ours, theirs = (
                {run.seed: run.values(column) for run in each} for each in (chosen, other)
            )
            cells.append(shown(difference(ours, theirs), digits))
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


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


def _interval(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {half_width(values):.3f}" if len(values) > 1 else mean
