"""Pipelines of released shapes with random weights: SD3-medium, SDXL, Flux; no downloads.

The shapes are those of the released configurations. Text encoders are left out: the pipelines are
called with random embeddings of the right size. The decoders are small, for no image is decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

DTYPE = torch.bfloat16
SCALE = 4.0
# stabilityai/stable-diffusion-3-medium, transformer/config.json
SD3_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
# stabilityai/stable-diffusion-xl-base-1.0, unet/config.json
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
# black-forest-labs/FLUX.1-dev, transformer/config.json
FLUX = {
    "in_channels": 64,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
LAYERS = {"sd3": 24, "sdxl": 10, "flux": 19}

Call = Callable[..., Any]


def random_weights(make: Callable[[], nn.Module], device: str) -> Any:
    """A module made without memory, then filled with small random weights in bfloat16.

    Matrices get the scale that keeps activations of order one; nothing is ever held in float32.
    """
    with torch.device("meta"):
        model = make()
    model = model.to(DTYPE).to_empty(device=device).eval().requires_grad_(False)
    for value in model.parameters():
        value.normal_(0, value[0].numel() ** -0.5 if value.ndim > 1 else 0.1)
    for value in model.buffers():  # tables of positions
        if value.is_floating_point():
            value.normal_()
    return model


def decoder(channels: int) -> Any:
    """An autoencoder that only tells the pipeline how much smaller latents are: eight times."""
    stages = {"down_block_types": ("DownEncoderBlock2D",) * 4}
    stages |= {"up_block_types": ("UpDecoderBlock2D",) * 4, "block_out_channels": (32,) * 4}
    return diffusers.AutoencoderKL(**stages, latent_channels=channels, shift_factor=0.0).to(DTYPE)


def prompts(options: Any, tokens: int, width: int, pooled: int) -> dict[str, Tensor]:
    """Random embeddings of prompts and of negative prompts."""
    where = {"device": options.device, "dtype": DTYPE}
    return {
        f"{sign}{name}": torch.randn(options.batch, *shape, **where)
        for sign in ("", "negative_")
        for name, shape in (
            ("prompt_embeds", (tokens, width)),
            ("pooled_prompt_embeds", (pooled,)),
        )
    }


def sd3(options: Any) -> tuple[Any, dict[str, Any]]:
    """SD3-medium, and what it is called with."""
    text = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    layers = options.layers or LAYERS["sd3"]
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=random_weights(
            lambda: diffusers.SD3Transformer2DModel(**SD3_MEDIUM, num_layers=layers),
            options.device,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=decoder(16),
        **text,
    )
    return pipe, {**prompts(options, 333, 4096, 2048), "guidance_scale": SCALE}


def sdxl(options: Any) -> tuple[Any, dict[str, Any]]:
    """SDXL base, and what it is called with; ``layers`` are those of its innermost blocks."""
    text = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2")}
    depth = (1, 2, options.layers or LAYERS["sdxl"])
    shape = SDXL | {"transformer_layers_per_block": depth}
    pipe = diffusers.StableDiffusionXLPipeline(
        unet=random_weights(lambda: diffusers.UNet2DConditionModel(**shape), options.device),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        ),
        vae=decoder(4),
        add_watermarker=False,
        **text,
    )
    return pipe, {**prompts(options, 77, 2048, 1280), "guidance_scale": SCALE}


def flux(options: Any) -> tuple[Any, dict[str, Any]]:
    """Flux dev with true guidance, and what it is called with; twice as many single blocks."""
    layers = options.layers or LAYERS["flux"]
    text = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(
        transformer=random_weights(
            lambda: diffusers.FluxTransformer2DModel(
                **FLUX, num_layers=layers, num_single_layers=2 * layers
            ),
            options.device,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=decoder(16),
        **text,
    )
    return pipe, {**prompts(options, 512, 4096, 768), "true_cfg_scale": SCALE}


MODELS: dict[str, Callable[[Any], tuple[Any, dict[str, Any]]]] = {
    "sd3": sd3,
    "sdxl": sdxl,
    "flux": flux,
}


def latents_of(pipe: Any, options: Any) -> Tensor:
    """Starting noise in the layout that the pipeline takes."""
    side = options.pixels // 8
    channels = pipe.vae.config.latent_channels
    shape = (options.batch, channels, side, side)
    if isinstance(pipe, diffusers.FluxPipeline):
        shape = (options.batch, (side // 2) ** 2, 4 * channels)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return noise.to(options.device, DTYPE)
