"""The folder of a training run: what it was started with, its history and its curve."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .checkpoint import CheckpointError, list_checkpoints, load_checkpoint, write_json
from .config import TrainConfig
from .data import Images

__all__ = [
    "append_line",
    "check_free",
    "check_run",
    "keep_lines",
    "newest_state",
    "note_part",
    "note_versions",
    "read_lines",
    "read_run",
]

CONFIG, DATA, HISTORY = "config.json", "data.json", "history.jsonl"
CURVE, SCORES = "loss.jsonl", "scores.jsonl"


def check_free(out: Path, *, begun: str = "") -> None:
    """Refuse a folder in which no run was begun and somebody else's files lie.

    Folders in it are no obstacle: trackers make theirs before the run begins.

    Args:
        out: the folder.
        begun: the file that every run begins with. Where it is there by now, another rank has begun
            the run since the caller looked for it.

    Raises:
        CheckpointError: with the name of such a file.
    """
    files = sorted(p.name for p in out.glob("*") if p.is_file() and not p.name.startswith("."))
    if files and begun not in files:
        raise CheckpointError(
            f"{out} holds {files[0]} and no training run; give another folder as --out"
        )


def check_run(
    out: Path, config: TrainConfig, images: Images, allow_change: tuple[str, ...] = ()
) -> dict[str, tuple[Any, Any]]:
    """What differs between the run that lies in ``out``, if any, and the one that is asked for.

    Args:
        out: the folder.
        config: what is asked for.
        images: the data.
        allow_change: names of fields that may differ, "data" for other images.

    Returns:
        The allowed differences: name to (before, now).

    Raises:
        CheckpointError: another field differs; the message names it, both values and the remedy.
            Or the folder holds something else.
    """
    known = [*asdict(config), "data"]
    for name in allow_change:
        if name not in known:
            raise ValueError(f"allow_change names {name!r}; the settings are {', '.join(known)}")
    if not (out / CONFIG).exists():
        check_free(out, begun=CONFIG)
    changed = config.changes(_read(out / CONFIG)) if (out / CONFIG).exists() else {}
    if (out / DATA).exists():
        before, now = _read(out / DATA)["digest"], images.digest()
        if before != now:
            changed["data"] = (before, now)
    for name, (before, now) in changed.items():
        if name not in allow_change:
            raise CheckpointError(
                f"the run in {out} was started with {name}={before!r}, now it is {now!r}; use the "
                f"old value, another folder, or --allow-change {name}"
            )
    return changed


def newest_state(out: Path) -> dict[str, Any] | None:
    """The newest checkpoint of the run, or None where there is none yet.

    Raises:
        CheckpointError: it is damaged.
    """
    found = list_checkpoints(out / "checkpoints")
    return load_checkpoint(found[-1]) if found else None


def note_part(
    out: Path,
    config: TrainConfig,
    images: Images,
    *,
    step: int,
    changed: dict[str, tuple[Any, Any]],
) -> None:
    """Note that the run starts or goes on at ``step``; drop what curve and scores say of later."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CONFIG, asdict(config))
    data = {"digest": images.digest(), "count": len(images), "names": list(images.names)}
    write_json(out / DATA, data)
    note_versions(out, changed, from_step=step)
    for name in (CURVE, SCORES):
        keep_lines(out / name, lambda line: line["step"] <= step)


def note_versions(out: Path, changed: Mapping[str, Sequence[Any]], **start: int) -> None:
    """Add a line to the history of a run: where it starts or goes on, and with which versions."""
    import diffusers

    part = {
        **start,
        "unix_time": round(time.time()),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "changed": {name: list(pair) for name, pair in changed.items()},
    }
    append_line(out / HISTORY, part)


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the lines of a log that ``keep`` refuses; a stop in between loses none."""
    if path.exists():
        lines = [line for line in read_lines(path) if keep(line)]
        aside = path.with_name(f".{path.name}")
        aside.write_text("".join(json.dumps(line) + "\n" for line in lines))
        aside.replace(path)


def read_run(out: Path) -> tuple[TrainConfig, tuple[str, ...]]:
    """The config and the class names of the run in ``out``.

    Raises:
        FileNotFoundError: there is no run.
    """
    if not (out / CONFIG).exists() or not (out / DATA).exists():
        raise FileNotFoundError(f"there is no training run in {out}")
    return TrainConfig(**_read(out / CONFIG)), tuple(_read(out / DATA)["names"])


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON line."""
    with open(path, "a") as file:
        file.write(json.dumps(value) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; a last line that a kill cut short is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); start in another folder") from error
    return value
