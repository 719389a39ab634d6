"""What the ``run.json`` beside generated images says about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_run(folder: str | Path) -> dict[str, Any]:
    """The folder's ``run.json``, or an empty dict where there is none.

    Raises:
        ValueError: if it is no valid JSON.
    """
    path = Path(folder) / "run.json"
    if not path.is_file():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}; pass --labels instead") from error
    return run if isinstance(run, dict) else {}


def values_of(run: dict[str, Any], what: str) -> dict[str, Any]:
    """The "label" or "prompt" of each file, relative to the folder; empty where there are none."""
    images = run.get("images")
    if not isinstance(images, list):
        return {}
    entries = [entry for entry in images if isinstance(entry, dict) and "file" in entry]
    return {entry["file"]: entry[what] for entry in entries if entry.get(what) is not None}


def incomplete(folder: str | Path) -> list[str]:
    """A warning if the generation of the folder was not finished."""
    if read_run(folder).get("complete", True):
        return []
    return [f"{folder}: run.json says that its generation is not complete"]


def guidance_scale(run: dict[str, Any]) -> float | None:
    """The guidance scale of a run, through wrappers; None where it is no single number."""
    config = run.get("config")
    guidance = config.get("guidance") if isinstance(config, dict) else None
    return _find_scale(guidance)


def _find_scale(node: Any) -> float | None:
    if not isinstance(node, dict):
        return None
    for name in ("scale", "guidance_scale"):
        value = node.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    found = [scale for child in node.values() if (scale := _find_scale(child)) is not None]
    return found[0] if len(found) == 1 else None


def sweep_axis(folders: Sequence[str]) -> list[float] | None:
    """The guidance scales of several folders, or None if one is unknown or all are the same."""
    scales = [guidance_scale(read_run(folder)) for folder in folders]
    known = [scale for scale in scales if scale is not None]
    return known if len(known) == len(scales) > 1 and len(set(known)) > 1 else None
