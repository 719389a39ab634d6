"""Checkpoints that are either whole or not there: written aside, flushed, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

PREFIX = "step-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write ``folder/step-N`` and then remove all but the newest ``keep``; a failure leaves the others untouched.

    Args:
        folder: Where the checkpoints of a run are.
        step: Updates made so far.
        state: Tensors, numbers, strings and containers of them.
        keep: How many to keep.

    Raises:
        OSError: The disk is full or cannot be written; the half-written one is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{PREFIX}{step:08d}"
    aside = folder / f".writing-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        with open(aside / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        note = {"step": step, "sha256": _digest(aside / "state.pt")}
        write_json(aside / "checkpoint.json", note)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for left in folder.glob(".writing-*"):  # of runs that were killed while they wrote
        shutil.rmtree(left, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if (path / "checkpoint.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint back, on the CPU.

    Raises:
        CheckpointError: A file is missing, damaged or not of this program.
    """
    remedy = f"delete {path} to resume from the one before it"
    try:
        note = json.loads((path / "checkpoint.json").read_text())
        whole = _digest(path / "state.pt") == note["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint {path} is incomplete ({error}); {remedy}") from error
    if not whole:
        raise CheckpointError(f"the checkpoint {path} is damaged: its checksum does not match; {remedy}")
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read ({error}); {remedy}") from error
    if not isinstance(state, dict) or state.get("step") != note["step"]:
        raise CheckpointError(f"the checkpoint {path} is not one of a training run; {remedy}")
    return state


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "w") as file:
            json.dump(value, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _chunks(file)


def _chunks(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
