"""Give a rule its step, and turn what it returns into what the scheduler takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.step import Guidance, MissingPrediction, Step, needs_uncond
from ..core.tensors import widen
from .labels import known_classes
from .observe import normal, plain
from .predictions import Predictions
from .spaces import Space
from .trajectory import Trajectory


@dataclass(frozen=True)
class Applied:
    """What a rule made of a step.

    Attributes:
        output: for ``scheduler.step``, in the layout and dtype that the pipeline uses.
        sample: the moved sample, or None.
        guided: False if the rule was passed over.
        step: the step with denoised predictions, if it is to be kept.
        denoised: the guided denoised sample, if it is to be kept.
    """

    output: Tensor
    sample: Tensor | None = None
    guided: bool = True
    step: Step | None = None
    denoised: Tensor | None = None


@contextmanager
def autograd_allowed() -> Iterator[Callable[[Tensor], Tensor]]:
    """Leave inference mode, so that a rule may ask for gradients; yields what admits a tensor."""
    if not torch.is_inference_mode_enabled():
        yield lambda tensor: tensor
        return
    with torch.inference_mode(False), torch.no_grad():
        yield normal


def apply_rule(
    rule: Guidance,
    seen: Predictions,
    now: Trajectory,
    output: Tensor,
    timestep: Any,
    keep: bool = False,
) -> Applied:
    """Guide one step.

    A rule that commutes with changes of parameterization is given raw predictions, in the dtype in
    which the pipeline would have mixed them; any other is given denoised ones in float32.

    Raises:
        MissingPrediction: if the rule needs what the pipeline does not compute.
        TypeError: if the rule returns no tensor.
        ValueError: if it returns another shape, or the denoised sample is undefined at this level.
    """
    commutes = bool(getattr(rule, "commutes", False))
    space = None if commutes and not keep else Space(seen.reading, seen.x)
    if space is not None and not commutes:
        space.check()
    step = _make_step(seen, None if commutes else space, now, timestep)
    try:
        guided = _checked(rule, rule(step), step)
    except MissingPrediction as error:
        if seen.uncond is not None or not needs_uncond(rule):
            raise
        if now.had_uncond:  # guidance was turned off in mid-run: the pipeline's own output stands
            return Applied(output, guided=False)
        raise MissingPrediction(f"{error}. {_NEGATIVE}") from error
    if space is not None and not commutes:
        guided = space.output(guided, seen.cond, step.cond, step.moved)
    guided = guided.to(output.dtype)
    moved = None if step.moved is None else step.moved.to(seen.x.dtype)
    kept, denoised = _keep(step, space, guided, commutes) if keep and space else (None, None)
    return Applied(seen.whole(guided, output), seen.both(moved), step=kept, denoised=denoised)


_NEGATIVE = (
    "Where a pipeline has no such switch, give steer the arguments of the denoiser that make it "
    "unconditional: steer(pipe, rule, negative={...})"
)


def _checked(rule: Guidance, guided: Any, step: Step) -> Tensor:
    name = type(rule).__name__
    if not isinstance(guided, Tensor):
        raise TypeError(
            f"{name} returned {type(guided).__name__}; a rule returns the guided prediction, a "
            "Tensor"
        )
    if guided.shape != step.x.shape:
        raise ValueError(
            f"{name} returned shape {tuple(guided.shape)}, expected {tuple(step.x.shape)}"
        )
    return guided


def _make_step(seen: Predictions, space: Space | None, now: Trajectory, timestep: Any) -> Step:
    """The step in the rule's space: raw predictions if ``space`` is None, else denoised ones."""

    def evaluate(x: Tensor | None, branch: str = "cond", **overrides: Any) -> Tensor:
        raw = seen.evaluate(x, branch, **overrides)
        return raw if space is None else space.denoised(raw, x)

    def evaluate_weak(
        model: Any, branch: str = "cond", x: Tensor | None = None, **overrides: Any
    ) -> Tensor:
        raw = seen.evaluate_weak(model, branch, x, **overrides)
        return raw if space is None else space.denoised(raw, x)

    cond, uncond = seen.cond, seen.uncond
    return Step(
        x=seen.x if space is None else widen(seen.x),
        level=seen.reading.level,
        index=now.index,
        count=now.count,
        timestep=timestep,
        cond=cond if space is None else space.denoised(cond),
        uncond=uncond if space is None or uncond is None else space.denoised(uncond),
        stage=now.stage,
        memory=now.memory,
        evaluate=evaluate,
        evaluate_weak=evaluate_weak,
        next_level=now.following,
        recorded=seen.argument,
        ratios=now.ratios,
        stochastic=now.stochastic,
        classes=known_classes(plain(seen.calls[0].module)) if seen.calls else None,
        output_kind=None if space is None else seen.reading.kind,
    )


def _keep(step: Step, space: Space, guided: Tensor, commutes: bool) -> tuple[Step, Tensor]:
    """The step without its ways back into the pipeline, and the guided denoised sample."""
    cond, uncond = step.cond, step.uncond
    if commutes:
        cond = space.denoised(cond)
        uncond = None if uncond is None else space.denoised(uncond)
    kept = replace(
        step, cond=cond, uncond=uncond, memory={}, evaluate=None, evaluate_weak=None, recorded=None
    )
    return kept, space.denoised(guided, step.moved)
