"""Guidance in an interval of noise levels (Kynkäänniemi et al. 2024, arXiv 2404.07724)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.step import Guidance, Step, needs_uncond
from ..core.tensors import per_sample
from .checks import check_number, check_reached, check_rule


@dataclass(frozen=True)
class GuidanceInterval:
    """Apply ``rule`` where ``low < sigma <= high``; elsewhere use the conditional prediction.

    Sigma is always the noise-to-signal ratio ``step.level.ratio``: the sigma of EDM and
    k-diffusion, about 0.002 to 80, infinity for pure noise of a flow model. For the sigma in [0, 1]
    of flow models (SD3, Flux, ...) use ``GuidanceInterval.flow``.

    Args:
        rule: any guidance method.
        low: guidance is off at this sigma and below.
        high: guidance is off above this sigma; infinity (default) for no upper end.

    Raises:
        TypeError: if ``rule`` is not a guidance method, or an end is not a number.
        ValueError: if ``low`` is negative, an end is NaN, or ``low >= high``.

    The rule's memory (momentum) is kept apart and emptied outside the interval: what it held
    belonged to other noise levels. Where levels differ within a batch, or live on an accelerator
    (reading them would stop the device), the rule runs on every sample, the result is chosen by
    ``torch.where``, and the memory is not emptied.

    Source: Kynkäänniemi et al. 2024. Good ends belong to a model; (0.28, 3] is a place to start for
    EDM2 at 512 pixels.
    """

    rule: Guidance
    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        """Refuse empty intervals and rules that are none."""
        check_rule("rule", self.rule)
        check_number("low", self.low, low=0.0, remedy="sigma is a noise-to-signal ratio")
        check_number("high", self.high, infinite=True, remedy="use math.inf for no upper end")
        if self.low >= self.high:
            raise ValueError(
                f"low must be less than high, got low={self.low} and high={self.high}; "
                "guidance is on where low < sigma <= high"
            )

    @classmethod
    def flow(cls, rule: Guidance, low: float = 0.0, high: float = 1.0) -> GuidanceInterval:
        """The same with flow sigmas: ``x = (1 - sigma) * clean + sigma * noise``, sigma in [0, 1].

        Raises:
            ValueError: if an end is not in [0, 1], or ``low >= high``.
        """
        remedy = "a flow sigma is 0 for clean samples and 1 for noise"
        check_number("low", low, low=0.0, high=1.0, remedy=remedy)
        check_number("high", high, low=0.0, high=1.0, remedy=remedy)
        if low >= high:
            raise ValueError(f"low must be less than high, got low={low} and high={high}")
        return cls(rule, low / (1 - low), high / (1 - high) if high < 1 else math.inf)

    @property
    def commutes(self) -> bool:
        """Whether the inner rule gives the same result in every parameterization."""
        return bool(getattr(self.rule, "commutes", False))

    @property
    def moves(self) -> bool:
        """Whether the inner rule replaces the noisy sample."""
        return bool(getattr(self.rule, "moves", False))

    @property
    def needs_uncond(self) -> bool:
        """Whether the inner rule reads the unconditional prediction."""
        return needs_uncond(self.rule)

    def __call__(self, step: Step) -> Tensor:
        """The guided prediction inside the interval, exactly ``step.cond`` outside.

        Raises:
            MissingPrediction: if the inner rule needs a prediction that the step does not have.
            ValueError: at the first step, if no step of the run lies in the interval.
        """
        check_reached(step.ratios, self.low, self.high)
        sigma = step.level.ratio
        memory = step.memory.setdefault(("interval", id(self)), {})
        inside = (sigma > self.low) & (sigma <= self.high)
        if inside.device.type == "cpu":  # reading it costs nothing
            if bool(inside.all()):
                return self._inside(step, memory)
            if not bool(inside.any()):
                memory.clear()
                return step.cond
        where = per_sample(inside.to(step.cond.device), step.cond)
        guided = torch.where(where, self._inside(step, memory), step.cond)
        if step.moved is not None:
            step.moved = torch.where(where, step.moved, step.x)
        return guided

    def _inside(self, step: Step, memory: dict[object, object]) -> Tensor:
        own = replace(step, memory=memory)
        guided = self.rule(own)
        step.moved = own.moved
        return guided
