"""Sample grids drawn during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import derive_seed

__all__ = ["preview", "save_grid"]


def preview(pipe: Any, path: Path, *, rows: int = 2, scale: float = 2.5, steps: int = 20) -> None:
    """Write a PNG grid, always from the same noise: a column a class (of the first ten).

    Args:
        pipe: a ``ClassConditionalPipeline``.
        path: of the picture.
        rows: images of a class.
        scale: of plain guidance.
        steps: solver steps.
    """
    columns = min(pipe.num_classes, 10)
    labels = list(range(columns)) * rows
    seeds = [derive_seed("preview", index) for index in range(len(labels))]
    call = {"guidance_scale": scale, "num_inference_steps": steps, "output_type": "latent"}
    save_grid(pipe(labels, seeds=seeds, **call).images, path, columns=columns)


def save_grid(images: Tensor, path: Path, *, columns: int) -> None:
    """Write images in [-1, 1], (B, 3, H, W), as one PNG, row by row."""
    from PIL import Image

    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    rows = [torch.cat(list(row), dim=-1) for row in pixels.split(columns)]
    picture = torch.cat(rows, dim=-2).permute(1, 2, 0).contiguous().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    Image.fromarray(picture).save(aside, format="PNG")
    aside.replace(path)
