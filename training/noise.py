"""The noise that an objective learns on: Gaussian, or the Student-t noise of PFGM++."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.prediction import Level
from ..core.student import check_augment_dim, student_log_weights
from ..core.tensors import per_sample

__all__ = ["NoiseLaw", "stable_pair"]


@dataclass(frozen=True, kw_only=True)
class NoiseLaw:
    """Settings that every objective shares.

    Attributes:
        augment_dim: the D of PFGM++ (arXiv 2302.04265); infinity is Gaussian noise, from the same
            random stream.
        stable_targets: learn the mean over the batch instead of single images, see ``stable_pair``.

    Raises:
        TypeError: if ``augment_dim`` is no number.
        ValueError: unless ``augment_dim`` is positive.
    """

    augment_dim: float = math.inf
    stable_targets: bool = False

    def __post_init__(self) -> None:
        """Refuse a D that is none."""
        check_augment_dim(self.augment_dim)


def stable_pair(
    clean: Tensor,
    noise: Tensor,
    level: Level,
    labels: Tensor,
    classes: Tensor,
    *,
    null: int,
    augment_dim: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """The stable targets of STF (arXiv 2302.00670) as a pair of clean and noise at the same x.

    ``clean`` becomes the posterior mean of x over the images of the batch that the sample's label
    allows (all of them for the null label), and ``noise`` what is then missing to x. Every target
    that is a mix of the two is thereby replaced by its posterior mean, whatever the objective. The
    weights are those of the PFGM++ kernel, as in its reference code but with a log-softmax.

    Args:
        clean: the batch, (B, ...).
        noise: same shape, Student-t for a finite D.
        level: alpha and sigma of shape (B,).
        labels: what the network is told, (B,).
        classes: the images' own classes, (B,).
        null: the label that allows every image.
        augment_dim: D of the noise.

    Returns:
        The new clean and noise, (B, ...) each.
    """
    x = level.mix(clean, noise)
    alpha, sigma = per_sample(level.alpha, x), per_sample(level.sigma, x)
    log_weight = student_log_weights(x / alpha, clean, level.ratio, augment_dim)
    allowed = (labels[:, None] == classes[None]) | (labels[:, None] == null)
    weight = log_weight.masked_fill(~allowed, -torch.inf).softmax(1).to(clean.dtype)
    mean = (weight @ clean.flatten(1)).reshape(clean.shape)
    return mean, (x - alpha * mean) / sigma
