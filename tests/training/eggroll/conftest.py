"""What the tests of EGGROLL share: explicit members, small models of every kind."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import diffusers
import pytest
import torch
from tiny_pipelines import wake
from torch import Tensor, nn

from diffsteer.training.eggroll import NoiseFormat, find_layers, member_noise


class Explicit:
    """Members as whole models, written from the definition W + sigma A B^T / sqrt(r)."""

    def __init__(self, model: nn.Module, noise: NoiseFormat, step: int, sigma: float) -> None:
        self.model, self.noise, self.step, self.sigma = model, noise, step, sigma
        self.layers = find_layers(model)

    def perturbation(self, name: str, weight: Tensor, member: int) -> Tensor:
        layer = self.layers[name]
        pair, sign = (
            (member // 2, -1 if member % 2 else 1) if self.noise.antithetic else (member, 1)
        )
        a, b = member_noise(self.noise, layer, pair, self.step, dtype=weight.dtype)
        return sign * (a @ b.T).view(weight.shape) / math.sqrt(self.noise.rank)

    def member(self, member: int) -> nn.Module:
        other = copy.deepcopy(self.model)
        for name, module in other.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and member >= 0:
                module.weight.data += self.sigma * self.perturbation(name, module.weight, member)
        return other


@pytest.fixture
def explicit() -> type[Explicit]:
    return Explicit


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
    )


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=5,
    )


def unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=2,
    )


def inputs(name: str, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments of a call, every row another."""
    source = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=source).to(dtype)

    timestep = torch.randint(1, 1000, (rows,), generator=source)
    if name == "dit":
        labels = torch.randint(0, 5, (rows,), generator=source)
        return {"hidden_states": normal(3, 8, 8), "timestep": timestep, "class_labels": labels}
    if name == "unet":
        text = {"encoder_hidden_states": normal(6, 12)}
        return {"sample": normal(4, 8, 8), "timestep": timestep, **text}
    text = {"encoder_hidden_states": normal(6, 24), "pooled_projections": normal(20)}
    return {"hidden_states": normal(4, 8, 8), "timestep": timestep, **text}


MODELS = {"sd3": sd3, "dit": dit, "unet": unet}


class Network:
    """A tiny real diffusers network, and calls of it."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        self.name, self.dtype = name, dtype
        self.model: nn.Module = nn.Module.to(wake(MODELS[name]()), dtype)

    def arguments(self, rows: int) -> dict[str, Tensor]:
        return inputs(self.name, rows, self.dtype)

    def __call__(self, model: nn.Module, arguments: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return model(**arguments, return_dict=False)[0]


@pytest.fixture
def network() -> type[Network]:
    return Network


def take(arguments: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    return {name: value[list(rows)] for name, value in arguments.items()}


@pytest.fixture
def rows_of_arguments() -> object:
    return take


@pytest.fixture
def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double().eval()
