"""The five resizes that published numbers were computed with; they differ by up to 18 grey levels.

Each takes one uint8 image (3, H, W) and a side length, and returns float32 (3, side, side) in
[0, 255]. Images of the right size pass through all of them unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def tf1_bilinear(image: Tensor, side: int) -> Tensor:
    """TensorFlow 1's ``resize_bilinear``: corners asymmetric, no antialiasing (ADM, EDM, FID)."""
    rows = _tf1_axis(image.float(), side, 1)
    return _tf1_axis(rows, side, 2)


def _tf1_axis(image: Tensor, side: int, axis: int) -> Tensor:
    size = image.shape[axis]
    # Float32 positions, as TensorFlow computes them: pixel i of the output looks at i * scale.
    position = torch.arange(side, dtype=torch.float32) * np.float32(size / side).item()
    low = position.floor().long().clamp_max(size - 1)
    high = (low + 1).clamp_max(size - 1)
    share = (position - low).view([-1 if d == axis else 1 for d in range(3)])
    first, second = image.index_select(axis, low), image.index_select(axis, high)
    return first + (second - first) * share


def pil_bicubic(image: Tensor, side: int) -> Tensor:
    """Pillow's antialiased bicubic on uint8, rounded to uint8 (dgm-eval, DINOv2)."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    resized = picture.resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()


def pil_bicubic_float(image: Tensor, side: int) -> Tensor:
    """Pillow's antialiased bicubic on float32 channels, unrounded (clean-fid)."""
    channels = [
        np.array(Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC))
        for channel in image.float().numpy()
    ]
    return torch.from_numpy(np.stack(channels)).clamp(0, 255)


def torch_bilinear_antialias(image: Tensor, side: int) -> Tensor:
    """PyTorch's antialiased bilinear, half-pixel centres (torchmetrics' default since 1.5)."""
    return F.interpolate(
        image.float()[None], (side, side), mode="bilinear", antialias=True, align_corners=False
    )[0]


def torch_bicubic_antialias(image: Tensor, side: int) -> Tensor:
    """PyTorch's antialiased bicubic (EDM2's FD-DINOv2); it overshoots and is not clamped."""
    return F.interpolate(
        image.float()[None], (side, side), mode="bicubic", antialias=True, align_corners=False
    )[0]


RESIZES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "tf1-bilinear": tf1_bilinear,
    "pil-bicubic": pil_bicubic,
    "pil-bicubic-float": pil_bicubic_float,
    "torch-bilinear-aa": torch_bilinear_antialias,
    "torch-bicubic-aa": torch_bicubic_antialias,
}


def resized(images: Tensor | list[Tensor], side: int, rule: str) -> Tensor:
    """Resize every image singly by the named rule and stack them, float32 (B, 3, side, side).

    Args:
        images: uint8, shape (B, 3, H, W), or a list of (3, H, W) of any sizes.
        side: of the square that the extractor takes.
        rule: a key of ``RESIZES``.

    Raises:
        ValueError: if there is no such rule.
    """
    if rule not in RESIZES:
        raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {rule!r}")
    if isinstance(images, Tensor) and images.shape[-2:] == (side, side):
        return images.float()
    resize = RESIZES[rule]
    return torch.stack(
        [
            image.float() if image.shape[-2:] == (side, side) else resize(image.cpu(), side)
            for image in images
        ]
    )
