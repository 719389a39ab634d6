"""What ``steer`` remembers of a run, and what it tells of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..core.prediction import Level
from ..core.step import Step


@dataclass(frozen=True)
class StepRecord:
    """What happened at one call of ``scheduler.step``.

    Attributes:
        index: number of the solver step, from 0.
        stage: 0, or more at the later evaluations of a multi-stage solver.
        sigma: of ``x = alpha * clean + sigma * noise``; None if it differs within the batch.
        ratio: sigma / alpha, the sigma of EDM and k-diffusion; None likewise.
        evaluations: network calls, those of the pipeline and those of the rule.
        guided: False where the pipeline had turned guidance off and the rule was passed over.
        step: with ``keep=True``, the step with its predictions denoised; else None.
        denoised: with ``keep=True``, the guided denoised sample, float32; else None.
    """

    index: int
    stage: int
    sigma: float | None
    ratio: float | None
    evaluations: int
    guided: bool = True
    step: Step | None = None
    denoised: Tensor | None = None


@dataclass
class Trajectory:
    """What is known of the run in progress; made anew by every ``set_timesteps``.

    Attributes:
        memory: the rule's, see ``Step.memory``.
        index: number of the current solver step; -1 before the first.
        stage: which evaluation of that step.
        count: solver steps of this run.
        following: the level the step leads to, or None where that is not known.
        ratios: those of all steps of the run, at its first step, see ``Step.ratios``; else None.
        stochastic: whether the solver adds noise.
        verdicts: order and sign, by layout, once verified.
        attempts: how often verification was tried.
        doubled: whether the scheduler is given every sample twice; None before the first step.
        had_uncond: whether any step had an unconditional prediction.
        rebuilds: whether rebuilding the network's input was checked.
    """

    memory: dict[Any, Any] = field(default_factory=dict)
    index: int = -1
    stage: int = 0
    count: int = 1
    following: Level | None = None
    ratios: Tensor | None = None
    stochastic: bool = False
    verdicts: dict[str, tuple[str, int]] = field(default_factory=dict)
    attempts: int = 0
    doubled: bool | None = None
    had_uncond: bool = False
    rebuilds: bool = False
