"""Frequency-decoupled guidance (Sadat et al. 2025, arXiv 2506.19713): a scale for each band."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..core.step import Step
from ..core.tensors import widen
from .checks import check_number, check_pair
from .schedule import Scale, check_scale, scale_at


def low_frequencies(images: Tensor, halvings: int = 1) -> Tensor:
    """What is left of images after halving their size and doubling it again.

    The low band of a Laplacian pyramid; ``images - low_frequencies(images)`` are all finer ones.
    Each halving and doubling blurs by the binomial filter (1, 4, 6, 4, 1) and resizes linearly.

    Args:
        images: (B, C, H, W), or (B, C, F, H, W) for videos, frame by frame; floating point.
        halvings: how often the size is halved.

    Returns:
        Same shape and dtype.

    Raises:
        ValueError: for other numbers of dimensions, and for images too small to be halved.
    """
    _check_images(images, halvings)
    level = images.reshape(-1, 1, *images.shape[-2:])
    sizes = []
    for _ in range(halvings):
        sizes.append(level.shape[-2:])
        level = _resize(_blur(level), (sizes[-1][0] // 2, sizes[-1][1] // 2))
    for height, width in reversed(sizes):
        level = _blur(_resize(level, (height, width)))
    return level.reshape(images.shape)


def _check_images(images: Tensor, halvings: int) -> None:
    if images.ndim not in (4, 5):
        raise ValueError(
            "frequencies need rows and columns, (B, C, H, W) or (B, C, F, H, W), got "
            f"{tuple(images.shape)}; packed tokens (Flux, Qwen-Image, LTX) have none: take another "
            "guidance for this model"
        )
    if min(images.shape[-2:]) >> (halvings - 1) < 3:  # the filter reflects two rows at the edges
        raise ValueError(
            f"images of {tuple(images.shape[-2:])} are too small for {halvings} halvings; each "
            "needs three rows and columns; take fewer"
        )


def _blur(images: Tensor) -> Tensor:
    padded = functional.pad(images, (2, 2, 2, 2), mode="reflect")
    for dimension in (-2, -1):  # sums of shifted images: a filter would be copied to the device
        size = padded.shape[dimension] - 4
        shifted = [padded.narrow(dimension, place, size) for place in range(5)]
        padded = (6 * shifted[2] + 4 * (shifted[1] + shifted[3]) + shifted[0] + shifted[4]) / 16
    return padded


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(images, size=size, mode="bilinear", align_corners=False)


def frequency_decoupled(
    cond: Tensor, uncond: Tensor, scale_high: float, scale_low: float, *, halvings: int = 1
) -> Tensor:
    """Classifier-free guidance with one scale for the high frequencies and one for the low.

    Linear in both predictions, and the same in every parameterization: predictions of any kind do.

    Args:
        cond: prediction under the condition, (B, C, H, W) or (B, C, F, H, W).
        uncond: prediction without it, same shape.
        scale_high: guidance scale of the high frequencies; 1 is no guidance.
        scale_low: guidance scale of the low frequencies.
        halvings: see ``low_frequencies``.

    Returns:
        The guided prediction, shape and dtype of ``cond``; computed in float32 or wider.

    Raises:
        ValueError: if the predictions differ in shape, or are no images.
    """
    check_pair(cond, uncond)
    wide = widen(cond)
    push = wide - widen(uncond)
    low = low_frequencies(push, halvings)
    guided = torch.add(wide, push, alpha=scale_high - 1).add_(low, alpha=scale_low - scale_high)
    return guided.to(cond.dtype)


@dataclass(frozen=True)
class FrequencyDecoupledGuidance:
    """Classifier-free guidance, strong on details and mild on colours and composition.

    Args:
        scale_high: guidance scale of the high frequencies; a number or a schedule.
        scale_low: guidance scale of the low frequencies, which oversaturate first and cost variety;
            a number or a schedule. With both equal it is classifier-free guidance.
        halvings: where the bands part: the low one survives this many halvings of the latent.

    Raises:
        TypeError: if a number is something else.
        ValueError: if one is NaN or out of range.

    For latents with rows and columns (SD, SDXL, SD3, Sana, Wan), not for packed tokens (Flux).

    Source: arXiv 2506.19713 and diffusers' guider of that name, whose ``guidance_scales`` are
    ``[scale_high] * halvings + [scale_low]``. Where we differ: two bands, no projection, no kornia,
    any even or odd size, and since it is linear any kind of prediction gives the same.
    """

    scale_high: Scale = 10.0
    scale_low: Scale = 5.0
    halvings: int = 1
    commutes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_scale(self.scale_high, "scale_high")
        check_scale(self.scale_low, "scale_low")
        remedy = "it counts halvings of the latent, 1 is usual"
        check_number("halvings", self.halvings, low=1, whole=True, remedy=remedy)

    @property
    def needs_uncond(self) -> bool:
        """Whether the unconditional prediction is read: not at constant scales of 1."""
        return not self.scale_high == self.scale_low == 1

    def __call__(self, step: Step) -> Tensor:
        """The guided prediction, shape of ``step.cond``; exactly ``step.cond`` at scales of 1.

        Raises:
            MissingPrediction: if a scale is not 1 and the step has no unconditional prediction.
            ValueError: if the predictions have no rows and columns.
        """
        high, low = scale_at(self.scale_high, step), scale_at(self.scale_low, step)
        if high == low == 1:
            return step.cond
        uncond = step.need_uncond(type(self).__name__)
        return frequency_decoupled(step.cond, uncond, high, low, halvings=self.halvings)
