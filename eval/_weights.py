"""A folder of ``config.json`` and ``model.safetensors``: written aside, and checked when read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_REMEDY = "restore both files from the same save"


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """The sha256 of names, shapes and values, as 64 hex digits.

    Of values, not bytes: a float16 file and the float32 network read from it agree.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.double().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_folder(folder: Path, note: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write both files; ``weights`` as they are, ``note`` and the digest as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    note = {**note, "weights": weights_digest(weights)}
    _write(folder / WEIGHTS_FILE, save(dict(weights)))
    _write(folder / CONFIG_FILE, (json.dumps(note, indent=2) + "\n").encode())


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The note (without the digest) and the weights.

    Raises:
        FileNotFoundError: The folder or one of the files is not there.
        ValueError: A file is damaged, or the two are not of the same save.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; expected a folder of save_pretrained")
    try:
        note = dict(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged: {error}; {_REMEDY}") from error
    try:
        weights = load((folder / WEIGHTS_FILE).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} is damaged: {error}; {_REMEDY}") from error
    if weights_digest(weights) != note.pop("weights", None):
        raise ValueError(
            f"{folder / WEIGHTS_FILE} is not what {CONFIG_FILE} was written for: "
            f"the checksum differs; {_REMEDY}"
        )
    return note, weights


def rounded(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Kernels and matrices in ``dtype``, all else as it is; on the CPU, contiguous."""
    return {
        name: value.detach().to("cpu", dtype if _is_kernel(value) else value.dtype).contiguous()
        for name, value in weights.items()
    }


def _is_kernel(value: Tensor) -> bool:
    return value.is_floating_point() and sum(side > 1 for side in value.shape) > 1


def _write(file: Path, content: bytes) -> None:
    """Write so that a reader sees the old file or the new one, never a part."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
