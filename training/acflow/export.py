"""The result of a run: a LoRA that diffusers loads, or a pipeline folder; and its pictures."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from ...pipelines.files import write_png
from ...pipelines.grid import image_grid
from .lora import lora_state
from .policy import Policy

__all__ = ["before_and_after", "save_result"]


def save_result(pipe: Any, policy: Policy, out: Path, *, write: bool = True) -> Path | None:
    """Write ``out/lora`` where the pipeline can load it, else ``out/model``; returns the folder.

    Whatever was there before stays until the new one is complete.

    Args:
        pipe: the pipeline, whose denoiser ``policy`` trains.
        policy: with the weights to be saved.
        out: the folder of the run.
        write: whether this rank writes; all of them call this, for their shards of the weights.
    """
    loads = hasattr(pipe, "save_lora_weights") and hasattr(pipe, "load_lora_weights")
    lora = policy.tune == "lora" and loads
    name = "lora" if lora else "model"
    argument = f"{_component(pipe, policy.module)}_lora_layers"
    if lora and argument not in inspect.signature(pipe.save_lora_weights).parameters:
        raise ValueError(f"{type(pipe).__name__}.save_lora_weights takes no {argument}")
    weights = lora_state(policy.module, keep=write) if lora else policy.merged(keep=write)
    if not write:
        return None
    aside, final = out / f".{name}.writing", out / name
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if lora:
        pipe.save_lora_weights(aside, **{argument: weights})
    else:
        _save_pipeline(pipe, policy, weights, aside)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    return final


def before_and_after(
    path: Path,
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    labels: Sequence[str],
    *,
    pairs: int = 10,
) -> None:
    """A grid of two rows, the same seeds before and after, one column a prompt.

    Args:
        path: of the PNG.
        before: pictures of the base model.
        after: those of the trained one, same order.
        labels: headings of the columns.
        pairs: columns at most.
    """
    count = min(pairs, len(before), len(after))
    heads = [text if len(text) <= 16 else f"{text[:15]}…" for text in labels[:count]]
    pictures = [*before[:count], *after[:count]]
    write_png(path, image_grid(pictures, count, heads=heads, rows=["before", "after"]))


def _component(pipe: Any, module: nn.Module) -> str:
    return next(name for name, part in pipe.components.items() if part is module)


def _save_pipeline(pipe: Any, policy: Policy, weights: dict[str, Tensor], folder: Path) -> None:
    """Save the pipeline with a fresh network of these weights, in the dtype of the base."""
    name = _component(pipe, policy.module)
    fresh: Any = type(policy.module).from_config(policy.module.config)  # type: ignore[attr-defined]
    fresh.load_state_dict(weights)
    nn.Module.to(fresh, policy.dtype)
    # register_modules is what sets a component and its entry in model_index.json.
    pipe.register_modules(**{name: fresh})
    try:
        pipe.save_pretrained(folder)
    finally:
        pipe.register_modules(**{name: policy.module})
