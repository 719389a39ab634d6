"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.step import Step
from ..core.tensors import per_sample
from .checks import check_pair
from .schedule import Scale, check_scale, scale_at


def classifier_free(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Extrapolate from ``uncond`` through ``cond``: ``uncond + scale * (cond - uncond)``.

    The same in every parameterization, so predictions of any kind will do. The operations and their
    order are those of the diffusers pipelines, so that a steered pipeline reproduces the bits of a
    plain one.

    Args:
        cond: prediction under the condition, (B, ...).
        uncond: prediction without it, same shape.
        scale: 0 gives ``uncond``, 1 gives ``cond``; a number, or one value a sample, () or (B,).

    Returns:
        The guided prediction, shape and dtype of ``cond``.

    Raises:
        ValueError: if the predictions differ in shape, or a tensor ``scale`` has any other shape.
    """
    check_pair(cond, uncond)
    if isinstance(scale, Tensor):
        scale = per_sample(scale.to(cond.device), cond)
    return (uncond + scale * (cond - uncond)).to(cond.dtype)


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """Classifier-free guidance: push from the unconditional prediction through the conditional one.

    Args:
        scale: diffusers' ``guidance_scale``; 1 is no guidance and needs no unconditional
            prediction. A number, or a schedule such as ``LinearScale(1.0, 8.0)``.

    Raises:
        TypeError: if ``scale`` is neither a number nor a function.
        ValueError: if ``scale`` is NaN or infinite.
    """

    scale: Scale = 4.0
    commutes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse scales that are no numbers."""
        check_scale(self.scale)

    @property
    def needs_uncond(self) -> bool:
        """Whether the unconditional prediction is read: not at a constant scale of 1."""
        return self.scale != 1

    def __call__(self, step: Step) -> Tensor:
        """The guided prediction, shape of ``step.cond``; exactly ``step.cond`` at scale 1.

        Raises:
            MissingPrediction: if the scale is not 1 and the step has no unconditional prediction.
        """
        scale = scale_at(self.scale, step)
        if scale == 1:
            return step.cond
        return classifier_free(step.cond, step.need_uncond(type(self).__name__), scale)
