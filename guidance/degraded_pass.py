"""Skip-layer guidance and perturbed-attention guidance: away from a degraded pass, beside a rule.

Skip-layer guidance is Stability AI's for SD3.5 (github.com/Stability-AI/sd3.5), perturbed-attention
guidance is Ahn et al. 2024, arXiv 2403.17377. They differ in the pass alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.step import Guidance, Step, needs_uncond
from .checks import check_model, check_number, check_pair, check_still
from .schedule import Scale, check_scale, scale_at


def away_from_degraded(guided: Tensor, cond: Tensor, degraded: Tensor, scale: float) -> Tensor:
    """Add ``scale * (cond - degraded)`` to a guided prediction.

    The same in every parameterization, so predictions of any kind will do; the operations are those
    of diffusers' StableDiffusion3Pipeline.

    Args:
        guided: what some guidance made of the step, (B, ...).
        cond: prediction under the condition, same shape.
        degraded: that of the degraded pass under the same condition, same shape.
        scale: 0 gives ``guided``.

    Returns:
        Shape and dtype of ``guided``.

    Raises:
        ValueError: if the predictions differ in shape.
    """
    check_pair(cond, degraded)
    return (guided + scale * (cond - degraded)).to(guided.dtype)


@dataclass(frozen=True)
class DegradedPassGuidance:
    """A guidance, and on top of it a push away from a degraded pass of the same model.

    Skip-layer guidance (SLG) of SD3.5-medium:
    ``steer(pipe, DegradedPassGuidance(ClassifierFreeGuidance(4.5)), weak="skip:7,8,9")``.
    Perturbed-attention guidance (PAG) of SDXL:
    ``steer(pipe, DegradedPassGuidance(ClassifierFreeGuidance(5.0), 3.0, start=0, stop=1),
    weak="perturb:mid_block")``. One evaluation more at each step of the window; where the pipeline
    batches both branches it is of both (SD3's own makes the conditional one alone).

    Args:
        rule: the guidance beside; it must not move the sample. ``ClassifierFreeGuidance(1.0)`` is
            the push alone.
        scale: weight of the push, diffusers' ``skip_layer_guidance_scale`` and ``pag_scale``; 0 is
            none. A number or a schedule over the whole run.
        start: share of the steps before which there is no push, in [0, 1).
        stop: share of the steps from which on there is none, in (start, 1]; 1 includes the last.
        model: the degraded pass, or any other model that is called as the denoiser is called; None
            is the one given to ``steer(pipe, rule, weak=...)``.

    Raises:
        TypeError: if ``rule`` is no guidance method, ``model`` no function, or a number none.
        ValueError: if a number is out of range, or ``rule`` moves the sample.

    For a window of noise levels, compare ``GuidanceInterval``: ``outside=rule`` keeps the rule
    running where the push is off. The defaults are those that Stability AI recommends for
    SD3.5-medium.

    Source: the released code for SD3.5, and arXiv 2403.17377 with classifier-free guidance. Where
    we differ: any rule beside, where those have plain guidance. The window is
    ``start * count <= index < stop * count``; SD3's pipeline leaves out a step exactly at ``start``
    (so the first one, always), and diffusers' guiders cut both ends down to whole steps. With their
    own guidance off those guiders do autoguidance, in which 1 is no push.
    """

    rule: Guidance
    scale: Scale = 2.8
    start: float = 0.01
    stop: float = 0.2
    model: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        """Check the numbers, the rule and the pass."""
        check_still(self.rule, type(self).__name__)
        check_scale(self.scale)
        remedy = "it is a share of the steps"
        check_number("start", self.start, low=0.0, high=1.0, open_high=True, remedy=remedy)
        check_number("stop", self.stop, low=0.0, high=1.0, remedy=remedy)
        if self.start >= self.stop:
            raise ValueError(
                f"start must be less than stop, got start={self.start} and stop={self.stop}; "
                f"{remedy}, and scale=0 is off"
            )
        check_model("model", self.model)

    @property
    def commutes(self) -> bool:
        """Whether the rule beside gives the same result in every parameterization."""
        return bool(getattr(self.rule, "commutes", False))

    @property
    def needs_uncond(self) -> bool:
        """Whether the rule beside reads the unconditional prediction."""
        return needs_uncond(self.rule)

    def __call__(self, step: Step) -> Tensor:
        """The guided prediction, shape of ``step.cond``; exactly ``rule``'s outside the window.

        Raises:
            MissingPrediction: if there is no pass, or the rule beside lacks a prediction.
            ValueError: at the first step, if no step of the run lies in the window.
        """
        guided, scale = self.rule(step), scale_at(self.scale, step)
        if self.scale == 0:
            return guided
        first = math.ceil(self.start * step.count)
        if step.index == 0 and first >= self.stop * step.count:
            raise ValueError(
                f"none of the {step.count} steps lies between start={self.start:g} and "
                f"stop={self.stop:g} of the run, so there would be no push; take more steps, or a "
                "wider window"
            )
        if scale == 0 or not first <= step.index < self.stop * step.count:
            return guided
        return away_from_degraded(guided, step.cond, step.weak(self.model), scale)
