"""How pleasing an image is, whatever its prompt: the LAION aesthetic predictor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...eval.decode import as_uint8
from .hub import ScoreHead, read_state
from .protocol import Metadata
from .text_image import TextImageScore

__all__ = ["AestheticScore"]


class AestheticScore:
    """The LAION aesthetic predictor V2 (Schuhmann 2022), about 1 to 10: a head on CLIP features.

    Args:
        clip: folder or hub id of CLIP ViT-L/14.
        head: file, folder or hub id of the head's weights, a state dict of ``layers.N.weight``.
        filename: of the weights in a folder or hub id.
        device: where to put the models.
        options: further ones of ``TextImageScore``.

    Raises:
        ImportError: transformers is not installed.
        OSError: weights cannot be loaded.
        ValueError: the head does not fit the features.
    """

    def __init__(
        self,
        clip: str | Path = "openai/clip-vit-large-patch14",
        head: str | Path = "trl-lib/ddpo-aesthetic-predictor",
        *,
        filename: str = "aesthetic-model.pth",
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        self.clip = TextImageScore(clip, device=device, **options).scorer
        self.head = ScoreHead(int(self.clip.model.config.projection_dim))
        try:
            self.head.load_state_dict(read_state(head, filename))
        except RuntimeError as error:
            raise ValueError(f"head: the weights in {head} do not fit {clip}: {error}") from error
        self.head.to(device).eval().requires_grad_(False)

    def __call__(
        self, images: Tensor, prompts: Sequence[str] = (), metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores (B,)."""
        features = self.clip.embed_images(as_uint8(images))
        return self.head(features.to(self.clip.device))
