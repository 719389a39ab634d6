"""Tiny real diffusers pipelines: random weights, no downloads, a fraction of a second each.

from tiny_pipelines import build
tiny = build("sd3")
latents = tiny.call(guidance_scale=7.0)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import diffusers
import pytest
import torch
import transformers
from packaging.version import Version

from . import dits, flows, modular, tokens, unets, videos
from .common import SCALE as SCALE
from .common import STEPS as STEPS
from .common import Tiny as Tiny
from .common import wake as wake

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()

Builder = Callable[[torch.dtype], Tiny]

_REQUIRED: dict[str, Builder] = {
    "dit": dits.dit,
    "sd": unets.sd,
    "sdxl": unets.sdxl,
    "sd3": flows.sd3,
    "flux": flows.flux,
    "pixart": dits.pixart,
    "sana": flows.sana,
}
_FURTHER: dict[str, Builder] = {
    "aura-flow": flows.aura_flow,
    "chroma": flows.chroma,
    "cogview4": tokens.cogview4,
    "hidream": flows.hidream,
    "hunyuan-dit": dits.hunyuan_dit,
    "ltx": videos.ltx,
    "lumina2": tokens.lumina2,
    "sd-controlnet": unets.sd_controlnet,
    "sd-img2img": unets.sd_img2img,
    "sd-inpaint": unets.sd_inpaint,
    "sd-ip-adapter": unets.sd_ip_adapter,
    "wan": videos.wan,
    "wan2.2": videos.wan22,
    "z-image": tokens.z_image,
}
# The pipeline does more with its predictions than linear guidance between two of them.
_SPECIAL: dict[str, Builder] = {
    "lumina": tokens.lumina,
    "lumina2-normalised": tokens.lumina2_normalised,
    "qwen": tokens.qwen,
    "sd-pag": unets.sd_pag,
    "sd-pix2pix": unets.sd_pix2pix,
    "sd-rescale": unets.sd_rescale,
    "sd3-skip-layer": flows.sd3_skip_layer,
}
# Guidance is a component of the pipeline: no guidance_scale in the call.
_WITH_GUIDER: dict[str, Builder] = {
    "hunyuan-image": modular.hunyuan_image,
    "modular-qwen": modular.qwen,
    "modular-sd3": modular.sd3,
    "modular-sdxl": modular.sdxl,
    "modular-wan": modular.wan,
    "modular-wan-euler": modular.wan_euler,
    "modular-wan2.2": modular.wan22,
    "modular-z-image": modular.z_image,
}
_BUILDERS = {**_REQUIRED, **_FURTHER, **_SPECIAL, **_WITH_GUIDER}
REQUIRED, FURTHER = tuple(_REQUIRED), tuple(_FURTHER)
SPECIAL, WITH_GUIDER = tuple(_SPECIAL), tuple(_WITH_GUIDER)
FAMILIES = REQUIRED + FURTHER


def build(name: str, dtype: torch.dtype = torch.float32) -> Tiny:
    """Make a fresh tiny pipeline: a name of ``FAMILIES``, ``SPECIAL`` or ``WITH_GUIDER``.

    The weights are drawn in float32 and cast, so they are the same in every dtype. A test of
    blocks that a diffusers before 0.42 does not have yet is skipped there.
    """
    try:
        return replace(_BUILDERS[name](dtype), name=name)
    except AttributeError as error:
        if error.obj is diffusers and Version(diffusers.__version__) < Version("0.42"):
            pytest.skip(f"diffusers {diffusers.__version__} has no {error.name}")
        raise
