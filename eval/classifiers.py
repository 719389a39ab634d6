"""Small CIFAR-10 classifiers of two families, and the two trained ones that ship with the package.

`CifarResNet` (residual, BatchNorm, ReLU) is meant for guidance; `CifarPlainNet` (no shortcuts, a
whitening first layer, GELU) is meant for evaluation only, so that no score is computed by the
network that steered the samples.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_EMBEDDED = Path(__file__).resolve().parent / "embedded"
_FOLDERS = {"guidance": "guidance_resnet", "evaluation": "evaluation_plainnet"}


@dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a `CifarResNet`: the stem has ``width`` channels, the stages 2, 4 and 4 times it."""

    width: int = 32
    num_classes: int = 10
    class_names: tuple[str, ...] = CIFAR10_CLASSES
    logit_scale: float = 0.125


@dataclass(frozen=True)
class PlainNetConfig:
    """Sizes of a `CifarPlainNet`: channels of its three stages; the last is the feature size."""

    widths: tuple[int, int, int] = (32, 128, 128)
    num_classes: int = 10
    class_names: tuple[str, ...] = CIFAR10_CLASSES
    logit_scale: float = 0.125


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _conv_norm(width, width), _conv_norm(width, width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.relu(self.second(self.relu(self.first(x))))


def _conv_norm(width_in: int, width_out: int, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(width_in, width_out, 3, padding=1, bias=False)]
    if pool:  # before the norm: a quarter of the elementwise work
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.BatchNorm2d(width_out))


class CifarClassifier(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images)) * self.config.logit_scale

    def features(self, images):
        x = (images - self.mean) / self.std
        return self.trunk(x).amax((2, 3))


class CifarResNet(CifarClassifier):
    def __init__(self, config: ResNetConfig | None = None) -> None:
        config = config or ResNetConfig()
        super().__init__(config)
        w = config.width
        self.trunk = nn.Sequential(
            _conv_norm(3, w), nn.ReLU(),
            _conv_norm(w, 2 * w, pool=True), nn.ReLU(), _Residual(2 * w),
            _conv_norm(2 * w, 4 * w, pool=True), nn.ReLU(),
            _conv_norm(4 * w, 4 * w, pool=True), nn.ReLU(), _Residual(4 * w),
        )
        self.head = nn.Linear(4 * w, config.num_classes, bias=False)


class CifarPlainNet(CifarClassifier):
    def __init__(self, config: PlainNetConfig | None = None) -> None:
        config = config or PlainNetConfig()
        super().__init__(config)
        self.whiten = nn.Conv2d(3, 24, 2)
        layers: list[nn.Module] = [self.whiten, nn.GELU(approximate="tanh")]
        width = 24
        for wider in config.widths:
            layers += [_conv_norm(width, wider, pool=True), nn.GELU(approximate="tanh")]
            layers += [_conv_norm(wider, wider), nn.GELU(approximate="tanh")]
            width = wider
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(width, config.num_classes, bias=False)
