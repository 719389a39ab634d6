"""Image models with a velocity: SD3, Flux, Sana, AuraFlow, Chroma, HiDream."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .common import (
    NEGATIVES,
    PROMPTS,
    Tiny,
    clip_encoder,
    clip_tokenizer,
    finish,
    flow_scheduler,
    generator,
    random,
    t5_encoder,
    t5_tokenizer,
    vae,
)


def prompts(**more: Any) -> dict[str, Any]:
    return {
        "prompt": list(PROMPTS),
        "negative_prompt": list(NEGATIVES),
        "max_sequence_length": 16,
        **image_size(),
        **more,
    }


def image_size(side: int = 16) -> dict[str, Any]:
    return {"height": side, "width": side, "output_type": "latent", "generator": generator()}


def sd3_parts() -> dict[str, Any]:
    return {
        "transformer": diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
        ),
        "scheduler": flow_scheduler(shift=3.0),
        "vae": vae(shift_factor=0.06, scaling_factor=1.5),
        "text_encoder": clip_encoder(projected=True),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip_encoder(projected=True),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5_encoder(),
        "tokenizer_3": t5_tokenizer(),
    }


def sd3(dtype: torch.dtype) -> Tiny:
    """Stable Diffusion 3, Euler."""
    return Tiny(finish(diffusers.StableDiffusion3Pipeline(**sd3_parts()), dtype), prompts)


def sd3_skip_layer(dtype: torch.dtype) -> Tiny:
    """SD3 with skip-layer guidance: one more prediction in some steps. Steering must refuse it."""
    more = {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.9}
    return Tiny(sd3(dtype).pipe, lambda: prompts(**more))


def flux(dtype: torch.dtype) -> Tiny:
    """Flux with true classifier-free guidance: packed tokens, dynamic shift, two calls a step."""
    pipe = diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )
    return Tiny(finish(pipe, dtype), prompts, guidance_argument="true_cfg_scale")


def sana(dtype: torch.dtype) -> Tiny:
    """Sana, DPM-Solver++ on a flow; it casts its predictions to float32 before guidance."""
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=24,
        sample_size=8,
    )
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(4, 4, 4),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.SanaPipeline(None, None, autoencoder, transformer, scheduler)

    def inputs() -> dict[str, Any]:
        return {
            **embeds(dtype, 24, masks="prompt_attention_mask"),
            "negative_prompt": None,
            "use_resolution_binning": False,
            **image_size(32),
        }

    return Tiny(finish(pipe, dtype), inputs)


def embeds(
    dtype: torch.dtype, width: int, length: int = 7, masks: str | None = None
) -> dict[str, Any]:
    """Prompt embeddings in the place of a text encoder; ``masks`` names the mask's argument."""
    given: dict[str, Any] = {}
    for seed, prefix in enumerate(("", "negative_")):
        given[f"{prefix}prompt_embeds"] = random(seed + 11, 2, length, width, dtype=dtype)
        if masks:
            given[f"{prefix}{masks}"] = torch.ones(2, length, dtype=torch.long)
    return given


def aura_flow(dtype: torch.dtype) -> Tiny:
    """AuraFlow, Euler."""
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    pipe = diffusers.AuraFlowPipeline(None, None, vae(), transformer, flow_scheduler())
    return Tiny(
        finish(pipe, dtype),
        lambda: {**embeds(dtype, 32, masks="prompt_attention_mask"), **image_size()},
    )


def chroma(dtype: torch.dtype) -> Tiny:
    """Chroma: Flux without its embedded guidance, two calls a step."""
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    pipe = diffusers.ChromaPipeline(flow_scheduler(), vae(), None, None, transformer)
    return Tiny(
        finish(pipe, dtype),
        # The transformer hands the mask to attention as it is, so it must not be of integers.
        lambda: (
            {
                name: value.to(dtype)
                for name, value in embeds(dtype, 32, masks="prompt_attention_mask").items()
            }
            | image_size()
        ),
    )


def hidream(dtype: torch.dtype) -> Tiny:
    """HiDream: mixture of experts; the pipeline turns the sign of the prediction."""
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[32, 16],
        text_emb_dim=32,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
        force_inference_output=True,
    )
    parts = {
        f"{kind}{number}": None
        for kind in ("text_encoder", "tokenizer")
        for number in ("", "_2", "_3", "_4")
    }
    pipe = diffusers.HiDreamImagePipeline(flow_scheduler(), vae(), transformer=transformer, **parts)
    pipe.default_sample_size = 8  # the pipeline scales any size up to its pixel budget

    def inputs() -> dict[str, Any]:
        given: dict[str, Any] = {}
        for seed, prefix in enumerate(("", "negative_")):
            given[f"{prefix}prompt_embeds_t5"] = random(seed + 1, 2, 6, 32, dtype=dtype)
            given[f"{prefix}prompt_embeds_llama3"] = random(seed + 3, 2, 2, 6, 16, dtype=dtype)
            given[f"{prefix}pooled_prompt_embeds"] = random(seed + 5, 2, 32, dtype=dtype)
        return given | image_size()

    return Tiny(finish(pipe, dtype), inputs)
