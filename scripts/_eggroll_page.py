"""The tables of the study of EGGROLL, as Markdown, and its pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from _page import rewrite

from diffsteer.eval.half_samples import Estimate
from diffsteer.pipelines import files

COLUMNS = {  # score: (heading, factor, digits)
    "fd": ("fd-cifar ↓", 1, 1), "accuracy": ("accuracy %", 100, 1),
    "diversity": ("diversity", 1, 3), "saturation": ("saturation", 1, 3),
}  # fmt: skip
TITLES = {
    "jpeg": "Reward `jpeg`: kilobytes saved",
    "class": "Reward `class`: gain in the log-probability of the class",
}
Results = dict[str, dict[str, Any]]


def write(out: Path, found: Results, theory: str, *, page: Path | None, plots: Path | None) -> None:
    """Write ``tables.md`` and the pictures; put the tables into a page, between its marks."""
    parts = [table(found, reward) for reward in TITLES]
    text = "\n\n".join(part for part in [*parts, theory] if part)
    files.write_bytes(out / "tables.md", (text + "\n").encode())
    picture = curves(found)
    for folder in [out] if plots is None else [out, plots]:
        if picture is not None:
            files.write_bytes(folder / "eggroll_curves.png", picture)
    if page is not None:
        rewrite(page, "reproduce_eggroll.py", text + "\n")


def table(found: Results, reward: str) -> str:
    """One row a run towards a reward: gain and changes of the other scores, with their errors."""
    start = found.get("start")
    rows = [r for r in found.values() if r["reward"] == reward and r["method"] != "nothing"]
    if start is None or not rows:
        return ""
    names = [name for name in COLUMNS if name in start["scores"]]
    heads = [COLUMNS[name][0] for name in names]
    lines = [
        f"### {TITLES[reward]}\n",
        "| run | passes | moved | gain | " + " | ".join(heads) + " | s |",
        "|" + "---|" * (5 + len(names)),
        "| start | | | | " + " | ".join(_value(start, name) for name in names) + " | |",
    ]
    for row in rows:
        gain, error = paired(row["rewards"][reward], start["rewards"][reward])
        passes = str(row["curve"][-1][0]) if row["curve"] else "0"
        cells = [row["name"], passes, f"{row['moved']:.2f}", f"{gain:+.4f} ± {error:.4f}"]
        cells += [_change(row, start, name) for name in names] + [f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(values: list[float], base: list[float]) -> tuple[float, float]:
    """Mean and standard error of the differences of paired values."""
    gaps = torch.tensor(values, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
    return float(gaps.mean()), float(gaps.std() / len(gaps) ** 0.5)


def curves(found: Results) -> bytes | None:
    """The reward of the mean parameters on the watched images, by passes; None without points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {r: [x for x in found.values() if x["reward"] == r and x["curve"]] for r in TITLES}
    shown = {reward: rows for reward, rows in shown.items() if rows}
    if not shown:
        return None
    figure = Figure(figsize=(5.2 * len(shown), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for place, (reward, rows) in zip(axes, shown.items(), strict=True):
        for number, row in enumerate(rows):
            points = [(passes, value - row["curve"][0][1]) for passes, value in row["curve"]]
            style = "-" if number < 10 else "--"
            place.plot(*zip(*points, strict=True), style, marker=".", label=row["name"], lw=1)
        place.set(xlabel="passes of the network", ylabel=f"gain of the mean parameters, {reward}")
        place.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _estimate(row: dict[str, Any], name: str) -> Estimate:
    value, *halves = row["scores"][name]
    return Estimate(value, torch.tensor(halves, dtype=torch.float64))


def _value(row: dict[str, Any], name: str) -> str:
    _, factor, digits = COLUMNS[name]
    return f"{_estimate(row, name).value * factor:.{digits}f}"


def _change(row: dict[str, Any], start: dict[str, Any], name: str) -> str:
    _, factor, digits = COLUMNS[name]
    change = _estimate(row, name) - _estimate(start, name)
    return f"{change.value * factor:+.{digits}f} ± {change.stderr * factor:.{digits}f}"
