"""The small CIFAR-10 model that comes with the package: real input with no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiTTransformer2DModel

from .class_conditional import ClassConditionalPipeline

WEIGHTS = Path(__file__).parent / "embedded_weights"


def load_embedded(
    *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> ClassConditionalPipeline:
    """The embedded class-conditional CIFAR-10 pipeline: 32x32 pixels, flow matching, no download.

    Args:
        dtype: of the network. The weights are stored in float16.
        device: where to put it; None leaves it on the CPU.

    Returns:
        A pipeline ready to call: ``load_embedded()("cat", seeds=[0], guidance_scale=2).images[0]``.

    Raises:
        FileNotFoundError: if the package was installed without its weights.
    """
    folder = weights_folder("model")
    pipe = ClassConditionalPipeline.from_pretrained(folder, **as_dtype(dtype))
    return pipe if device is None else pipe.to(device)


def load_embedded_weak(
    *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> DiTTransformer2DModel:
    """An early checkpoint of the embedded model's own training run: the guide of autoguidance.

    Same inputs and outputs as ``load_embedded().transformer``; arguments and errors as there.
    """
    folder = weights_folder("weak")
    model: Any = DiTTransformer2DModel.from_pretrained(folder, **as_dtype(dtype))
    return model if device is None else model.to(device)


def as_dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """``from_pretrained``'s argument for the dtype; diffusers renamed it in 0.42."""
    release = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if release >= (0, 42) else "torch_dtype": dtype}


def weights_folder(name: Literal["model", "weak"]) -> Path:
    """The folder of the embedded weights.

    Raises:
        FileNotFoundError: if the package was installed without them.
    """
    folder = WEIGHTS / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the embedded weights are missing: no folder {folder}. "
            "A checkout carries them in git: reinstall the package, or train them with "
            "scripts/train.py (docs/embedded_model.md)"
        )
    return folder
