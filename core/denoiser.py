"""Join models and a guidance rule into the ``denoise(x, sigma)`` that samplers take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .prediction import Level
from .step import Branch, Guidance, MissingPrediction, Step

Denoise = Callable[..., Tensor]  # (x, sigma) -> denoised; keywords are overrides of `Step.predict`


class GuidedDenoiser:
    """A denoiser under guidance, for samplers, tests and any model that is not a pipeline.

    It is itself a ``denoise(x, sigma)``.

    Args:
        rule: a guidance method; None gives the conditional model.
        cond: conditional denoiser, ``cond(x, sigma) -> denoised``.
        uncond: unconditional denoiser, or None.
        weak: a weak conditional denoiser (autoguidance), or None.
        level: what a sampler's sigma means; ``Level.ve`` (default) or ``Level.flow``.
        count: number of steps of a trajectory, for rules with schedules.
        arguments: keywords that the conditional models are called with (class labels, say). Rules
            read them through ``Step.argument`` and override them through ``Step.predict``.

    ``samplers.integrate`` says where trajectories and steps begin. In a loop of your own call
    ``begin()`` before each trajectory, which gives the rule a fresh memory, and ``begin_step()``
    before the first evaluation of each step; further evaluations until the next ``begin_step`` are
    the later stages of a multi-stage solver.
    """

    def __init__(
        self,
        rule: Guidance | None,
        cond: Denoise,
        uncond: Denoise | None = None,
        *,
        weak: Denoise | None = None,
        level: Callable[[Tensor], Level] = Level.ve,
        count: int = 1,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.rule, self.cond, self.uncond, self._weak = rule, cond, uncond, weak
        self.level, self.count = level, count
        self.arguments = dict(arguments or {})
        self.begin()

    def begin(self, count: int | None = None) -> None:
        """Start a new trajectory, of ``count`` steps if given."""
        self.count = self.count if count is None else count
        self.memory: dict[Any, Any] = {}
        self.index, self.stage, self.evaluations = -1, 0, 0
        self.next_sigma: Tensor | None = None
        self.last: Step | None = None

    def begin_step(self, index: int | None = None, next_sigma: Tensor | None = None) -> None:
        """Say that the next call is the first evaluation of a new solver step.

        Args:
            index: the number of the step; the last one plus 1 if not given.
            next_sigma: where the step will lead, for rules that ask (``Step.next_level``).
        """
        self.index = self.index + 1 if index is None else index
        self.next_sigma = next_sigma
        self.stage = -1

    @property
    def moved(self) -> Tensor | None:
        """The sample that the rule put in the place of the solver's at the last call, or None."""
        return None if self.last is None else self.last.moved

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The guided denoised sample, shape of ``x``; ``sigma`` has shape () or (B,)."""
        if self.index < 0:
            self.begin_step()
        self.stage += 1
        self.last = None
        cond = self._evaluate(x, sigma, "cond")
        if self.rule is None:
            return cond

        def evaluate(at: Tensor | None, branch: Branch = "cond", **overrides: Any) -> Tensor:
            return self._evaluate(x if at is None else at, sigma, branch, **overrides)

        def evaluate_weak(
            model: Any, branch: Branch = "cond", x: Tensor = x, **overrides: Any
        ) -> Tensor:
            return self._evaluate_weak(model, x, sigma, branch, **overrides)

        following = self.next_sigma
        step = Step(
            x=x,
            level=self.level(torch.as_tensor(sigma)),
            index=self.index,
            count=self.count,
            timestep=sigma,
            cond=cond,
            uncond=None if self.uncond is None else evaluate(None, "uncond"),
            stage=self.stage,
            memory=self.memory,
            evaluate=evaluate,
            evaluate_weak=evaluate_weak,
            next_level=None if following is None else self.level(torch.as_tensor(following)),
            recorded=self._recorded,
        )
        self.last = step
        return self.rule(step)

    def _recorded(self, name: str, branch: Branch = "cond") -> Any:
        if branch != "cond" or name not in self.arguments:
            raise MissingPrediction(
                f"this GuidedDenoiser was not given the {branch} argument {name!r}; "
                f"it has {sorted(self.arguments)}; pass arguments={{{name!r}: ...}}"
            )
        return self.arguments[name]

    def _evaluate(self, x: Tensor, sigma: Tensor, branch: Branch, **overrides: Any) -> Tensor:
        model = self.cond if branch == "cond" else self.uncond
        if model is None:
            raise MissingPrediction(
                "this GuidedDenoiser has no unconditional model; pass uncond=..."
            )
        self.evaluations += 1
        return model(x, sigma, **(self.arguments | overrides if branch == "cond" else overrides))

    def _evaluate_weak(
        self, model: Any, x: Tensor, sigma: Tensor, branch: Branch, **overrides: Any
    ) -> Tensor:
        if branch != "cond":
            raise MissingPrediction("the weak model of a GuidedDenoiser is conditional only")
        denoise: Denoise | None = self._weak if model is None else model
        if denoise is None:
            raise MissingPrediction("this GuidedDenoiser has no weak model; pass weak=")
        self.evaluations += 1
        return denoise(x, sigma, **(self.arguments | overrides))
