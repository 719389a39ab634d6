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

__all__ = [
    "CheckpointError",
    "list_checkpoints",
    "load_checkpoint",
    "save_checkpoint",
    "write_json",
]

PREFIX, ASIDE = "step-", ".writing-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write ``folder/step-N``, then remove all but the newest ``keep``.

    A failure, or a kill at any moment, leaves the earlier checkpoints as they are.

    Args:
        folder: where the checkpoints of a run are.
        step: updates made so far; also ``state["step"]``.
        state: tensors, numbers, strings and containers of them.
        keep: how many to keep.

    Raises:
        OSError: the disk is full or cannot be written; the half-written one is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, aside = folder / f"{PREFIX}{step:08d}", folder / f"{ASIDE}{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        _write_state(aside / "state.pt", state)
        write_json(aside / "checkpoint.json", {"step": step, "sha256": _digest(aside / "state.pt")})
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(
                error.errno,
                f"cannot write the checkpoint of step {step} ({error.strerror or error}); the "
                f"earlier ones are untouched: make room and run the same command again",
                str(folder),
            ) from error
        raise
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for left in folder.glob(f"{ASIDE}*"):  # of runs that were killed while they wrote
        shutil.rmtree(left, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if (path / "checkpoint.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint back, on the CPU.

    Raises:
        CheckpointError: a file is missing, damaged or not of this program.
    """
    remedy = f"delete {path} to resume from the one before it"
    try:
        note = json.loads((path / "checkpoint.json").read_text())
        whole = _digest(path / "state.pt") == note["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint {path} is incomplete ({error}); {remedy}") from error
    if not whole:
        raise CheckpointError(
            f"the checkpoint {path} is damaged: its checksum does not match; {remedy}"
        )
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read ({error}); {remedy}"
        ) from error
    if not isinstance(state, dict) or state.get("step") != note.get("step"):
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
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _write_state(path: Path, state: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides a full disk behind its own
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
