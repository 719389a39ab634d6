"""Stock diffusers networks as trainable functions of (x, timestep, labels)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .config import TrainConfig
from .flow import Network

__all__ = [
    "as_network",
    "build_transformer",
    "initialise_transformer",
    "quick_attention",
    "train_mode",
    "with_dtype",
]


def build_transformer(config: TrainConfig, classes: int) -> nn.Module:
    """A stock ``DiTTransformer2DModel`` on RGB pixels, fresh; the label ``classes`` is null."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=3,
        out_channels=3,
        num_layers=config.layers,
        sample_size=config.resolution,
        patch_size=config.patch_size,
        num_embeds_ada_norm=classes,
    )
    initialise_transformer(model)
    return model


@torch.no_grad()
def initialise_transformer(model: Any) -> None:
    """Initialise as Peebles & Xie (arXiv 2212.09748): blocks start as the identity, output 0.

    diffusers builds the same layers but leaves PyTorch's default weights in them.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patch = model.pos_embed.proj
    nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
    nn.init.zeros_(patch.bias)
    for block in model.transformer_blocks:
        embed = block.norm1.emb
        nn.init.normal_(embed.class_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(embed.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embed.timestep_embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    nn.init.zeros_(model.proj_out_1.weight)
    nn.init.zeros_(model.proj_out_2.weight)


def train_mode(model: nn.Module) -> None:
    """``model.train()``, but without the label dropout that diffusers' label embeddings do.

    They draw from the global generator and, in a DiT, anew in every block, so that a sample is
    unconditional in one block and conditional in the next. The trainer drops labels itself, once a
    sample.
    """
    from diffusers.models.embeddings import LabelEmbedding

    model.train()
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.eval()


def as_network(model: nn.Module, *, bf16: bool) -> Network:
    """``network(x, timestep, labels)`` over a diffusers model, float32 out.

    Args:
        model: takes (sample, timestep, class_labels), as DiT transformers and 2D UNets do.
        bf16: run it under autocast to bfloat16.
    """

    def network(x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bf16):
            output = model(x, timestep=timestep, class_labels=labels, return_dict=False)[0]
        return output.float()

    return network


def with_dtype(model: nn.Module, name: str) -> nn.Module:
    """``model`` itself in the dtype of that name, such as "float16".

    Not by the model's own ``to``: in diffusers that warns even where nothing is to be warned of.
    """
    return nn.Module.to(model, getattr(torch, name))


@contextmanager
def quick_attention(device: torch.device) -> Iterator[None]:
    """On a CPU, the plain attention kernel: the fused one's backward pass is far slower there."""
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
