"""The prompt of each sample: from run.json, or a file of prompts."""

from __future__ import annotations

import json
from pathlib import Path

from .images import ImageSource
from .labels import match_files
from .runs import read_run, values_of


def find_prompts(source: ImageSource, how: str | None = None) -> list[str] | None:
    """Prompts of all images of ``source``, in their order, or None where there are none.

    Args:
        source: from ``open_images``.
        how: None looks at the ``run.json`` that ``generate.py`` wrote; otherwise a file: .jsonl
            with an object of "file" and "prompt" a line, or text with a prompt a line, in the order
            of the images.

    Raises:
        ValueError: if the file cannot be read, or has no prompt for some image.
    """
    if how is None:
        by_file = values_of(read_run(source.where), "prompt")
        where = f"{source.where}/run.json"
        return match_files(source, by_file, where, "prompt") if by_file else None
    try:
        lines = [
            line for line in Path(how).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
        rows = [json.loads(line) for line in lines] if how.endswith(".jsonl") else None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read prompts from {how}: {error}") from error
    if rows is not None:
        if not all(isinstance(r, dict) and {"file", "prompt"} <= r.keys() for r in rows):
            raise ValueError(f"{how}: expected an object with file and prompt in every line")
        by_file = {str(row["file"]): str(row["prompt"]) for row in rows}
        return match_files(source, by_file, how, "prompt")
    if len(lines) != len(source):
        raise ValueError(f"{how} has {len(lines)} prompts for {len(source)} images")
    return [line.strip() for line in lines]
