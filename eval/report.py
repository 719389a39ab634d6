"""The result of an evaluation: values, their errors, and all that made them."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class Score:
    """One number of a result.

    Args:
        name: such as "fd-cifar" or "precision".
        value: the number.
        stderr: its standard error (or spread over splits), None where none is known.
        higher_is_better: None where neither is (saturation).
        count: generated samples that it was computed from.
    """

    name: str
    value: float
    stderr: float | None = None
    higher_is_better: bool | None = None
    count: int = 0

    @property
    def label(self) -> str:
        """The name with the sample count, ``fd-cifar@5000``: distances compare at equal N only."""
        return f"{self.name}@{self.count}"


@dataclass(frozen=True)
class EvalResult:
    """Scores by name, what was left out and why, warnings, and the meta data of the run.

    ``curves`` holds points, x and y: sample counts and distances behind ``fd_infinity``, and the
    scores over k of ``over_k``.
    """

    scores: dict[str, Score]
    meta: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    per_class: dict[str, list[float]] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        """The bare numbers by name."""
        return {name: score.value for name, score in self.scores.items()}

    @property
    def stderr(self) -> dict[str, float]:
        """Standard errors by name, where there are any."""
        known = {name: s.stderr for name, s in self.scores.items()}
        return {n: e for n, e in known.items() if e is not None and not math.isnan(e)}

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data; NaN becomes None."""
        plain: dict[str, Any] = _plain(
            {
                "values": self.values,
                "stderr": self.stderr,
                "labels": {name: score.label for name, score in self.scores.items()},
                "higher_is_better": {n: s.higher_is_better for n, s in self.scores.items()},
                "per_class": self.per_class,
                "curves": self.curves,
                "skipped": self.skipped,
                "warnings": self.warnings,
                "meta": self.meta,
            }
        )
        return plain

    def to_json(self) -> str:
        """Everything as indented JSON."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False)

    def table(self) -> str:
        """A text table of this result alone; see ``table`` for several."""
        return table([("", self)])


def table(results: Sequence[tuple[str, EvalResult]]) -> str:
    """A text table: one row a metric, one column a result; errors after ±."""
    names = list(dict.fromkeys(name for _, result in results for name in result.scores))
    heads = ["metric", *(title or "value" for title, _ in results)]
    rows = [heads]
    for name in names:
        found = [result.scores.get(name) for _, result in results]
        score = next(s for s in found if s is not None)
        arrow = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
        same = len({s.label for s in found if s is not None}) == 1
        rows.append([(score.label if same else name) + arrow, *(_cell(s, same) for s in found)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]  # fmt: skip
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cell(score: Score | None, same: bool) -> str:
    if score is None:
        return "-"
    text = f"{score.value:.5g}"
    if score.stderr is not None and not math.isnan(score.stderr):
        text += f" ± {score.stderr:.2g}"
    return text if same else f"{text} @{score.count}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_text(path: Path, text: str, *, overwrite: bool = False) -> None:
    """Write ``text`` beside its place and rename: a reader never sees half a file.

    Raises:
        FileExistsError: if ``path`` exists and ``overwrite`` is false.
    """
    with whole_file(path, overwrite=overwrite) as file:
        file.write(text.encode())


@contextmanager
def whole_file(path: Path, *, overwrite: bool = False) -> Iterator[IO[bytes]]:
    """A file to write into, which takes the place of ``path`` at the end, or vanishes on an error.

    Raises:
        FileExistsError: if ``path`` exists and ``overwrite`` is false.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another place or pass --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk does not say which file was being written
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def read_result(path: str | Path) -> EvalResult:
    """Read a result that ``EvalResult.to_json`` wrote.

    Raises:
        ValueError: if the file is missing or no such result.
    """
    found = read_results(path)
    if len(found) != 1:
        raise ValueError(f"{path} holds {len(found)} results; read them with read_results")
    return found[0][1]


def read_results(path: str | Path) -> list[tuple[str, EvalResult]]:
    """Every result of a file of ``evaluate.py``, named by its folder, or by the file if alone.

    Raises:
        ValueError: if the file is missing or holds no result.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        several = data["results"] if "results" in data else {str(path): data}
        return [(name, _result(one)) for name, one in several.items()]
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no result of evaluate.py: {error}") from error


def _result(data: dict[str, Any]) -> EvalResult:
    scores = {}
    for name, value in data["values"].items():
        label = data["labels"][name]
        scores[name] = Score(
            name,
            math.nan if value is None else value,
            data["stderr"].get(name),
            data["higher_is_better"].get(name),
            int(label.rpartition("@")[2]),
        )
    return EvalResult(scores, data["meta"], data["warnings"], data["skipped"],
                      data["per_class"], data.get("curves", {}))  # fmt: skip
