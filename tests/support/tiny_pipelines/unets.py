"""Stable Diffusion and its kin: UNets over four latent channels."""

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
    generator,
    random,
    vae,
)


def unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (4, 8),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 2,
            **changes,
        }
    )


def ddim(**changes: Any) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **changes,
    )


def sd_parts(**changes: Any) -> dict[str, Any]:
    """The components of a Stable Diffusion pipeline; ``changes`` are of the UNet."""
    return {
        "vae": vae(),
        "text_encoder": clip_encoder(),
        "tokenizer": clip_tokenizer(),
        "unet": unet(**changes),
        "scheduler": ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def prompts(**more: Any) -> dict[str, Any]:
    return {
        "prompt": list(PROMPTS),
        "negative_prompt": list(NEGATIVES),
        "output_type": "latent",
        "generator": generator(),
        **more,
    }


def image(dtype: torch.dtype, seed: int = 5) -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=generator(seed)).to(dtype)


def sd(dtype: torch.dtype, **changes: Any) -> Tiny:
    """Stable Diffusion, DDIM."""
    pipe = diffusers.StableDiffusionPipeline(**sd_parts(**changes))
    return Tiny(finish(pipe, dtype), prompts, denoisers=("unet",))


def sd_img2img(dtype: torch.dtype) -> Tiny:
    """Image to image: starts in the middle of the schedule."""
    pipe = finish(diffusers.StableDiffusionImg2ImgPipeline(**sd_parts()), dtype)
    return Tiny(
        pipe,
        lambda: prompts(image=image(dtype), strength=0.8, num_inference_steps=6),
        denoisers=("unet",),
    )


def sd_inpaint(dtype: torch.dtype) -> Tiny:
    """Inpainting with nine input channels: latents, mask, masked image."""
    pipe = finish(diffusers.StableDiffusionInpaintPipeline(**sd_parts(in_channels=9)), dtype)

    def inputs() -> dict[str, Any]:
        mask = torch.zeros(2, 1, 16, 16, dtype=dtype)
        mask[..., 4:12, 4:12] = 1
        return prompts(image=image(dtype), mask_image=mask, height=16, width=16)

    return Tiny(pipe, inputs, denoisers=("unet",))


def sd_controlnet(dtype: torch.dtype) -> Tiny:
    """Stable Diffusion with a ControlNet."""
    control = diffusers.ControlNetModel(
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=2,
        # Two stages halve the condition once, as the autoencoder halves the image.
        conditioning_embedding_out_channels=(4, 8),
    )
    pipe = diffusers.StableDiffusionControlNetPipeline(controlnet=control, **sd_parts())
    return Tiny(finish(pipe, dtype), lambda: prompts(image=image(dtype)), denoisers=("unet",))


def sd_ip_adapter(dtype: torch.dtype) -> Tiny:
    """Stable Diffusion with an image-prompt adapter, its image embeddings given."""
    pipe = diffusers.StableDiffusionPipeline(**sd_parts())
    width, cross = 12, 16
    weights: dict[str, Any] = {
        "image_proj": {
            "proj.weight": random(1, 4 * cross, width) / width**0.5,
            "proj.bias": torch.zeros(4 * cross),
            "norm.weight": torch.ones(cross),
            "norm.bias": torch.zeros(cross),
        },
        "ip_adapter": {},
    }
    crossing = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(crossing):
        # An adapter's file counts all processors; the odd ones are cross-attention.
        layer = pipe.unet.get_submodule(name.removesuffix(".processor"))
        for kind in ("k", "v"):
            shape = (layer.to_k.weight.shape[0], cross)
            weights["ip_adapter"][f"{2 * index + 1}.to_{kind}_ip.weight"] = random(index, *shape)
    pipe.unet._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
    pipe = finish(pipe, dtype)
    embeds = torch.stack([torch.zeros(2, width), random(9, 2, width)]).flatten(0, 1)[:, None]
    return Tiny(
        pipe, lambda: prompts(ip_adapter_image_embeds=[embeds.to(dtype)]), denoisers=("unet",)
    )


def sdxl_parts() -> dict[str, Any]:
    return {
        "vae": vae(),
        "text_encoder": clip_encoder(),
        "text_encoder_2": clip_encoder(projected=True),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "unet": unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
            transformer_layers_per_block=(1, 1),
            use_linear_projection=True,
        ),
        "scheduler": diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    }


def sdxl(dtype: torch.dtype) -> Tiny:
    """SDXL, Euler: the sample lives in the variance-exploding space."""
    pipe = diffusers.StableDiffusionXLPipeline(**sdxl_parts(), add_watermarker=False)
    return Tiny(finish(pipe, dtype), prompts, denoisers=("unet",))


def sd_pag(dtype: torch.dtype) -> Tiny:
    """Perturbed-attention guidance: three predictions a step. Steering must refuse it."""
    pipe = diffusers.StableDiffusionPAGPipeline(**sd_parts(), pag_applied_layers="mid")
    return Tiny(finish(pipe, dtype), prompts, denoisers=("unet",))


def sd_pix2pix(dtype: torch.dtype) -> Tiny:
    """InstructPix2Pix: guidance between three predictions. Steering must refuse it."""
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(**sd_parts(in_channels=8))
    return Tiny(finish(pipe, dtype), lambda: prompts(image=image(dtype)), denoisers=("unet",))


def sd_rescale(dtype: torch.dtype) -> Tiny:
    """Stable Diffusion with ``guidance_rescale``: the pipeline changes the guided prediction."""
    tiny = sd(dtype)
    return Tiny(tiny.pipe, lambda: prompts(guidance_rescale=0.7), denoisers=("unet",))
