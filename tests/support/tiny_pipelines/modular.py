"""Pipelines whose guidance is a component: Modular ones up to the latents, and HunyuanImage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance

from . import flows, unets
from .common import Tiny, finish, flow_scheduler, random, video_vae
from .flows import embeds, image_size
from .tokens import qwen_transformer, qwen_vae, z_image_transformer
from .videos import unipc, video, wan_transformer


def modular(
    blocks: Any,
    dtype: torch.dtype,
    inputs: Callable[[], dict[str, Any]],
    components: dict[str, Any],
    drop: tuple[str, ...] = ("decode",),
) -> Tiny:
    """A modular pipeline of ``blocks`` without those named in ``drop``."""
    for name in drop:
        blocks.sub_blocks.pop(name)
    pipe = blocks.init_pipeline()
    pipe.update_components(**components)
    silence(getattr(pipe, "_blocks", None) or pipe.blocks)  # diffusers 0.36 says blocks

    def run(guidance_scale: float, **given: Any) -> torch.Tensor:
        set_scale(pipe, guidance_scale)
        return pipe(output="latents", **given)

    denoisers = tuple(name for name in components if name.startswith(("unet", "transformer")))
    return Tiny(finish(pipe, dtype), inputs, denoisers=denoisers, run=run)


def silence(blocks: Any) -> None:
    """Switch off the progress bars of all loops inside ``blocks``."""
    if hasattr(blocks, "set_progress_bar_config"):
        blocks.set_progress_bar_config(disable=True)
    for block in blocks.sub_blocks.values():
        silence(block)


def set_scale(pipe: Any, guidance_scale: float) -> None:
    """Hand the scale to diffusers' own guiders; any other guider keeps its scale."""
    for name in ("guider", "guider_2"):
        if isinstance(guider := getattr(pipe, name, None), ClassifierFreeGuidance):
            guider.guidance_scale = guidance_scale
            guider.enable()  # Z-Image comes with guidance switched off


def without(inputs: Callable[[], dict[str, Any]], *names: str) -> Callable[[], dict[str, Any]]:
    return lambda: {name: value for name, value in inputs().items() if name not in names}


def sd3(dtype: torch.dtype) -> Tiny:
    """Modular SD3, Euler."""
    return modular(
        diffusers.StableDiffusion3AutoBlocks(),
        dtype,
        without(flows.prompts, "output_type"),
        flows.sd3_parts(),
    )


def sdxl(dtype: torch.dtype) -> Tiny:
    """Modular SDXL, Euler: its text encoder asks the guider whether a negative prompt is needed."""
    return modular(
        diffusers.StableDiffusionXLAutoBlocks(),
        dtype,
        without(unets.prompts, "output_type"),
        unets.sdxl_parts(),
    )


def qwen(dtype: torch.dtype) -> Tiny:
    """Modular Qwen-Image: every token is rescaled after the guider."""

    def inputs() -> dict[str, Any]:
        return {**embeds(dtype, 24, masks="prompt_embeds_mask"), **image_size()}

    parts = {
        "transformer": qwen_transformer(),
        "vae": qwen_vae(),
        "scheduler": flow_scheduler(use_dynamic_shifting=True),
    }
    return modular(
        diffusers.QwenImageAutoBlocks(),
        dtype,
        without(inputs, "output_type"),
        parts,
        drop=("text_encoder", "decode"),
    )


def z_image(dtype: torch.dtype) -> Tiny:
    """Modular Z-Image: the block turns the sign before the guider."""

    def inputs() -> dict[str, Any]:
        given = embeds(dtype, 16)
        return {name: list(value) for name, value in given.items()} | image_size(64)

    parts = {"transformer": z_image_transformer(), "scheduler": flow_scheduler(shift=3.0)}
    return modular(
        diffusers.ZImageAutoBlocks(),
        dtype,
        without(inputs, "output_type"),
        parts,
        drop=("text_encoder", "decode"),
    )


def wan(dtype: torch.dtype, scheduler: Any = None) -> Tiny:
    """Modular Wan 2.1, UniPC."""
    parts = {
        "transformer": wan_transformer(),
        "vae": video_vae(),
        "scheduler": scheduler or unipc(),
    }
    return modular(
        diffusers.WanBlocks(),
        dtype,
        without(lambda: video(dtype), "output_type"),
        parts,
        drop=("text_encoder", "decode"),
    )


def wan_euler(dtype: torch.dtype) -> Tiny:
    """Modular Wan 2.1, Euler."""
    return wan(dtype, flow_scheduler(shift=3.0))


def wan22(dtype: torch.dtype) -> Tiny:
    """Modular Wan 2.2: two experts, a guider each."""
    parts = {
        "transformer": wan_transformer(),
        "transformer_2": wan_transformer(),
        "vae": video_vae(),
        "scheduler": unipc(),
    }
    return modular(
        diffusers.Wan22Blocks(),
        dtype,
        without(lambda: video(dtype), "output_type"),
        parts,
        drop=("text_encoder", "decode"),
    )


def hunyuan_image(dtype: torch.dtype) -> Tiny:
    """HunyuanImage: a classic pipeline with a guider component."""
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=24,
        text_embed_2_dim=16,
        rope_axes_dim=(4, 4),
    )
    pipe = diffusers.HunyuanImagePipeline(
        flow_scheduler(shift=3.0), None, None, None, None, None, transformer
    )
    pipe.register_modules(guider=ClassifierFreeGuidance())

    def inputs() -> dict[str, Any]:
        given: dict[str, Any] = {}
        for seed, prefix in enumerate(("", "negative_")):
            for suffix, length, width in (("", 7, 24), ("_2", 5, 16)):
                embedding = random(seed + width, 2, length, width, dtype=dtype)
                given[f"{prefix}prompt_embeds{suffix}"] = embedding
                given[f"{prefix}prompt_embeds_mask{suffix}"] = torch.ones(2, length)
        return given | image_size(128)

    def run(guidance_scale: float, **given: Any) -> Any:
        set_scale(pipe, guidance_scale)
        return pipe(**given)

    return Tiny(finish(pipe, dtype), inputs, run=run)
