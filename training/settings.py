"""Settings of a run: frozen dataclasses whose fields carry their help, and files of settings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

__all__ = ["Settings", "read_settings", "setting"]


def setting(default: Any, text: str, *, free: bool = False, choices: tuple[str, ...] = ()) -> Any:
    """A setting with its help text; ``free`` ones may change when a run is resumed."""
    return field(default=default, metadata={"help": text, "free": free, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """What every kind of run checks of its settings, and when two runs are the same."""

    def changes(self, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The fields that make another run of it and differ: name to (saved, now)."""
        now = asdict(self)
        bound = [item for item in fields(self) if not item.metadata["free"]]
        # A run from before a setting existed had its default.
        before = {item.name: saved.get(item.name, item.default) for item in bound}
        return {name: (old, now[name]) for name, old in before.items() if old != now[name]}

    def _check_values(self, infinite: Collection[str] = ()) -> None:
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{item.name} must be one of {', '.join(choices)}, got {value!r}")
            finite = not isinstance(value, float) or math.isfinite(value)
            if not finite and (item.name not in infinite or math.isnan(value)):
                raise ValueError(f"{item.name} must be a finite number, got {value}")

    def _need(self, names: Sequence[str], what: str, holds: Callable[[Any], bool]) -> None:
        for name in names:
            if not holds(getattr(self, name)):
                raise ValueError(f"{name} must be {what}, got {getattr(self, name)}")


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML or JSON file, by field name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or holds no mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except ValueError as error:
        raise ValueError(f"config: cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config: {path} must hold names and values, got {type(values).__name__}")
    return values


def _yaml(text: str) -> Any:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError("YAML needs pyyaml (pip install pyyaml); or use JSON") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
