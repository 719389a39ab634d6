"""What the two scripts for fine-tuning share: options of a run, and what it is asked to show."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _cli

from diffsteer.pipelines import takes_classes
from diffsteer.training.prompts import Prompt, class_prompts, read_prompts

REWARDS: dict[str, Any] = {"nargs": "+", "metavar": "REWARD[:OPTION=VALUE][@WEIGHT]"}


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the folder, the model, what it is asked to show, and how a run goes on."""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the run; an unfinished run goes on")
    add("--model", default="embedded", help="embedded (default), a pipeline folder, or a hub id")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--held-out", **REWARDS, help="what to watch without training on it")
    add("--prompts", type=Path, help="text file, or JSONL of {prompt, metadata}")
    add("--classes", help="class names or numbers by commas, for models that take classes")
    add("--call", type=_cli.json_mapping, default={}, help="JSON: more arguments of the pipeline")
    named: dict[str, Any] = {"nargs": "+", "default": [], "metavar": "SETTING"}
    add("--allow-change", **named, help="what may differ on resuming")
    add("--save-only", action="store_true", help="save the newest checkpoint, train nothing")
    _cli.add_device_option(parser)


def prompts_of(pipe: Any, args: argparse.Namespace) -> list[Prompt]:
    """What the command line asks to show.

    Raises:
        ValueError: classes were given to a pipeline that takes prompts, or the other way round.
    """
    if takes_classes(pipe):
        if args.prompts:
            raise ValueError(f"--prompts: {type(pipe).__name__} takes classes; give --classes")
        names = args.classes.split(",") if args.classes else None
        classes = [int(n) if n.strip().isdigit() else n.strip() for n in names] if names else None
        return class_prompts(pipe, classes)
    if args.classes or not args.prompts:
        raise ValueError(f"{type(pipe).__name__} takes prompts: give --prompts FILE, no --classes")
    return read_prompts(args.prompts)
