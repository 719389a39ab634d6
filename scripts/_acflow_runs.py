"""The finished runs of the comparison of AC-Flow."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsteer.training.acflow.run_files import read_log

NAMES = {
    "acflow": "AC-Flow", "orw": "ORW-CFM-W2", "reward-weighted": "reward-weighted (alpha 0)",
    "advantage-matching": "advantage matching (signed)", "grpo": "Flow-GRPO",
    "control": "control (all weights 1)", "orw-0.3": "ORW-CFM-W2, alpha 0.3",
    "orw-0.1": "ORW-CFM-W2, alpha 0.1",
}  # fmt: skip
LAST = 3  # epochs that shares and explained variances are averaged over


@dataclass(frozen=True)
class Run:
    """One finished run: its log, how it was judged, and how the base model was."""

    reward: str
    method: str
    seed: int
    lines: list[dict[str, Any]]
    judged: dict[str, float]
    base: dict[str, float]
    images: dict[str, list[float]]
    base_images: dict[str, list[float]]
    folder: Path

    @classmethod
    def read(cls, reward: str, method: str, seed: int, folder: Path) -> Run:
        judged, base = (
            json.loads((place / "judged.json").read_text())
            for place in (folder, folder.parent / "base")
        )
        return cls(
            reward, method, seed, read_log(folder), judged["scores"], base["scores"],
            judged["images"], base["images"], folder,
        )  # fmt: skip

    @property
    def names(self) -> dict[str, str]:
        """What a column is called in a judgement."""
        return {
            "reward": f"reward/{self.reward}",
            "held-out class p": "held_out/class",
            "fd-cifar ↓": "fd-cifar",
            "diversity ↑": "diversity",
            "W2 proxy": "w2_proxy",
        }

    def columns(self, found: Mapping[str, float]) -> dict[str, float]:
        """Scores of a judgement under the names of the columns; too few images have not all."""
        return {column: found[name] for column, name in self.names.items() if name in found}

    def scores(self) -> dict[str, float]:
        """Everything of the table's columns, at the end."""
        share = mean_of([n.get("effective_share") for n in self.lines if "flow_loss" in n][-LAST:])
        extra = {
            "effective share": share,
            "evaluations": float(self.lines[-1]["evaluations"]),
            "minutes": sum(line.get("seconds", 0) for line in self.lines) / 60,
        }
        known = {name: value for name, value in extra.items() if value is not None}
        return self.columns(self.judged) | known

    def values(self, column: str, base: bool = False) -> list[float]:
        """What is paired: the scores of all judged images, or one number of the run."""
        images, name = self.base_images if base else self.images, self.names.get(column)
        if name in images:
            return images[name]
        found = (self.columns(self.base) if base else self.scores()).get(column)
        return [] if found is None else [found]

    def explained(self) -> list[float | None]:
        """The critic's explained variance by level, clean to noise, over the last epochs."""
        rows = [line["explained"] for line in self.lines if "explained" in line][-LAST:]
        return (
            [mean_of([row[place] for row in rows]) for place in range(len(rows[0]))] if rows else []
        )


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of what is known."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None
