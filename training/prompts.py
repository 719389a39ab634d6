"""What is asked for in fine-tuning by reward: prompts from a file, or the classes of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..pipelines.generation import class_table, takes_classes
from ..pipelines.labels import label_ids

__all__ = ["Prompt", "call_inputs", "class_prompts", "read_prompts"]


@dataclass(frozen=True)
class Prompt:
    """One thing to show.

    Args:
        text: the prompt, or the name of the class.
        metadata: what the rewards are given beside it.
        label: the class index for models that take classes, None for those that take prompts.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    label: int | None = None


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file: one a line, or JSONL ``{"prompt": ..., further metadata}``.

    Empty lines are skipped. A file whose name ends in ``.jsonl`` is JSONL.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line cannot be read, a prompt occurs twice, or there is none; the message
            names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"prompts: there is no file {path}")
    found: dict[str, int] = {}
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        prompt = _of_json(line, path, number) if path.suffix == ".jsonl" else Prompt(line.strip())
        if prompt.text in found:
            raise ValueError(
                f"prompts: line {number} of {path} repeats line {found[prompt.text]}, "
                f"{prompt.text!r}; leave one of them out"
            )
        found[prompt.text] = number
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"prompts: {path} holds none")
    return prompts


def class_prompts(pipe: Any, classes: Any = None) -> list[Prompt]:
    """The classes of a class-conditional pipeline as prompts.

    Args:
        pipe: the pipeline.
        classes: indices or names, None for all.

    Returns:
        Prompts whose text is the name of the class and whose metadata are ``label`` (its index)
        and ``class`` (its name).

    Raises:
        ValueError: the pipeline takes no classes, or one is unknown or given twice.
    """
    if not takes_classes(pipe):
        raise ValueError(f"classes: {type(pipe).__name__} takes prompts; give a prompt file")
    count, ids = class_table(pipe)
    labels = list(range(count)) if classes is None else label_ids(classes, count, ids)
    if len(set(labels)) < len(labels) or not labels:
        raise ValueError(f"classes: expected different ones, at least one, got {classes!r}")
    names = {index: name for name, index in reversed(ids.items())}
    texts = [names.get(label, f"class {label}") for label in labels]
    return [
        Prompt(text, {"label": label, "class": text}, label)
        for text, label in zip(texts, labels, strict=True)
    ]


def call_inputs(pipe: Any, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The arguments of the pipeline's call that say what to show: ``class_labels`` or ``prompt``.

    Raises:
        ValueError: the pipeline takes classes and a prompt has no label.
    """
    if not takes_classes(pipe):
        return {"prompt": [prompt.text for prompt in prompts]}
    labels = [prompt.label for prompt in prompts]
    if None in labels:
        missing = prompts[labels.index(None)].text
        raise ValueError(
            f"{type(pipe).__name__} takes classes, but the prompt {missing!r} has no label"
        )
    return {"class_labels": labels}


def _of_json(line: str, path: Path, number: int) -> Prompt:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"prompts: line {number} of {path} is no JSON: {error}") from error
    text = values.get("prompt") if isinstance(values, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f'prompts: line {number} of {path} must be an object with a "prompt", got {line[:80]!r}'
        )
    return Prompt(text.strip(), {name: v for name, v in values.items() if name != "prompt"})
