"""How well an image fits its prompt, by models of the CLIP family: CLIP score, PickScore, HPSv2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...eval.decode import as_uint8
from ...eval.scorers import ClipScorer, Scale
from .hub import fetch, transformers
from .protocol import Metadata

__all__ = ["ClipScore", "HPSv2", "PickScore", "TextImageScore"]


class TextImageScore:
    """The cosine of image and prompt in a CLIP of transformers, scaled: `eval.ClipScorer`.

    Images are rounded to 8 bits and prepared as the published scores do it; prompts longer than the
    model reads are cut.

    Args:
        model: folder or hub id of the model.
        tokenizer: folder or hub id of the tokenizer; None is that of the model.
        scale: "cosine"; "clip-score", ``100 max(cosine, 0)``; or "logit", the cosine times the
            model's temperature.
        batch_size: images a pass.
        device: where to put the model.
        dtype: of the model.

    Raises:
        ImportError: transformers is not installed.
        OSError: the model cannot be loaded.
        ValueError: ``scale`` is unknown.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer: str | Path | None = None,
        *,
        scale: Scale = "clip-score",
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        auto = transformers()
        network = fetch(f"the model {model}", auto.CLIPModel.from_pretrained, model)
        words = model if tokenizer is None else tokenizer
        found = fetch(f"the tokenizer {words}", auto.AutoTokenizer.from_pretrained, words)
        self.scorer = ClipScorer(
            network, found, name=Path(str(model)).name, scale=scale, device=device, dtype=dtype,
            batch_size=batch_size,
        )  # fmt: skip

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores (B,)."""
        return self.scorer(as_uint8(images), prompts)


class ClipScore(TextImageScore):
    """The CLIP score (Hessel et al. 2021), ``100 max(cosine, 0)``; see ``TextImageScore``."""

    def __init__(self, model: str | Path = "openai/clip-vit-large-patch14", **options: Any) -> None:
        super().__init__(model, **options)


class PickScore(TextImageScore):
    """PickScore (Kirstain et al. 2023), about 18 to 24; see ``TextImageScore``."""

    def __init__(
        self,
        model: str | Path = "yuvalkirstain/PickScore_v1",
        tokenizer: str | Path | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        *,
        scale: Scale = "logit",
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, scale=scale, **options)


class HPSv2(TextImageScore):
    """The cosine of HPSv2 (Wu et al. 2023), about 0.2 to 0.35; see ``TextImageScore``.

    The default is a conversion to transformers of the authors' weights by a third party.
    """

    def __init__(
        self,
        model: str | Path = "adams-story/HPSv2-hf",
        tokenizer: str | Path | None = None,
        *,
        scale: Scale = "cosine",
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, scale=scale, **options)
