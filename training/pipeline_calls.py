"""What fine-tuning needs of a pipeline's call, whatever the pipeline: arguments in, images out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["check_call", "guidance_arguments", "pipeline_images"]


def check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Refuse pipelines that cannot be trained here, and arguments that they do not take.

    Raises:
        ValueError: the pipeline takes no steps, generator or output type, or not all of ``call``.
    """
    taken, name = inspect.signature(pipe.__call__).parameters, type(pipe).__name__
    for needed in ("num_inference_steps", "generator", "output_type"):
        if needed not in taken:
            raise ValueError(f"{name} takes no {needed}, so it cannot be trained here")
    unknown = sorted(set(call) - set(taken))
    if unknown:
        raise ValueError(
            f"call: {name} takes no argument {unknown[0]!r}; it takes {', '.join(taken)}"
        )


def guidance_arguments(
    pipe: Any, scale: float, count: int, *, negative: bool = True
) -> dict[str, Any]:
    """The arguments of the pipeline's call that set the scale of its own guidance.

    Args:
        pipe: a diffusers pipeline.
        scale: 1 is no guidance.
        count: images of the call.
        negative: give an empty negative prompt where guidance asks for one.

    Raises:
        ValueError: guidance is asked for and the pipeline has none.
    """
    taken = inspect.signature(pipe.__call__).parameters
    if "true_cfg_scale" in taken:  # Flux, Qwen: guidance_scale is an input of the network there
        given = {"negative_prompt": [""] * count} if scale > 1 and negative else {}
        return {"true_cfg_scale": scale, **given}
    if "guidance_scale" in taken:
        return {"guidance_scale": scale}
    if scale > 1:
        raise ValueError(
            f"guidance_scale: {type(pipe).__name__} has no classifier-free guidance; use 1"
        )
    return {}


def pipeline_images(output: Any, count: int) -> Tensor:
    """Images of a pipeline's output, (B, 3, H, W) float32 in [0, 1]; of videos the middle frame.

    Raises:
        ValueError: it holds another number of images.
    """
    images = getattr(output, "images", None)
    images = getattr(output, "frames", None) if images is None else images
    if isinstance(images, Tensor) and images.ndim == 5:
        images = images[:, images.shape[1] // 2]
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) != count:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"the pipeline was asked for {count} images and gave {found}")
    return images.detach().float().clamp(0, 1)
