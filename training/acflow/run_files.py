"""The folder of a fine-tuning run: what it was started with, its history and its log."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..checkpoint import CheckpointError, write_json
from ..prompts import Prompt
from ..run_folder import check_free, keep_lines, note_versions, read_lines
from .config import ACFlowConfig

__all__ = ["LOG", "check_same_run", "note_start", "prompts_digest", "read_log"]

CONFIG, INPUTS, LOG = "config.json", "inputs.json", "log.jsonl"


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """A text that differs where prompts or their metadata differ."""
    rows = [[p.text, p.label, sorted(p.metadata.items())] for p in prompts]
    return hashlib.blake2b(repr(rows).encode(), digest_size=16).hexdigest()


def check_same_run(
    out: Path,
    config: ACFlowConfig,
    inputs: Mapping[str, Any],
    allow_change: Sequence[str] = (),
) -> dict[str, Any]:
    """What differs between the run in ``out``, if there is one, and the one that is asked for.

    Args:
        out: the folder.
        config: what is asked for.
        inputs: further things that make it the same run, by name: base model, prompts, rewards.
        allow_change: names of settings or inputs that may differ.

    Returns:
        The allowed differences: name to (before, now).

    Raises:
        ValueError: ``allow_change`` names something unknown.
        CheckpointError: something else differs; the message names it, both values and the remedy.
    """
    known = [*asdict(config), *inputs]
    for name in allow_change:
        if name not in known:
            raise ValueError(f"allow_change names {name!r}; the settings are {', '.join(known)}")
    if not (out / CONFIG).exists():
        check_free(out, begun=CONFIG)
        return {}
    saved, before = _read(out / CONFIG), _read(out / INPUTS)
    # A run from before a setting existed lacks it; one of another kind lacks all of that kind.
    own = set(asdict(config)) - {item.name for item in fields(ACFlowConfig)}
    if not own <= set(saved) <= set(asdict(config)):
        raise CheckpointError(
            f"the run in {out} is of another kind: its settings are {', '.join(sorted(saved))}; "
            "use another folder"
        )
    changed: dict[str, Any] = dict(config.changes(saved))
    changed |= {n: (before.get(n), v) for n, v in inputs.items() if before.get(n) != v}
    for name, (then, now) in changed.items():
        if name not in allow_change:
            raise CheckpointError(
                f"the run in {out} was started with {name}={then!r}, now it is {now!r}; use what "
                f"it was started with, another folder, or --allow-change {name}"
            )
    return changed


def note_start(
    out: Path,
    config: ACFlowConfig,
    inputs: Mapping[str, Any],
    *,
    epoch: int,
    changed: Mapping[str, Any],
) -> None:
    """Note that the run starts or goes on after ``epoch`` epochs; drop what the log has beyond."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / INPUTS, dict(inputs))
    write_json(out / CONFIG, asdict(config))
    note_versions(out, changed, from_epoch=epoch)
    keep_lines(out / LOG, lambda line: epoch > 0 and line["epoch"] <= epoch)


def read_log(out: Path) -> list[dict[str, Any]]:
    """The lines of the log, oldest first; none where there is no run."""
    return read_lines(out / LOG) if (out / LOG).exists() else []


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); start in another folder") from error
    return value
