"""The recipe of the classifier training: options, augmentation, learning rate, whitening filters.

It is the usual one of fast CIFAR-10 training (Page 2018, "How to train your ResNet"; Jordan 2024,
arXiv 2404.00498): Nesterov SGD with a triangular learning rate and a large weight decay, label
smoothing, translation by reflection padding, flips that alternate between epochs, and the first
part of the run at a smaller resolution. Nothing but clean images is ever shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _option(default: Any, text: str, *, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class ClassifierTraining:
    """Everything that decides the result of a run, given the data."""

    arch: str = _option("resnet", "family of the network", choices=("resnet", "plainnet"))
    width: int = _option(32, "channels of the first stage; the widest has four times as many")
    epochs: int = _option(16, "passes over the data; the learning rate decays to zero over them")
    batch_size: int = _option(250, "images an update")
    lr: float = _option(0.4, "highest learning rate")
    momentum: float = _option(0.85, "Nesterov momentum")
    weight_decay: float = _option(1.3e-3, "of kernels and matrices; vectors have none")
    label_smoothing: float = _option(0.1, "share of the target spread over all classes")
    peak: float = _option(0.2, "fraction of the run at which the learning rate is highest")
    translate: int = _option(2, "largest shift of an image in pixels")
    cutout: int = _option(0, "side of the square that is greyed out in each image; 0 for none")
    mirrored: bool = _option(False, "let the result average over each image and its mirror image")
    small_size: int = _option(24, "resolution of the first part of the run")
    small_fraction: float = _option(0.5, "fraction of the epochs at the small resolution")
    precision: str = _option("bf16", "arithmetic of the network", choices=("bf16", "fp32"))
    seed: int = _option(0, "of the weights, the order and the augmentation")

    def __post_init__(self) -> None:
        if self.cutout < 0:
            raise ValueError(f"cutout must not be negative, got {self.cutout}")
        for name in ("width", "epochs", "batch_size", "small_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "peak"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("momentum", "label_smoothing", "peak", "weight_decay", "translate"):
            if not 0 <= getattr(self, name) < (float("inf") if name == "translate" else 1):
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for item in fields(self):
            choices = item.metadata["choices"]
            if choices and getattr(self, item.name) not in choices:
                value = getattr(self, item.name)
                raise ValueError(f"{item.name} must be one of {choices}, got {value!r}")


def augment(images: Tensor, *, translate: int, flip: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to ``translate`` pixels (reflection) and mirrored where ``flip``.

    ``images`` (B, C, H, W) in any float type, ``flip`` (B,) bool; shape and range are kept.
    """
    batch, channels, height, width = images.shape
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    if not translate:
        return images
    padded = F.pad(images, (translate,) * 4, mode="reflect")
    shift = torch.randint(0, 2 * translate + 1, (2, batch), generator=generator)
    rows = (shift[0][:, None] + torch.arange(height))[:, None, :, None]
    columns = (shift[1][:, None] + torch.arange(width))[:, None, None, :]
    index = torch.arange(batch).view(-1, 1, 1, 1)
    return padded[index, torch.arange(channels).view(1, -1, 1, 1), rows, columns]


def cut_out(images: Tensor, side: int, *, generator: torch.Generator) -> Tensor:
    """Each image with one square of ``side`` pixels set to its own mean colour.

    ``images`` (B, C, H, W). The centre is anywhere in the image, so that part of the square may lie
    outside (DeVries and Taylor 2017, arXiv 1708.04552, who fill with zeros after normalisation).
    """
    batch, _, height, width = images.shape
    centre = torch.rand(2, batch, 1, generator=generator)
    rows = (torch.arange(height) - (centre[0] * height).floor() + side // 2) % (4 * height) < side
    columns = (torch.arange(width) - (centre[1] * width).floor() + side // 2) % (4 * width) < side
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(inside, images.mean((2, 3), keepdim=True), images)


def epoch_batches(
    images: Tensor, labels: Tensor, config: ClassifierTraining, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented batches of one epoch, drawn from (seed, epoch) alone, so that any epoch repeats.

    ``images`` (N, 3, H, W) uint8; yields floats in [0, 1] and their labels. An image is mirrored
    in every other epoch: which of the two is its own coin, tossed once for the whole run.
    """
    count = len(images)
    coin = torch.Generator().manual_seed(config.seed)
    mirrored = torch.randint(0, 2, (count,), generator=coin).add(epoch).remainder(2).bool()
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch + 1)
    order = torch.randperm(count, generator=generator)
    size = config.small_size if epoch < config.small_fraction * config.epochs else images.shape[-1]
    for rows in order.split(config.batch_size):
        if len(rows) < min(config.batch_size, count):
            return  # a short last batch disturbs BatchNorm; the next epoch leaves out others
        batch = images[rows].float() / 255
        batch = augment(batch, translate=config.translate, flip=mirrored[rows], generator=generator)
        if config.cutout:
            batch = cut_out(batch, config.cutout, generator=generator)
        if size != batch.shape[-1]:
            batch = F.interpolate(batch, (size, size), mode="bilinear", antialias=True)
        yield batch.contiguous(memory_format=torch.channels_last), labels[rows]


def whitening_filters(images: Tensor, size: int, eps: float = 5e-4) -> Tensor:
    """Filters (2 * 3 * size**2, 3, size, size) that whiten square patches of ``images``.

    The eigenvectors of the patch covariance divided by the root of their eigenvalue, and their
    negatives. ``images`` (N, 3, H, W), already normalised as the network does.
    """
    patches = F.unfold(images, size).transpose(1, 2).flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(patches.T.cov())
    filters = (vectors / (values + eps).sqrt()).T.view(-1, images.shape[1], size, size)
    return torch.cat([filters, -filters]).float()


def learning_rate(config: ClassifierTraining, progress: float) -> float:
    """Linear from a fifth of ``lr`` to ``lr`` at ``peak`` of the run, then linear to zero."""
    if progress < config.peak:
        return config.lr * (0.2 + 0.8 * progress / config.peak)
    return config.lr * (1 - progress) / (1 - config.peak)
