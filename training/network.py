"""Stock diffusers networks as trainable functions of (x, timestep, labels)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def build_transformer(
    *, classes: int, resolution: int, patch_size: int, layers: int, heads: int, head_dim: int
) -> nn.Module:
    """A stock ``DiTTransformer2DModel`` on RGB pixels, initialised as in the DiT paper; class ``classes`` is null."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        sample_size=resolution,
        patch_size=patch_size,
        num_embeds_ada_norm=classes,
    )
    initialise_transformer(model)
    return model


@torch.no_grad()
def initialise_transformer(model: Any) -> None:
    """The initialisation of Peebles & Xie (arXiv 2212.09748): every block starts as the identity, the output at 0.

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
    """``model.train()``, but without the label dropout that diffusers' label embeddings do by themselves.

    They draw from the global generator and, in a DiT, anew in every block, so that a sample is unconditional in one
    block and conditional in the next. Labels are dropped by the trainer instead, once a sample.
    """
    from diffusers.models.embeddings import LabelEmbedding

    model.train()
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.eval()


def as_network(model: nn.Module, *, bf16: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``network(x, timestep, labels)`` over a diffusers model; autocast to bfloat16 where asked, float32 out."""

    def network(x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bf16):
            output = model(x, timestep=timestep, class_labels=labels, return_dict=False)[0]
        return output.float()

    return network


@contextmanager
def quick_attention(device: torch.device) -> Iterator[None]:
    """On a CPU, the plain attention kernel: the backward pass of the fused one is several times slower there."""
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
