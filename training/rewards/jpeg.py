"""How well an image compresses: a reward without a gradient."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ...eval.decode import as_uint8
from .protocol import Metadata

__all__ = ["JpegSize", "jpeg_bytes"]


def jpeg_bytes(images: Tensor, *, quality: int = 95) -> list[int]:
    """The size in bytes of each image as a JPEG file.

    Args:
        images: (B, 3, H, W), in [0, 1].
        quality: of the encoder, 1 to 95.

    Raises:
        ValueError: values lie far outside [0, 1], or are NaN.
    """
    sizes = []
    for array in as_uint8(images.detach()).permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "JPEG", quality=quality)
        sizes.append(buffer.tell())
    return sizes


@dataclass(frozen=True)
class JpegSize:
    """Kilobytes of the image as a JPEG file, negative if small is good (Black et al. 2023, DDPO).

    Args:
        quality: of the encoder, 1 to 95.
        compressible: True rewards small files (smooth images), False large ones.

    Raises:
        ValueError: ``quality`` is out of range.
    """

    quality: int = 95
    compressible: bool = True

    def __post_init__(self) -> None:
        """Refuse a quality that the encoder does not know."""
        if isinstance(self.quality, bool) or not 1 <= self.quality <= 95:
            raise ValueError(f"quality must be from 1 to 95, got {self.quality!r}")

    def __call__(
        self, images: Tensor, prompts: Sequence[str] = (), metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores (B,)."""
        sizes = torch.tensor(jpeg_bytes(images, quality=self.quality), dtype=torch.float32) / 1000
        return -sizes if self.compressible else sizes
