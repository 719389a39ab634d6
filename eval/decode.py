"""Image files to uint8 RGB: every mode a PNG or JPEG can have, none of them silently wrong."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Alpha = Literal["white", "error"]


class ImageError(ValueError):
    """An image that cannot be read or may not be used; the message names it."""


def decode(
    data: bytes | Path | Image.Image,
    name: str,
    *,
    alpha: Alpha = "white",
    notes: Counter[str] | None = None,
) -> Tensor:
    """Decode one image to uint8 RGB, shape (3, H, W).

    16-bit grey is divided by 257 and rounded (Pillow's own conversion clips it to white); of 16-bit
    colour Pillow hands out the high byte. Grey is repeated, palettes and CMYK are converted,
    transparency is laid on white.

    Args:
        data: encoded bytes, a file, or a PIL image.
        name: used in errors.
        alpha: "white" composites transparent pixels on white, "error" refuses them.
        notes: what was converted is counted here.

    Raises:
        ImageError: if the image is corrupt or truncated, or is transparent where that is refused.
    """
    try:
        source = io.BytesIO(data) if isinstance(data, bytes) else data
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot read image {name}: {error}") from error
    notes = Counter() if notes is None else notes
    if image.format == "JPEG":
        notes["JPEG files (lossy; metrics see the artefacts)"] += 1
    pixels = np.ascontiguousarray(_rgb(image, name, alpha, notes))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _rgb(image: Image.Image, name: str, alpha: Alpha, notes: Counter[str]) -> NDArray[Any]:
    if image.mode.startswith("I") or image.mode == "F":
        return _wide_grey(image, name, notes)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _flattened(image.convert("RGBA"), name, alpha, notes)
    if image.mode == "RGB":
        return np.array(image)
    if image.mode in ("L", "1"):
        notes["grey images (channel repeated)"] += 1
    elif image.mode == "P":
        notes["palette images (converted to RGB)"] += 1
    else:
        notes[f"{image.mode} images (converted to RGB)"] += 1
    return np.array(image.convert("RGB"))


def _wide_grey(image: Image.Image, name: str, notes: Counter[str]) -> NDArray[Any]:
    values = np.array(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"image {name} has mode {image.mode} with values from {values.min()} to "
            f"{values.max()}; expected 8 or 16 bits a channel"
        )
    notes["16-bit grey images (divided by 257)"] += 1
    grey = np.round(values.astype(np.float64) / 257).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _flattened(image: Image.Image, name: str, alpha: Alpha, notes: Counter[str]) -> NDArray[Any]:
    pixels = np.array(image)
    if (pixels[..., 3] == 255).all():
        return pixels[..., :3]
    if alpha == "error":
        raise ImageError(f"image {name} is transparent; flatten it, or allow compositing on white")
    notes["transparent images (composited on white)"] += 1
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


def as_uint8(images: Tensor, *, quantise: str = "round") -> Tensor:
    """Quantise float images in [0, 1] to uint8; uint8 passes unchanged.

    Args:
        images: shape (..., H, W).
        quantise: "round" (``x * 255`` to nearest: diffusers), "truncate" (towards 0: ``byte()`` of
            torchmetrics' ``normalize=True``), or "edm" (``[-1, 1] * 127.5 + 128``, truncated).
            Values are clamped first: nothing wraps around.

    Raises:
        TypeError: if ``images`` is an integer tensor other than uint8.
        ValueError: if values lie outside the expected range, or the rule is unknown.
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    low, high = (-1.0, 1.0) if quantise == "edm" else (0.0, 1.0)
    # Solvers overshoot by a little and diffusers clamps; more than that is another range.
    smallest, largest = (float(x) for x in images.aminmax()) if images.numel() else (low, high)
    if not (low - 0.1 <= smallest and largest <= high + 0.1):
        raise ValueError(
            f"float images must lie in [{low:g}, {high:g}], got values from {smallest:.4g} to "
            f"{largest:.4g}; convert [-1, 1] by (x + 1) / 2, or pass uint8"
        )
    clamped = images.float().clamp(low, high)
    if quantise == "round":
        return (clamped * 255).round().to(torch.uint8)
    if quantise == "truncate":
        return (clamped * 255).to(torch.uint8)
    if quantise == "edm":
        return (clamped * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    raise ValueError(f"quantise must be 'round', 'truncate' or 'edm', got {quantise!r}")
