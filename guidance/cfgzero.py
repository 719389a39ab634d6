"""CFG-Zero* (Fan et al. 2025, arXiv 2503.18886): an optimised scale, and first steps of zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.prediction import Kind
from ..core.step import Step
from ..core.tensors import per_sample, sample_dot, widen
from .checks import check_number, check_pair
from .origin import origin
from .schedule import Scale, check_scale, scale_at

_TINY = 1e-30  # keeps 0 / 0 out; far below any norm that float32 can tell from 0


def optimised_scale(cond: Tensor, uncond: Tensor) -> Tensor:
    """The s for which ``s * uncond`` comes nearest to ``cond``: ``<cond, uncond> / |uncond|^2``.

    Args:
        cond: velocity under the condition, (B, ...).
        uncond: velocity without it, same shape.

    Returns:
        One value a sample, (B,), float32 or wider; 0 where ``uncond`` is zero.
    """
    other = widen(uncond)
    return sample_dot(widen(cond), other) / sample_dot(other, other).clamp_min(_TINY)


def zero_star(cond: Tensor, uncond: Tensor, scale: float, *, zero: Tensor | None = None) -> Tensor:
    """Classifier-free guidance from the unconditional velocity times its best factor.

    ``s * uncond + scale * (cond - s * uncond)`` with s = ``optimised_scale``: the push is then
    orthogonal to ``uncond``.

    Args:
        cond: velocity under the condition, (B, ...), of either sign.
        uncond: velocity without it, same shape and sign.
        scale: 1 gives ``cond``.
        zero: where a velocity of zero lies among these predictions, same shape: with it, denoised
            predictions are guided as their velocities would be, see ``origin``.

    Returns:
        The guided prediction, shape and dtype of ``cond``; computed in float32 or wider.

    Raises:
        ValueError: if the predictions differ in shape.
    """
    check_pair(cond, uncond)
    wide, other = widen(cond), widen(uncond)
    own, other = (wide, other) if zero is None else (wide - zero, other - zero)
    push = own - per_sample(optimised_scale(own, other), other) * other
    return (wide + (scale - 1) * push).to(cond.dtype)


@dataclass(frozen=True)
class ClassifierFreeZeroStarGuidance:
    """CFG-Zero*: classifier-free guidance for flow models whose early velocities are not trusted.

    Args:
        scale: diffusers' ``guidance_scale``; 1 is no guidance. A number or a schedule.
        zero_init_steps: how many of the first steps take a velocity of zero, at any scale; 1 is
            usual, the paper speaks of the first 4 % of the steps; 0 is off.

    Raises:
        TypeError: if a number is something else.
        ValueError: if one is NaN or out of range.

    It acts on the velocity ``noise - clean`` whatever the model predicts, so it is one method
    everywhere: for flow models (SD3, Flux, Wan, Sana) it acts on the network's own output and is
    diffusers' guider of that name. For models of noise or v it is defined through the flow of the
    same model, ``x / (alpha + sigma)`` being its sample, where diffusers' guider acts on the raw
    output, which is another method for each kind; the paper has flow models only.

    Source: arXiv 2503.18886. Where we differ: every kind of model, and products in
    float32 or wider.
    """

    scale: Scale = 4.0
    zero_init_steps: int = 1
    commutes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_scale(self.scale)
        remedy = "it counts steps, 0 is off and 1 is usual"
        check_number("zero_init_steps", self.zero_init_steps, low=0, whole=True, remedy=remedy)

    @property
    def needs_uncond(self) -> bool:
        """Whether the unconditional prediction is read: not at a constant scale of 1."""
        return self.scale != 1

    def __call__(self, step: Step) -> Tensor:
        """The guided prediction, shape of ``step.cond``; exactly ``step.cond`` at scale 1.

        Raises:
            MissingPrediction: if the scale is not 1 and the step has no unconditional prediction.
            ValueError: if every step of the run would be of zero velocity.
        """
        scale = scale_at(self.scale, step)
        uncond = step.cond if scale == 1 else step.need_uncond(type(self).__name__)
        if step.index < self.zero_init_steps:
            if self.zero_init_steps >= step.count:
                raise ValueError(
                    f"zero_init_steps={self.zero_init_steps} of {step.count} steps: nothing would "
                    "be sampled; take fewer, or more steps"
                )
            return origin(step, Kind.VELOCITY).to(step.cond.dtype)
        if scale == 1:
            return step.cond
        return zero_star(step.cond, uncond, scale, zero=origin(step, Kind.VELOCITY))
