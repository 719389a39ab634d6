"""The five resizes that published numbers were computed with; they differ by up to 18 grey levels.

Each takes a uint8 image (3, H, W) and a side length, and returns float32 (3, side, side) in
[0, 255]; those that are no Pillow's take (B, 3, H, W) too, on any device. Images of the right size
pass through all of them unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..core.tensors import send


def tf1_bilinear(image: Tensor, side: int) -> Tensor:
    """TensorFlow 1's ``resize_bilinear``: corners asymmetric, no antialiasing (ADM, EDM, FID)."""
    return _tf1_axis(_tf1_axis(image.float(), side, -2), side, -1)


def _tf1_axis(image: Tensor, side: int, axis: int) -> Tensor:
    size = image.shape[axis]
    # Float32 positions, as TensorFlow computes them: pixel i of the output looks at i * scale.
    scale = np.float32(size / side).item()
    position = torch.arange(side, dtype=torch.float32, device=image.device) * scale
    low = position.floor().long().clamp_max(size - 1)
    high = (low + 1).clamp_max(size - 1)
    share = (position - low).view(-1, 1) if axis == -2 else position - low
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
    return _interpolated(image, side, "bilinear")


def torch_bicubic_antialias(image: Tensor, side: int) -> Tensor:
    """PyTorch's antialiased bicubic (EDM2's FD-DINOv2); it overshoots and is not clamped."""
    return _interpolated(image, side, "bicubic")


def _interpolated(image: Tensor, side: int, mode: str) -> Tensor:
    batch = image.float() if image.ndim == 4 else image.float()[None]
    found = F.interpolate(batch, (side, side), mode=mode, antialias=True, align_corners=False)
    return found if image.ndim == 4 else found[0]


RESIZES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "tf1-bilinear": tf1_bilinear,
    "pil-bicubic": pil_bicubic,
    "pil-bicubic-float": pil_bicubic_float,
    "torch-bilinear-aa": torch_bilinear_antialias,
    "torch-bicubic-aa": torch_bicubic_antialias,
}


_PILLOWS = ("pil-bicubic", "pil-bicubic-float")


def resized(
    images: Tensor | list[Tensor], side: int, rule: str, *, device: torch.device | str = "cpu"
) -> Tensor:
    """All images resized by the named rule, float32 (B, 3, side, side), on ``device``.

    Args:
        images: uint8, shape (B, 3, H, W), or a list of (3, H, W) of any sizes.
        side: of the square that the extractor takes.
        rule: a key of ``RESIZES``.
        device: of the result; what is no Pillow's is computed there.

    Raises:
        ValueError: if there is no such rule.
    """
    if rule not in RESIZES:
        raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {rule!r}")
    where = torch.device("cpu" if rule in _PILLOWS else device)

    def fitted(part: Tensor) -> Tensor:
        if part.shape[-2:] == (side, side):
            return send(part, device).float()
        return send(RESIZES[rule](send(part, where), side), device)

    # One by one suits a CPU's cache; an accelerator would wait for every small kernel.
    whole = where.type != "cpu" or images[0].shape[-2:] == (side, side)
    if isinstance(images, Tensor) and whole:
        return fitted(images)
    return torch.stack([fitted(image) for image in images])
