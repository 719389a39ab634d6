"""Transformers with a learned variance: DiT, PixArt, HunyuanDiT."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from .common import (
    NEGATIVES,
    PROMPTS,
    Tiny,
    finish,
    generator,
    random,
    t5_encoder,
    t5_tokenizer,
    vae,
)


def dit(dtype: torch.dtype) -> Tiny:
    """DiT with learned variance, DDIM; classes 3 and 7, the null class is 1000."""
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        norm_num_groups=2,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = diffusers.DiTPipeline(transformer, vae(scaling_factor=1.0), scheduler)
    finish(pipe, dtype)
    # This pipeline has no output_type="latent": the latents are what the decoder is given.
    seen: list[Tensor] = []
    pipe.vae.post_quant_conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return Tiny(
        pipe,
        lambda: {"class_labels": [3, 7], "output_type": "pt", "generator": generator()},
        latents=lambda _: seen.pop(),
    )


def pixart(dtype: torch.dtype) -> Tiny:
    """PixArt-Sigma with learned variance, DPM-Solver++."""
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=8,
        norm_num_groups=2,
    )
    pipe = diffusers.PixArtSigmaPipeline(
        t5_tokenizer(), t5_encoder(), vae(), transformer, diffusers.DPMSolverMultistepScheduler()
    )
    return Tiny(finish(pipe, dtype), _pixart_inputs)


def _pixart_inputs() -> dict[str, Any]:
    return {
        "prompt": list(PROMPTS),
        "negative_prompt": list(NEGATIVES),
        "height": 16,
        "width": 16,
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": 16,
        "output_type": "latent",
        "generator": generator(),
    }


def hunyuan_dit(dtype: torch.dtype) -> Tiny:
    """HunyuanDiT with learned variance and v-prediction; two sets of embeddings are given."""
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        cross_attention_dim=16,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        text_len=6,
        text_len_t5=8,
    )
    pipe = diffusers.HunyuanDiTPipeline(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )

    def inputs() -> dict[str, Any]:
        given = {
            "height": 16,
            "width": 16,
            "use_resolution_binning": False,
            "output_type": "latent",
            "generator": generator(),
        }
        for number, name in enumerate(("prompt", "negative_prompt")):
            mask = "prompt_attention_mask" if name == "prompt" else "negative_prompt_attention_mask"
            for suffix, length, width in (("", 6, 16), ("_2", 8, 32)):
                given[f"{name}_embeds{suffix}"] = random(
                    number + width, 2, length, width, dtype=dtype
                )
                given[f"{mask}{suffix}"] = torch.ones(2, length, dtype=torch.long)
        return given

    return Tiny(finish(pipe, dtype), inputs)
