"""Tiny class-conditional flow pipelines: random weights that matter, or a flow known exactly."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DModel
from tiny_pipelines import wake
from torch import Tensor

from diffsteer import ClassConditionalPipeline, Kind, Level
from diffsteer.core import from_denoised

NAMES = dict(enumerate("airplane automobile bird cat deer dog frog horse ship truck".split()))


def tiny_dit(**changes: Any) -> DiTTransformer2DModel:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 3,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 4,
        "num_embeds_ada_norm": 10,
    }
    return wake(DiTTransformer2DModel(**{**config, **changes}))


def tiny_unet() -> UNet2DModel:
    return wake(
        UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=11,
        )
    )


def tiny_pipeline(
    prediction: str = "velocity", network: Any = None, **changes: Any
) -> ClassConditionalPipeline:
    """Ten classes, 8x8 pixels, fresh at every call."""
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "id2label": NAMES, **changes}
    pipe = ClassConditionalPipeline(network or tiny_dit(), prediction=prediction, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gaussian_pipeline(
    mean: float, std: float, prediction: str, scheduler: Any = None, **said: Any
) -> Any:
    """A pipeline whose network is the perfect denoiser of pixels drawn from N(mean, std^2).

    ``said`` goes to the pipeline (``k`` of "kdiff"). The flow carries noise z to mean + std * z
    exactly. The class shifts the mean: class k adds k / 10, and the null class nothing.
    """
    network = tiny_dit()

    def forward(x: Tensor, timestep: Tensor, class_labels: Tensor, **_: Any) -> tuple[Tensor]:
        sigma = (timestep / 1000).reshape(-1, 1, 1, 1)
        shift = torch.where(class_labels == 10, 0, class_labels / 10).reshape(-1, 1, 1, 1)
        center, alpha = mean + shift, 1 - sigma
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        denoised = center + gain * (x - alpha * center)
        kind = Kind.kdiff(said["k"]) if prediction == "kdiff" else Kind(prediction)
        return (from_denoised(denoised, kind, x, Level.flow(sigma.flatten())),)

    network.forward = forward
    parts = {"scheduler": scheduler} if scheduler else {}
    return tiny_pipeline(prediction, network, **parts, **said)
