"""Models fed by language models (embeddings given): Qwen, Z-Image, Lumina, Lumina 2, CogView4."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .common import Tiny, finish, flow_scheduler, vae
from .flows import embeds, image_size


def qwen_transformer() -> diffusers.QwenImageTransformer2DModel:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(8, 4, 4),
    )


def qwen_vae() -> diffusers.AutoencoderKLQwenImage:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def qwen(dtype: torch.dtype) -> Tiny:
    """Qwen-Image: two calls a step, and the pipeline rescales every token after guidance."""
    pipe = diffusers.QwenImagePipeline(
        flow_scheduler(use_dynamic_shifting=True), qwen_vae(), None, None, qwen_transformer()
    )
    return Tiny(
        finish(pipe, dtype),
        lambda: {**embeds(dtype, 24, masks="prompt_embeds_mask"), **image_size()},
        guidance_argument="true_cfg_scale",
    )


def z_image_transformer() -> diffusers.ZImageTransformer2DModel:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 32, 32],
    )


def z_image(dtype: torch.dtype) -> Tiny:
    """Z-Image: lists of samples, conditional first; the pipeline turns the predictions' sign."""
    pipe = diffusers.ZImagePipeline(
        flow_scheduler(shift=3.0), vae(), None, None, z_image_transformer()
    )

    def inputs() -> dict[str, Any]:
        given = embeds(dtype, 16)
        return {name: list(value) for name, value in given.items()} | image_size()

    return Tiny(finish(pipe, dtype), inputs)


def lumina(dtype: torch.dtype) -> Tiny:
    """Lumina-Next: guides three of four channels, turns the sign. Steering must refuse it."""
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=24,
    )
    pipe = diffusers.LuminaPipeline(transformer, flow_scheduler(), vae(), None, None)

    def inputs() -> dict[str, Any]:
        given = embeds(dtype, 24, masks="prompt_attention_mask")
        return given | {"clean_caption": False} | image_size(64)

    return Tiny(finish(pipe, dtype), inputs)


def lumina2(dtype: torch.dtype, normalised: bool = False) -> Tiny:
    """Lumina 2 with its rescaling after guidance switched off; two calls a step, sign turned."""
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(32, 16, 16),
        cap_feat_dim=24,
    )
    pipe = diffusers.Lumina2Pipeline(transformer, flow_scheduler(), vae(), None, None)

    def inputs() -> dict[str, Any]:
        given = embeds(dtype, 24, masks="prompt_attention_mask")
        return given | {"cfg_normalization": normalised} | image_size(64)

    return Tiny(finish(pipe, dtype), inputs)


def lumina2_normalised(dtype: torch.dtype) -> Tiny:
    """Lumina 2 as it comes: the guided prediction is rescaled to the conditional one's norm."""
    return lumina2(dtype, normalised=True)


def cogview4(dtype: torch.dtype) -> Tiny:
    """CogView4: two calls a step."""
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
        pos_embed_max_size=16,
        rope_axes_dim=(8, 8),
    )
    pipe = diffusers.CogView4Pipeline(
        None, None, vae(), transformer, flow_scheduler(use_dynamic_shifting=True)
    )
    return Tiny(finish(pipe, dtype), lambda: {**embeds(dtype, 32), **image_size()})
