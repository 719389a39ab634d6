"""Guidance in an interval of noise levels (Kynkäänniemi et al. 2024, arXiv 2404.07724)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.step import Guidance, Step, needs_uncond
from ..core.tensors import per_sample
from .checks import check_interval, check_number, check_reached, check_rule


@dataclass(frozen=True)
class GuidanceInterval:
    """Apply ``rule`` where ``low < sigma <= high``; elsewhere another one, or none.

    Sigma is always the noise-to-signal ratio ``step.level.ratio``: the sigma of EDM and
    k-diffusion, about 0.002 to 80, infinity for pure noise of a flow model. For the sigma in [0, 1]
    of flow models (SD3, Flux, ...) use ``GuidanceInterval.flow``.

    Args:
        rule: any guidance method.
        low: guidance is off at this sigma and below.
        high: guidance is off above this sigma; infinity (default) for no upper end.
        outside: the rule to apply elsewhere; None is the conditional prediction, no guidance.

    Raises:
        TypeError: if a rule is not a guidance method, or an end is not a number.
        ValueError: if ``low`` is negative, an end is NaN, or ``low >= high``.

    Each rule's memory (momentum) is kept apart and emptied where the other one rules: what it held
    belonged to other noise levels. Where levels differ within a batch, or live on an accelerator
    (reading them would stop the device), the rules run on every sample, the result is chosen by
    ``torch.where``, and the memory is not emptied.

    Source: Kynkäänniemi et al. 2024; ``outside`` is ours. Good ends belong to a model; (0.28, 3] is
    a place to start for EDM2 at 512 pixels.
    """

    rule: Guidance
    low: float = 0.0
    high: float = math.inf
    outside: Guidance | None = None

    def __post_init__(self) -> None:
        """Refuse empty intervals and rules that are none."""
        check_rule("rule", self.rule)
        if self.outside is not None:
            check_rule("outside", self.outside)
        check_interval(self.low, self.high)

    @classmethod
    def flow(
        cls,
        rule: Guidance,
        low: float = 0.0,
        high: float = 1.0,
        outside: Guidance | None = None,
    ) -> GuidanceInterval:
        """The same with flow sigmas: ``x = (1 - sigma) * clean + sigma * noise``, sigma in [0, 1].

        Raises:
            ValueError: if an end is not in [0, 1], or ``low >= high``.
        """
        remedy = "a flow sigma is 0 for clean samples and 1 for noise"
        check_number("low", low, low=0.0, high=1.0, remedy=remedy)
        check_number("high", high, low=0.0, high=1.0, remedy=remedy)
        if low >= high:
            raise ValueError(f"low must be less than high, got low={low} and high={high}")
        return cls(rule, low / (1 - low), high / (1 - high) if high < 1 else math.inf, outside)

    @classmethod
    def two_experts(
        cls, high_noise: Guidance, low_noise: Guidance, boundary: float
    ) -> GuidanceInterval:
        """A rule for each expert of Wan 2.2 and its like.

        Args:
            high_noise: the rule where the flow sigma is at least ``boundary``, where the pipeline
                runs ``transformer`` (to rounding: sigmas within 1e-6 of it count as reaching it).
            low_noise: the rule below, where it runs ``transformer_2``.
            boundary: ``pipe.config.boundary_ratio``, in (0, 1).

        Raises:
            TypeError: if a rule is not a guidance method, or ``boundary`` is not a number.
            ValueError: if ``boundary`` is not in (0, 1).
        """
        remedy = "it is pipe.config.boundary_ratio; a pipeline without one has a single expert"
        check_number(
            "boundary", boundary, low=0.0, high=1.0, open_low=True, open_high=True, remedy=remedy
        )
        check_rule("low_noise", low_noise)
        return cls(high_noise, (1 - 1e-6) * boundary / (1 - boundary), outside=low_noise)

    @property
    def _rules(self) -> list[Guidance]:
        return [self.rule] if self.outside is None else [self.rule, self.outside]

    @property
    def commutes(self) -> bool:
        """Whether the inner rules give the same result in every parameterization."""
        return all(getattr(rule, "commutes", False) for rule in self._rules)

    @property
    def moves(self) -> bool:
        """Whether an inner rule replaces the noisy sample."""
        return any(getattr(rule, "moves", False) for rule in self._rules)

    @property
    def needs_uncond(self) -> bool:
        """Whether an inner rule reads the unconditional prediction."""
        return any(map(needs_uncond, self._rules))

    def __call__(self, step: Step) -> Tensor:
        """The prediction of the rule in force; without ``outside`` exactly ``step.cond`` there.

        Raises:
            MissingPrediction: if the rule needs a prediction that the step does not have.
            ValueError: at the first step, if no step of the run lies in the interval.
        """
        check_reached(step.ratios, self.low, self.high)
        sigma = step.level.ratio
        memory = step.memory.setdefault(("interval", id(self)), ({}, {}))
        inside = (sigma > self.low) & (sigma <= self.high)
        if inside.device.type == "cpu" and bool(inside.all() | ~inside.any()):  # costs nothing
            here = bool(inside.all())
            memory[not here].clear()
            guided, step.moved = self._apply(here, step, memory[here])
            return guided
        where = per_sample(inside.to(step.cond.device), step.cond)
        (guided, moved), (other, moved_too) = (
            self._apply(here, step, memory[here]) for here in (True, False)
        )
        if moved is not None or moved_too is not None:
            own, beyond = (step.x if at is None else at for at in (moved, moved_too))
            step.moved = torch.where(where, own, beyond)
        return torch.where(where, guided, other)

    def _apply(
        self, inside: bool, step: Step, memory: dict[Any, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """What the rule there makes of the step, and where it moves the sample."""
        rule = self.rule if inside else self.outside
        if rule is None:
            return step.cond, None
        own = replace(step, memory=memory)
        return rule(own), own.moved
