"""The tables of the study of EGGROLL, as Markdown, and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffsteer.pipelines import files

BEGIN = "<!-- from here on written by scripts/reproduce_eggroll.py -->"
END = "<!-- up to here -->"
COLUMNS = {"accuracy": (100, 1), "fd-cifar": (1, 1), "diversity": (1, 3), "saturation": (1, 3)}
Results = dict[str, dict[str, Any]]


def write(out: Path, found: Results, page: Path | None) -> None:
    """Write ``tables.md`` and ``curves.png``; put the tables into a page, between its marks."""
    text = "\n\n".join(
        part for part in (
            table(found, "jpeg", "Kilobytes saved (reward `jpeg`)"),
            table(found, "class", "Log-probability of the class gained (reward `class`)"),
        ) if part
    )  # fmt: skip
    files.write_bytes(out / "tables.md", (text + "\n").encode())
    curves(out / "curves.png", found)
    if page is not None:
        before, _, rest = page.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        files.write_bytes(page, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}".encode())


def table(found: Results, reward: str, title: str) -> str:
    """One row a run towards a reward: the gain with its standard error, passes, other scores."""
    start = found.get("start")
    rows = [r for r in found.values() if r["reward"] == reward and r["method"] != "none"]
    if start is None or not rows:
        return ""
    names = [name for name in COLUMNS if name in start["scores"]]
    lines = [
        f"{title}, images paired with those of the start:\n",
        "| run | population | passes | gain | " + " | ".join(names) + " | seconds |",
        "|" + "---|" * (5 + len(names)),
        "| start | | | 0 | " + " | ".join(_score(start, name) for name in names) + " | |",
    ]
    for row in rows:
        gain, error = paired(row["rewards"][reward], start["rewards"][reward])
        passes = row["curve"][-1][0] if row["curve"] else 0
        size = "" if row["method"] == "gradient" else str(row["population"])
        cells = [row["name"], size, str(passes), f"{gain:+.4f} ± {error:.4f}"]
        cells += [_score(row, name) for name in names] + [f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(values: list[float], base: list[float]) -> tuple[float, float]:
    """Mean and standard error of the differences of paired values."""
    gaps = torch.tensor(values, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
    return float(gaps.mean()), float(gaps.std() / len(gaps) ** 0.5)


def curves(path: Path, found: Results) -> None:
    """The rewards while training, by passes; nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, reward in zip(figure.subplots(1, 2), ("jpeg", "class"), strict=True):
        for row in found.values():
            if row["reward"] == reward and row["curve"]:
                axes.plot(*zip(*row["curve"], strict=True), label=row["name"], lw=1)
        axes.set(xlabel="passes of the network", ylabel=f"mean reward, {reward}")
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _score(row: dict[str, Any], name: str) -> str:
    factor, digits = COLUMNS[name]
    return f"{row['scores'][name] * factor:.{digits}f}"
