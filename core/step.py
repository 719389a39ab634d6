"""What a guidance method sees at one denoising step, and may ask of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from .prediction import Kind, Level

Branch = Literal["cond", "uncond"]


class MissingPrediction(ValueError):
    """A rule asked for what this pipeline or step cannot give; the text says what to change."""


@runtime_checkable
class Guidance(Protocol):
    """A guidance method: a callable from one ``Step`` to the guided denoised sample.

    Optional attributes, read with these defaults:
        ``commutes`` (False): the rule is an affine mix of the predictions whose weights sum to one,
            so it gives the same result in every parameterization; adapters then hand it raw network
            outputs and spare both conversions (plain guidance stays bit-exact). A rule that repeats
            what another program does to raw outputs says True as well.
        ``moves`` (False): the rule calls ``Step.move``.
        ``needs_uncond`` (True): the rule reads the unconditional prediction; where it is False,
            guiders and scripts spare the pipeline that evaluation.
    """

    def __call__(self, step: Step) -> Tensor:
        """The guided denoised sample, same shape as ``step.x``."""
        ...


def needs_uncond(rule: Any) -> bool:
    """Whether a guidance method reads the unconditional prediction; True unless it says not."""
    return bool(getattr(rule, "needs_uncond", True))


@dataclass
class Step:
    """One denoising step, as a guidance method sees it.

    Attributes:
        x: the noisy sample the predictions were made at, (B, ...).
        level: its noise level; ``level.ratio`` is the sigma that intervals are given in.
        index: number of the step, from 0; ``count`` is how many there will be.
        count: the number of steps of this trajectory.
        timestep: the number the network was given (only for display and for re-evaluation).
        cond: denoised prediction under the condition, (B, ...).
        uncond: denoised prediction without it, or None where the pipeline ran without.
        stage: 0 for the first evaluation of a step, 1, 2, ... for the later ones of Heun and other
            multi-stage solvers.
        memory: a dictionary that lives as long as the trajectory. The adapter makes a new one at
            the start of every trajectory, so a rule never has to be reset by the user.
        evaluate: how to evaluate the model again; set by the adapter, used through ``predict``.
        evaluate_weak: how to evaluate another model on the same inputs; used through ``weak``.
        moved: the sample that ``move`` put in the place of ``x``, or None.
        next_level: the level the solver is about to step to, or None where the adapter cannot tell.
        recorded: how to read an argument of the pipeline's own denoiser call; set by the adapter,
            used through ``argument``.
        ratios: the noise-to-signal ratios of this step and all that follow, (n,) on the CPU, at the
            first step of a trajectory; None at the others and where the adapter cannot tell.
        stochastic: whether the solver adds noise, where the adapter can tell.
        classes: how many class labels the model knows, where the adapter can tell.
        output_kind: what the raw outputs mean that these denoised predictions were made of; None
            where they were made of none: the rule is handed the outputs, or the model denoises.
    """

    x: Tensor
    level: Level
    index: int
    count: int
    timestep: Tensor | float
    cond: Tensor
    uncond: Tensor | None = None
    stage: int = 0
    memory: dict[Any, Any] = field(default_factory=dict)
    evaluate: Callable[..., Tensor] | None = None
    evaluate_weak: Callable[..., Tensor] | None = None
    moved: Tensor | None = None
    next_level: Level | None = None
    recorded: Callable[[str, Branch], Any] | None = None
    ratios: Tensor | None = None
    stochastic: bool = False
    classes: int | None = None
    output_kind: Kind | None = None

    def need_uncond(self, who: str) -> Tensor:
        """The unconditional prediction, or an error that says how to get one.

        Raises:
            MissingPrediction: if the pipeline ran without classifier-free guidance at this step.
        """
        if self.uncond is None:
            raise MissingPrediction(
                f"{who} needs the unconditional prediction, but the pipeline ran only the "
                f"conditional one at step {self.index}. Turn classifier-free guidance on in the "
                "call: guidance_scale above 1 (true_cfg_scale above 1 with a negative prompt for "
                "Flux and Qwen); its value does not matter, the rule replaces it. A distilled "
                "model (Turbo, Lightning, LCM, schnell) has no such branch to turn on"
            )
        return self.uncond

    def predict(self, x: Tensor | None = None, branch: Branch = "cond", **overrides: Any) -> Tensor:
        """Evaluate the same model again on the recorded inputs: one more network evaluation.

        Args:
            x: another noisy sample of the same shape at the same level; None is the sample itself.
            branch: which conditioning to use.
            **overrides: inputs of the denoiser to replace, by its own argument names.

        Returns:
            The denoised prediction, shape of ``x``.

        Raises:
            MissingPrediction: if the adapter cannot evaluate the model again.
        """
        if self.evaluate is None:
            raise MissingPrediction(
                "this step cannot evaluate the model again; use steer() on a pipeline, or a "
                "GuidedDenoiser"
            )
        return self.evaluate(x, branch=branch, **overrides)

    def weak(
        self, model: Any = None, branch: Branch = "cond", x: Tensor | None = None, **overrides: Any
    ) -> Tensor:
        """Evaluate another model on the recorded inputs (autoguidance); denoised, shape of ``x``.

        Args:
            model: called as the denoiser is called; None is the weak model of the adapter.
            branch: which conditioning to use.
            x: another noisy sample at the same level; None is the sample itself.
            **overrides: inputs of the denoiser to replace, by its own argument names.

        Raises:
            MissingPrediction: if the adapter has no second model.
        """
        if self.evaluate_weak is None:
            raise MissingPrediction(
                "this step has no weak model; pass one, e.g. "
                "steer(pipe, rule, weak=weak_transformer)"
            )
        at = {} if x is None else {"x": x}
        return self.evaluate_weak(model, branch=branch, **at, **overrides)

    def at(self, x: Tensor) -> Step:
        """The same step at another sample: predictions made anew, and whatever is asked for later.

        Costs an evaluation for each prediction that this step has. The sample of the solver stays
        where it is; see ``move``.

        Raises:
            MissingPrediction: if the adapter cannot evaluate the model again.
        """

        def evaluate(other: Tensor | None, branch: Branch = "cond", **overrides: Any) -> Tensor:
            return self.predict(x if other is None else other, branch, **overrides)

        def evaluate_weak(
            model: Any, branch: Branch = "cond", x: Tensor | None = x, **overrides: Any
        ) -> Tensor:
            return self.weak(model, branch, x=x, **overrides)

        return replace(
            self,
            x=x,
            cond=evaluate(None, "cond"),
            uncond=None if self.uncond is None else evaluate(None, "uncond"),
            evaluate=evaluate,
            evaluate_weak=None if self.evaluate_weak is None else evaluate_weak,
        )

    def argument(self, name: str, branch: Branch = "cond") -> Any:
        """An argument of the pipeline's own denoiser call, e.g. ``class_labels``, shape (B, ...).

        Args:
            name: as the denoiser's ``forward`` calls it.
            branch: whose rows.

        Raises:
            MissingPrediction: if the adapter has no such record, or the call no such argument.
        """
        if self.recorded is None:
            raise MissingPrediction(
                f"this step does not know the model's argument {name!r}; give it to the rule itself"
            )
        return self.recorded(name, branch)

    def move(self, x: Tensor) -> None:
        """Replace the noisy sample before the solver takes its step (manifold projection).

        Raises:
            ValueError: if the shape differs from the sample's.
        """
        if x.shape != self.x.shape:
            raise ValueError(f"move: expected shape {tuple(self.x.shape)}, got {tuple(x.shape)}")
        self.moved = x
