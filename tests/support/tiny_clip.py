"""A tiny CLIP with random weights and a tokenizer that spells."""

from __future__ import annotations

import torch
import transformers
from tiny_pipelines.common import clip_tokenizer


def tiny_clip(seed=0):
    """Model and tokenizer: 16 px, 8 numbers an embedding, embeddings that differ."""
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 514, "max_position_embeddings": 24, "bos_token_id": 512,
                     "eos_token_id": 513, "pad_token_id": 513},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    model = transformers.CLIPModel(config)
    with torch.no_grad():  # transformers' own start makes all images nearly alike
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) / weight[0].numel() ** 0.5)
    return model.eval(), clip_tokenizer()
