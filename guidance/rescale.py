"""Guidance rescale (Lin et al. 2023, arXiv 2305.08891, section 3.4): keep the contrast down."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.step import Guidance, Step, needs_uncond
from ..core.tensors import per_sample, widen
from .apg import Space
from .checks import check_choice, check_number, check_pair, check_still
from .origin import origin


def rescaled(guided: Tensor, cond: Tensor, rescale: float, *, zero: Tensor | None = None) -> Tensor:
    """Give a guided prediction, in part, the standard deviation of the conditional one.

    ``guided * (rescale * std(cond) / std(guided) + 1 - rescale)``, each standard deviation over all
    dimensions of a sample but the first.

    Args:
        guided: what some guidance made, (B, ...): raw outputs, or predictions of another kind.
        cond: prediction under the condition, same shape and kind.
        rescale: phi; 0 leaves ``guided`` as it is, 1 gives it the whole standard deviation.
        zero: where an output of zero lies among these predictions, same shape: with it, denoised
            predictions are rescaled as their outputs would be, see ``origin``. None is zero itself.

    Returns:
        Shape and dtype of ``guided``; computed in float32 or wider. A sample whose ``guided`` is
        constant is left alone.

    Raises:
        ValueError: if the predictions differ in shape.
    """
    check_pair(cond, guided)
    wide = widen(guided)
    output, like = (wide, widen(cond)) if zero is None else (wide - zero, widen(cond) - zero)
    spread = _std(output)
    ratio = torch.where(spread > 0, _std(like) / spread, 1.0)
    return (wide + per_sample(rescale * (ratio - 1), wide) * output).to(guided.dtype)


def _std(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), -1).std(1, correction=0)  # the correction drops out of ratios


@dataclass(frozen=True)
class RescaledGuidance:
    """Any guidance, whose result is given back the standard deviation of the conditional output.

    Args:
        rule: the guidance, e.g. ``ClassifierFreeGuidance(7.5)`` or ``AdaptiveProjectedGuidance``;
            it must not move the sample.
        rescale: diffusers' ``guidance_rescale``, the paper's phi, in [0, 1]; 0 is off.
        space: ``"output"`` (paper, diffusers): the standard deviation of what the pipeline hands
            to its scheduler (noise, v or velocity), whatever space ``rule`` acts in;
            ``"denoised"``: that of the denoised sample, the same method for every kind of model.

    Raises:
        TypeError: if ``rule`` is no guidance method, or ``rescale`` no number.
        ValueError: if ``rescale`` is out of range, ``space`` unknown, or ``rule`` moves the sample.

    Around classifier-free guidance it is ``rescale_noise_cfg`` of diffusers; where ``rule`` gives
    the conditional prediction (at scale 1, outside an interval) it changes nothing. The outputs of
    a ``GuidedDenoiser`` are its denoised samples.

    Source: arXiv 2305.08891, section 3.4. Where we differ: any rule inside, also one on denoised
    predictions, and float32 standard deviations in half precision.
    """

    rule: Guidance
    rescale: float = 0.7
    space: Space = "output"

    def __post_init__(self) -> None:
        """Check the numbers and the rule."""
        check_still(self.rule, type(self).__name__)
        check_number(
            "rescale", self.rescale, low=0.0, high=1.0, remedy="0 is off, 0.7 is the paper's"
        )
        check_choice("space", self.space, ("output", "denoised"))

    @property
    def commutes(self) -> bool:
        """Whether adapters should hand over raw outputs: if they are meant and ``rule`` can."""
        return self.space == "output" and bool(getattr(self.rule, "commutes", False))

    @property
    def needs_uncond(self) -> bool:
        """Whether the inner rule reads the unconditional prediction."""
        return needs_uncond(self.rule)

    def __call__(self, step: Step) -> Tensor:
        """The rescaled prediction, shape of ``step.cond``; exactly ``rule``'s where that is cond.

        Raises:
            MissingPrediction: if the inner rule needs a prediction that the step does not have.
        """
        guided = self.rule(step)
        if self.rescale == 0 or guided is step.cond:
            return guided
        kind = step.output_kind if self.space == "output" else None
        zero = None if kind is None else origin(step, kind)
        return rescaled(guided, step.cond, self.rescale, zero=zero)
