"""Video models: Wan, Wan 2.2 with two experts, LTX."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .common import Tiny, finish, flow_scheduler, video_vae
from .flows import embeds, image_size


def wan_transformer() -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=16,
    )


def unipc() -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def video(dtype: torch.dtype) -> dict[str, Any]:
    return {**embeds(dtype, 32), **image_size(32), "num_frames": 5}


def wan(dtype: torch.dtype) -> Tiny:
    """Wan 2.1, UniPC on a flow; two calls a step."""
    pipe = diffusers.WanPipeline(
        None, None, video_vae(), unipc(), wan_transformer(), transformer_2=None
    )
    return Tiny(finish(pipe, dtype), lambda: video(dtype))


def wan22(dtype: torch.dtype) -> Tiny:
    """Wan 2.2: one transformer for high noise, another for low noise."""
    pipe = diffusers.WanPipeline(
        None,
        None,
        video_vae(),
        unipc(),
        wan_transformer(),
        transformer_2=wan_transformer(),
        boundary_ratio=0.8,
    )
    return Tiny(
        finish(pipe, dtype), lambda: video(dtype), denoisers=("transformer", "transformer_2")
    )


def ltx(dtype: torch.dtype) -> Tiny:
    """LTX-Video: packed video tokens, one call a step."""
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=32,
    )
    autoencoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    pipe = diffusers.LTXPipeline(
        flow_scheduler(use_dynamic_shifting=True), autoencoder, None, None, transformer
    )

    def inputs() -> dict[str, Any]:
        given = embeds(dtype, 32, masks="prompt_attention_mask")
        return given | image_size(64) | {"num_frames": 9}

    return Tiny(finish(pipe, dtype), inputs)
