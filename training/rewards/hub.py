"""What the rewards from published models share: late imports, loading, image preparation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CLIP_MEAN", "CLIP_STD", "ScoreHead", "fetch", "in_batches", "prepare", "transformers"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NEEDED = "pip install 'diffsteer[text]'"


def transformers() -> Any:
    """The transformers package.

    Raises:
        ImportError: it is not installed; the message says what to install.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"this reward needs transformers: {NEEDED}") from error
    return transformers


def fetch(what: str, load: Any, *arguments: Any, **options: Any) -> Any:
    """Call a loader of models or files, with an error that says what to do.

    Raises:
        OSError: it cannot be loaded from this folder, or from the hub.
    """
    try:
        return load(*arguments, **options)
    except Exception as error:  # loaders raise everything from KeyError to SafetensorError
        reason = " ".join(str(error).split())[:300]
        raise OSError(
            f"cannot load {what} ({type(error).__name__}: {reason}); give a folder that holds it, "
            "or check the network and the name"
        ) from error


def prepare(
    images: Tensor,
    size: int,
    *,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> Tensor:
    """Images as a vision tower takes them: resized (bicubic), cropped at the centre, normalised.

    On the device of the images, and differentiable; the published preparations do the same in PIL,
    which rounds to 8 bits in between.

    Args:
        images: (B, 3, H, W), floats in [0, 1].
        size: of the square result.
        mean: of each channel.
        std: of each channel.

    Returns:
        (B, 3, size, size), float32.
    """
    height, width = images.shape[2:]
    scale = size / min(height, width)
    sides = (max(size, round(height * scale)), max(size, round(width * scale)))
    images = images.float()
    if sides != (height, width):
        images = F.interpolate(images, sides, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (sides[0] - size) // 2, (sides[1] - size) // 2
    images = images[:, :, top : top + size, left : left + size]
    center = torch.tensor(mean, device=images.device)[:, None, None]
    spread = torch.tensor(std, device=images.device)[:, None, None]
    return (images - center) / spread


def in_batches(count: int, size: int) -> list[slice]:
    """Slices that cut ``count`` images into batches of at most ``size``."""
    return [slice(start, start + size) for start in range(0, count, size)]


class ScoreHead(nn.Module):
    """The head that the aesthetic predictor and ImageReward share: five linear layers, no bends.

    Named ``layers`` 0, 2, 4, 6 and 7, as in their checkpoints; between them is dropout, which does
    nothing at evaluation.
    """

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), nn.Dropout(0.2),
            nn.Linear(1024, 128), nn.Dropout(0.2),
            nn.Linear(128, 64), nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        """Scores (B,) of features (B, width)."""
        return self.layers(features)[:, 0]


def read_state(source: str | Path, filename: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, of a folder that holds ``filename``, or of a hub id.

    Raises:
        OSError: it cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        path = path / filename
    elif not path.is_file():
        from huggingface_hub import hf_hub_download

        path = Path(fetch(f"{filename} of {source}", hf_hub_download, str(source), filename))
    return fetch(str(path), torch.load, path, map_location="cpu", weights_only=True)
