"""What a rule does along the trajectory: how far it pushes, and how far the branches are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.step import Guidance, Step
from ..core.tensors import sample_norm
from .generation import batch_inputs, check_call
from .image_folder import ImageRequest
from .steer import steer


@dataclass(frozen=True)
class TraceStep:
    """One step of a trajectory, seen by the innermost rule; root mean squares over a sample.

    Attributes:
        index: number of the step.
        sigma: of ``x = alpha * clean + sigma * noise``.
        push: of ``guided - cond``, denoised units, (B,).
        gap: of ``cond - uncond`` divided by sigma, (B,): the gap of velocities in a flow model;
            None without an unconditional prediction.
    """

    index: int
    sigma: float
    push: Tensor
    gap: Tensor | None


def trace_rule(
    pipe: Any,
    requests: Sequence[ImageRequest],
    rule: Guidance,
    *,
    steps: int,
    weak: Any = None,
    call: dict[str, Any] | None = None,
) -> list[TraceStep]:
    """Run one batch under ``rule`` and watch its innermost rule.

    Where rules are nested, the innermost one is given the moved sample, or the weak model's
    prediction, so its push and gap are those that act.

    Args:
        pipe: see ``generate_images``.
        requests: the images of the batch.
        rule: the guidance method.
        steps: solver steps.
        weak: a second model, see ``steer``.
        call: further arguments of the pipeline's call.

    Returns:
        A record for each step at which the innermost rule was asked.

    Raises:
        ValueError: if the pipeline does not take the arguments.
    """
    seen: list[TraceStep] = []
    extra = check_call(pipe, requests, guided=True, call=call or {})
    arguments = {**extra, **batch_inputs(requests, extra)}
    with steer(pipe, _watched(rule, seen), weak=weak):
        pipe(**arguments, num_inference_steps=steps)
    return seen


def mean_push(trace: Sequence[TraceStep]) -> float:
    """The push averaged over steps and samples.

    Raises:
        ValueError: if nothing was recorded.
    """
    if not trace:
        raise ValueError("the rule was never asked, so it has pushed nothing")
    return float(torch.stack([step.push for step in trace]).double().mean())


def _watched(rule: Any, seen: list[TraceStep]) -> Any:
    inner = getattr(rule, "rule", None) if is_dataclass(rule) else None
    if inner is None or "rule" not in {item.name for item in fields(rule)}:
        return _Watch(rule, seen)
    return replace(rule, rule=_watched(inner, seen))


class _Watch:
    """The rule itself, whose predictions are always denoised so that they can be compared."""

    commutes = False

    def __init__(self, rule: Guidance, seen: list[TraceStep]) -> None:
        self.rule, self.seen = rule, seen
        self.moves = bool(getattr(rule, "moves", False))

    def __call__(self, step: Step) -> Tensor:
        own = replace(step)
        guided = self.rule(own)
        step.moved = own.moved
        sigma = float(step.level.sigma)
        gap = None if step.uncond is None else _rms(step.cond - step.uncond) / sigma
        self.seen.append(TraceStep(step.index, sigma, _rms(guided - step.cond), gap))
        return guided


def _rms(value: Tensor) -> Tensor:
    size: int = value[0].numel()
    return (sample_norm(value) / size**0.5).cpu()
