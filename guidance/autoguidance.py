"""Autoguidance (Karras et al. 2024, arXiv 2406.02507): away from a bad version of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from ..core.step import Branch, Guidance, Step
from .cfg import ClassifierFreeGuidance
from .checks import check_model, check_rule
from .schedule import Scale, check_scale, scale_at


@dataclass(frozen=True)
class AutoGuidance:
    """Any guidance with a weak model's conditional prediction in the place of the unconditional.

    The weak model is a smaller or less trained version of the same model, under the same condition:
    ``weak + scale * (cond - weak)``. One evaluation of the weak model a step; the pipeline needs no
    unconditional prediction and may run with its own guidance off.

    Args:
        scale: 1 is no guidance and no evaluation; 1.5 to 2.5 is usual. A number or a schedule.
        rule: the guidance to run on the pair (conditional, weak) instead of plain extrapolation,
            e.g. ``AdaptiveProjectedGuidance(scale=2.0)`` for its projection and clipping. Its own
            scale counts, and ``scale`` becomes None. Intervals belong outside,
            ``GuidanceInterval(AutoGuidance(2.0), low, high)``: only there do they spare the
            evaluation of the weak model.
        model: the weak model, called as the denoiser is called; None is the one given to
            ``steer(pipe, rule, weak=...)`` or ``GuidedDenoiser(..., weak=...)``. ``steer`` also
            takes a checkpoint folder, or a ``degraded`` pass of the model itself.

    Raises:
        TypeError: if ``scale`` is no number, ``rule`` no guidance method, or ``model`` no function.
        ValueError: if both ``scale`` and ``rule`` are given, or ``scale`` is NaN or infinite.

    Source: Karras et al. 2024, eq. 5; the composition with other rules is ours.
    """

    scale: Scale | None = 2.0
    rule: Guidance | None = None
    model: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        """Refuse what is no number and no rule; an explicit rule replaces the default scale."""
        if self.rule is not None and self.scale == 2.0:
            object.__setattr__(self, "scale", None)
        if (self.scale is None) == (self.rule is None):
            raise ValueError(
                f"give exactly one of scale and rule, got scale={self.scale} and rule={self.rule}; "
                "the rule has a scale of its own"
            )
        if self.scale is not None:
            check_scale(self.scale)
        else:
            check_rule("rule", self.rule)
        check_model("model", self.model)

    needs_uncond: ClassVar[bool] = False  # the weak model's prediction takes its place

    @property
    def commutes(self) -> bool:
        """Whether the inner rule gives the same result in every parameterization."""
        return True if self.rule is None else bool(getattr(self.rule, "commutes", False))

    @property
    def moves(self) -> bool:
        """Whether the inner rule replaces the noisy sample."""
        return bool(getattr(self.rule, "moves", False))

    def __call__(self, step: Step) -> Tensor:
        """The guided prediction, shape of ``step.cond``; exactly ``step.cond`` at scale 1.

        Raises:
            MissingPrediction: if there is no weak model.
        """
        if self.scale is not None and scale_at(self.scale, step) == 1:
            return step.cond
        rule = ClassifierFreeGuidance(self.scale) if self.scale is not None else self.rule
        if rule is None:
            raise ValueError("neither scale nor rule is set")

        def evaluate(x: Tensor | None, branch: Branch = "cond", **overrides: Any) -> Tensor:
            if branch == "uncond":  # the rule moves the sample: the weak model goes with it
                return step.weak(self.model, x=x, **overrides)
            return step.predict(x, branch, **overrides)

        pair = replace(step, uncond=step.weak(self.model), evaluate=evaluate)
        guided = rule(pair)
        step.moved = pair.moved
        return guided
