"""Train a small image classifier: seeded, resumable, cheap enough for one CPU core.

The recipe is the usual one of fast CIFAR-10 training (Page 2018, "How to train your ResNet";
Jordan 2024, arXiv 2404.00498): Nesterov SGD with a triangular learning rate and a large weight
decay, label smoothing, translation by reflection padding, flips that alternate between epochs,
and the first part of the run at a smaller resolution. Nothing but clean images is ever shown.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..eval.classifiers import CifarClassifier

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassifierTraining:
    """Everything that decides the result of a run, given the data and the architecture."""

    epochs: int = 12
    batch_size: int = 250
    lr: float = 0.4
    momentum: float = 0.85
    weight_decay: float = 1.3e-3
    label_smoothing: float = 0.2
    peak: float = 0.2  # fraction of the run at which the learning rate is highest
    translate: int = 2  # pixels
    small_size: int = 24  # resolution of the first part of the run
    small_fraction: float = 0.5  # of the epochs
    seed: int = 0
    bf16: bool = True
    compile: bool = True


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
            return  # a short last batch would disturb BatchNorm; another order comes next epoch
        batch = images[rows].float() / 255
        batch = augment(
            batch, translate=config.translate, flip=mirrored[rows], generator=generator
        )
        if size != batch.shape[-1]:
            batch = F.interpolate(batch, (size, size), mode="bilinear", antialias=True)
        yield batch.contiguous(memory_format=torch.channels_last), labels[rows]


def whitening_filters(images: Tensor, size: int, eps: float = 5e-4) -> Tensor:
    """Filters that whiten ``size`` x ``size`` patches of ``images``, (2 * 3 * size**2, 3, size, size).

    The eigenvectors of the patch covariance divided by the root of their eigenvalue, and their
    negatives. ``images`` (N, 3, H, W), already normalised as the network does.
    """
    patches = F.unfold(images, size).transpose(1, 2).flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(patches.T.cov())
    filters = (vectors / (values + eps).sqrt()).T.view(-1, images.shape[1], size, size)
    return torch.cat([filters, -filters]).float()


def learning_rate(config: ClassifierTraining, progress: float) -> float:
    """The triangular schedule: linear from a fifth of ``lr`` to ``lr`` at ``peak``, then to zero."""
    if progress < config.peak:
        return config.lr * (0.2 + 0.8 * progress / config.peak)
    return config.lr * (1 - progress) / (1 - config.peak)


def _optimizer(model: nn.Module, config: ClassifierTraining) -> torch.optim.SGD:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=True)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """Logits (N, classes) in float32 of uint8 ``images`` (N, 3, H, W), in eval mode."""
    was_training = model.training
    model.eval()
    logits = [model(rows.float() / 255).float() for rows in images.split(batch_size)]
    model.train(was_training)
    return torch.cat(logits)


def train_epoch(model, optimizer, images, labels, config, epoch):
    """One pass over the data; returns the mean training loss."""
    steps = len(images) // config.batch_size
    total = 0.0
    model.train()
    for step, (batch, target) in enumerate(epoch_batches(images, labels, config, epoch)):
        rate = learning_rate(config, (epoch + (step + 0.5) / steps) / config.epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=config.bf16):
            logits = model(batch)
        loss = F.cross_entropy(logits.float(), target, label_smoothing=config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / steps
