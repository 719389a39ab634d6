"""What the parts of reproduce_targets.py share: points that are done once, intervals, tables."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

Point = dict[str, Any]
T_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Points:
    """Finished points of a part, one JSON file each: a stopped run goes on at the next one.

    Args:
        folder: of the part.
        settings: what the points depend on; a folder made with others is refused.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "settings.json"
        before = json.loads(note.read_text()) if note.is_file() else settings
        if before != settings:
            odd = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
            raise ValueError(
                f"{folder} was made with other settings ({', '.join(odd)}); use another --out, or "
                "delete that folder"
            )
        write(note, settings)

    def fill(self, names: Sequence[str], make: Callable[[str], Point], title: str) -> list[Point]:
        """Every point, made now where it is missing."""
        shown = None if sys.stderr.isatty() else True
        return [self._one(n, make) for n in tqdm(names, desc=title, unit="point", disable=shown)]

    def _one(self, name: str, make: Callable[[str], Point]) -> Point:
        path = self.folder / f"{name}.json"
        if not path.is_file():
            began = time.time()
            point = make(name)
            write(path, {"name": name, **point, "seconds": round(time.time() - began, 1)})
        found: Point = json.loads(path.read_text())
        return found


def write(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(aside, path)


def interval(values: Iterable[float], digits: int = 3) -> str:
    """Mean and the 95 % interval of the mean by Student's t; the mean alone of one value."""
    rows = list(values)
    mean = sum(rows) / len(rows)
    if len(rows) == 1:
        return f"{mean:.{digits}f}"
    spread = math.sqrt(sum((v - mean) ** 2 for v in rows) / (len(rows) - 1) / len(rows))
    return f"{mean:.{digits}f} ± {T_95.get(len(rows) - 1, 1.96) * spread:.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])
