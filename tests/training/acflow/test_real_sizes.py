"""What is trained at the sizes of released models, counted on tensors without memory."""

from __future__ import annotations

import diffusers
import pytest
import torch

from diffsteer.training.acflow import ACFlowConfig, Critic
from diffsteer.training.acflow.lora import add_lora

# The released transformer/config.json of SD3-medium, Flux.1-dev and Qwen-Image.
MODELS = {
    "sd3": (
        diffusers.SD3Transformer2DModel,
        {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24,
            "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "out_channels": 16,
            "pos_embed_max_size": 192,
        },
    ),
    "flux": (
        diffusers.FluxTransformer2DModel,
        {
            "in_channels": 64, "attention_head_dim": 128, "num_attention_heads": 24,
            "num_layers": 19, "num_single_layers": 38, "joint_attention_dim": 4096,
            "pooled_projection_dim": 768, "guidance_embeds": True,
        },
    ),
    "qwen": (
        diffusers.QwenImageTransformer2DModel,
        {
            "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60,
            "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584,
            "axes_dims_rope": (16, 56, 56),
        },
    ),
}  # fmt: skip
POOLED = {"pooled_projections": 2048}
# Parameters in thousand millions; width and number of attention projections (the last block of SD3
# has no output for the text; the single blocks of Flux have three); what a critic of 1024 pixels
# is given.
SIZES = {
    "sd3": (2.03, 1536, 24 * 8 - 1, (16, 128, 128), None, {"encoder_hidden_states": 4096} | POOLED),
    "flux": (
        11.90, 3072, 19 * 8 + 38 * 3, (4096, 64), (64, 64),
        {"encoder_hidden_states": 4096, "pooled_projections": 768},
    ),
    "qwen": (20.43, 3072, 60 * 8, (4096, 64), (64, 64), {"encoder_hidden_states": 3584}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_adapters_and_critic_are_small_beside_the_model(name):
    (build, shape), (base, width, layers, sample, grid, features) = MODELS[name], SIZES[name]
    with torch.device("meta"):
        model = build(**shape)
        count = sum(p.numel() for p in model.parameters())
        found = add_lora(model, rank=32, alpha=64.0)
        critic = Critic(sample, features, width=ACFlowConfig().critic_width, grid=grid)
    assert count == pytest.approx(base * 1e9, rel=1e-3)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert len(found) == layers and adapters == layers * 32 * 2 * width
    assert adapters < 0.01 * count
    assert 2e6 < sum(p.numel() for p in critic.parameters()) < 5e6
