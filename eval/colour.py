"""Saturation, contrast and clipped pixels: what too much guidance does to colours.

No paper's code fixes these definitions, so they are stated here and are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.tensors import send

# Rec. 601 luma, the weights of JPEG and of PIL's "L" mode.
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class ColourStats:
    """One value an image, each of shape (B,), in [0, 1] (contrast: at most 0.5)."""

    saturation: Tensor
    contrast: Tensor
    clipped: Tensor


def colour_stats(images: Tensor) -> ColourStats:
    """Saturation, contrast and clipped share of each image.

    Saturation is the mean over pixels of HSV's S, ``(max - min) / max`` of the three channels, 0
    for black. Contrast is the population standard deviation over pixels of the Rec. 601 luma.
    Clipped is the share of pixels with at least one channel at 0 or 255.

    Args:
        images: shape (B, 3, H, W), uint8.

    Raises:
        TypeError: if ``images`` is not uint8; which value is clipped is known only there.
        ValueError: if there are not three channels.
    """
    if images.dtype != torch.uint8:
        raise TypeError(
            f"images must be uint8 in [0, 255], got {images.dtype}; quantise them first"
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
    pixels = images.float() / 255
    high, low = pixels.amax(1), pixels.amin(1)
    saturation = torch.where(high > 0, (high - low) / high.clamp_min(1 / 255), 0)
    luma = (pixels * send(_LUMA, images.device)[:, None, None]).sum(1)
    clipped = ((images == 0) | (images == 255)).any(1).float()
    return ColourStats(
        saturation.flatten(1).mean(1),
        luma.flatten(1).std(1, correction=0),
        clipped.flatten(1).mean(1),
    )


def mean_and_stderr(values: Tensor) -> tuple[float, float]:
    """Mean of one value a sample and its standard error (NaN for a single sample)."""
    wide = values.double()
    error = wide.std(correction=1) / len(wide) ** 0.5 if len(wide) > 1 else torch.nan
    return float(wide.mean()), float(error)
