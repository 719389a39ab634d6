"""How well an image fits its prompt, by models of the CLIP family: CLIP score, PickScore, HPSv2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .hub import fetch, in_batches, prepare, transformers
from .protocol import Metadata

__all__ = ["ClipScore", "HPSv2", "PickScore", "TextImageScore"]


class TextImageScore:
    """``scale * cos(image features, text features)`` of a CLIP-like model of transformers.

    Args:
        model: folder or hub id of the model.
        tokenizer: folder or hub id of the tokenizer; None is that of the model.
        scale: factor of the cosine; None is the model's own temperature, ``exp(logit_scale)``.
        batch_size: images a pass.
        device: where to put the model.
        dtype: of the model.

    Raises:
        ImportError: transformers is not installed.
        OSError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer: str | Path | None = None,
        *,
        scale: float | None = 100.0,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        auto = transformers()
        self.model = fetch(f"the model {model}", auto.AutoModel.from_pretrained, model)
        self.model.to(device, dtype).eval().requires_grad_(False)
        words = model if tokenizer is None else tokenizer
        self.tokenizer = fetch(f"the tokenizer {words}", auto.AutoTokenizer.from_pretrained, words)
        self.scale, self.batch_size = scale, batch_size
        self.size = int(self.model.config.vision_config.image_size)
        self.length = int(self.model.config.text_config.max_position_embeddings)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores (B,); prompts longer than the model reads are cut."""
        rows = in_batches(len(images), self.batch_size)
        return torch.cat([self._scores(images[row], list(prompts[row])) for row in rows])

    def image_features(self, images: Tensor) -> Tensor:
        """Unit features (B, d), float32."""
        pixels = prepare(images.to(self.model.device), self.size).to(self.model.dtype)
        return _unit(self.model.get_image_features(pixel_values=pixels))

    def _scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        words = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.length,
            return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        inputs = {"input_ids": words["input_ids"]}
        if "attention_mask" in words:
            inputs["attention_mask"] = words["attention_mask"]
        text = _unit(self.model.get_text_features(**inputs))
        cosine = (self.image_features(images) * text).sum(1)
        scale = self.model.logit_scale.float().exp() if self.scale is None else self.scale
        return cosine * scale


class ClipScore(TextImageScore):
    """100 times the cosine of CLIP (Hessel et al. 2021), not cut at 0; see ``TextImageScore``."""

    def __init__(self, model: str | Path = "openai/clip-vit-large-patch14", **options: Any) -> None:
        super().__init__(model, **options)


class PickScore(TextImageScore):
    """PickScore (Kirstain et al. 2023), about 18 to 24; see ``TextImageScore``."""

    def __init__(
        self,
        model: str | Path = "yuvalkirstain/PickScore_v1",
        tokenizer: str | Path | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        *,
        scale: float | None = None,
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
        scale: float | None = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, scale=scale, **options)


def _unit(output: Any) -> Tensor:
    """Features of unit length; transformers 5 wraps what 4 gave as a tensor."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(features.float(), dim=-1)
