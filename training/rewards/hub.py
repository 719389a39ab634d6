"""What the rewards from published models share: late imports, loading, a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ScoreHead", "fetch", "read_state", "transformers"]

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
