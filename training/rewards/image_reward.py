"""ImageReward: human preference by a BLIP that reads the prompt while it looks at the image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...eval.decode import as_uint8
from ...eval.scorers import clip_pixels
from .hub import ScoreHead, fetch, read_state, transformers
from .protocol import Metadata

__all__ = ["ImageReward", "blip_names"]

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of raw scores, from the authors' code
MOST_TOKENS = 35
# BLIP's own names of the vision tower's parts, and those of transformers.
VISION_NAMES = (
    (r"^patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


class ImageReward:
    """ImageReward v1.0 (Xu et al. 2023), about -2 to 2, on BLIP from transformers.

    A reconstruction: the authors' weights are read into transformers' BLIP by name. Its tests use
    random weights; compare a few scores with the ``image-reward`` package before you rely on it.

    Args:
        weights: file, folder or hub id of ``ImageReward.pt``.
        tokenizer: folder or hub id of BERT's tokenizer.
        vision: changes of the vision tower's configuration (ViT-L/16 at 224 pixels).
        text: changes of the text tower's configuration (BERT base).
        batch_size: images a pass.
        device: where to put the model.

    Raises:
        ImportError: transformers is not installed.
        OSError: weights cannot be loaded.
        ValueError: they are of another model.
    """

    def __init__(
        self,
        weights: str | Path = "THUDM/ImageReward",
        tokenizer: str | Path = "bert-base-uncased",
        *,
        vision: Mapping[str, Any] | None = None,
        text: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
    ) -> None:
        auto = transformers()
        self.tokenizer = fetch(
            f"the tokenizer {tokenizer}", auto.AutoTokenizer.from_pretrained, tokenizer
        )
        self.network = _Network(vision or {}, text or {})
        self.size, self.batch_size = int(self.network.vision.config.image_size), batch_size
        _fill(self.network, blip_names(read_state(weights, "ImageReward.pt")), weights)
        self.network.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores (B,)."""
        parts = []
        pictures = as_uint8(images)
        for start in range(0, len(images), self.batch_size):
            row = slice(start, start + self.batch_size)
            words = self.tokenizer(
                list(prompts[row]), padding="max_length", truncation=True, max_length=MOST_TOKENS,
                return_tensors="pt",
            ).to(self.device)  # fmt: skip
            pixels = torch.stack([clip_pixels(one, self.size) for one in pictures[row]])
            parts.append(
                self.network(pixels.to(self.device), words["input_ids"], words["attention_mask"])
            )
        return (torch.cat(parts) - MEAN) / STD


class _Network(nn.Module):
    """Image tokens, prompt tokens that attend to them, and a head on the first of these."""

    def __init__(self, vision: Mapping[str, Any], text: Mapping[str, Any]) -> None:
        super().__init__()
        auto = transformers()
        blip_text = auto.models.blip.modeling_blip_text.BlipTextModel
        large = {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6,
        }  # fmt: skip
        base = {"num_attention_heads": 12, "encoder_hidden_size": 1024}
        self.vision = auto.BlipVisionModel(auto.BlipVisionConfig(**{**large, **vision}))
        config = auto.BlipTextConfig(**{**base, **text})
        self.text = blip_text(config, add_pooling_layer=False)
        self.head = ScoreHead(config.hidden_size)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        seen = self.vision(pixels).last_hidden_state
        read = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen)
        return self.head(read.last_hidden_state[:, 0])


def blip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of ImageReward under the names of this module, without what it has no use for.

    Args:
        state: by the authors' names: ``blip.visual_encoder.*``, ``blip.text_encoder.*``, ``mlp.*``.
    """
    renamed = {}
    for name, value in state.items():
        if name.startswith("blip.visual_encoder."):
            part = name.removeprefix("blip.visual_encoder.")
            for old, new in VISION_NAMES:
                part = re.sub(old, new, part)
            renamed[f"vision.{part}"] = value
        elif name.startswith("blip.text_encoder.") and not name.endswith("position_ids"):
            renamed[f"text.{name.removeprefix('blip.text_encoder.')}"] = value
        elif name.startswith("mlp."):
            renamed[f"head.{name.removeprefix('mlp.')}"] = value
    return renamed


def _fill(network: nn.Module, state: dict[str, Tensor], where: str | Path) -> None:
    try:
        missing = network.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:
        raise ValueError(f"weights: {where} does not fit ImageReward: {error}") from error
    if missing:
        raise ValueError(
            f"weights: {where} is no checkpoint of ImageReward: {len(missing)} tensors are "
            f"missing, such as {missing[0]!r}"
        )
