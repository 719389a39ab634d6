"""Command-line options from the fields of a config dataclass, over a config file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffsteer.training.settings import read_settings

PREFIX = "setting_"


def add_config_options(parser: argparse.ArgumentParser, *configs: type) -> None:
    """Add ``--config`` and a flag for every field of the dataclasses, each once.

    A flag that is not given has no value, so that files and named methods can speak.
    """
    parser.add_argument("--config", type=Path, help="YAML or JSON file of settings by name")
    group, seen = parser.add_argument_group("settings"), set()
    for item in (item for config in configs for item in fields(config)):
        if item.name in seen:
            continue
        seen.add(item.name)
        flag, kind = "--" + item.name.replace("_", "-"), type(item.default)
        options: dict[str, Any] = {
            "dest": PREFIX + item.name,
            "default": argparse.SUPPRESS,
            "help": f"{item.metadata['help']} (default: {_shown(item.default)})".replace("%", "%%"),
        }
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            choices = item.metadata["choices"] or None
            options["metavar"] = None if choices else item.name.upper()
            group.add_argument(flag, type=kind, choices=choices, **options)


def read_config(
    args: argparse.Namespace, config: type, defaults: Mapping[str, Any] | None = None
) -> Any:
    """The config that the command line asks for: defaults, then the file, then the flags.

    Raises:
        ValueError: a setting is unknown or out of range, or the file cannot be read.
        FileNotFoundError: there is no such file.
    """
    from_file = read_settings(args.config) if args.config else {}
    given = {
        name.removeprefix(PREFIX): value
        for name, value in vars(args).items()
        if name.startswith(PREFIX)
    }
    known = {item.name: type(item.default) for item in fields(config)}
    for name in (*from_file, *given):
        if name not in known:
            raise ValueError(f"{name} is no setting here; the settings are {', '.join(known)}")
    from_file = {name: _as(known[name], value, name) for name, value in from_file.items()}
    return config(**{**(defaults or {}), **from_file, **given})


def _as(kind: type, value: Any, name: str) -> Any:
    """A value of a file in the type of its field: YAML reads 1e-4 as text and 1 as an integer."""
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"config: {name} must be true or false, got {value!r}")
    if kind is int and (isinstance(value, bool) or int(value) != float(value)):
        raise ValueError(f"config: {name} must be an integer, got {value!r}")
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config: {name} must be a {kind.__name__}, got {value!r}") from error


def _shown(value: Any) -> Any:
    return "none" if value == "" else value
