"""Guide any diffusers pipeline by any rule: observe the denoiser, substitute at ``scheduler.step``.

    with steer(pipe, AdaptiveProjectedGuidance(scale=8.0)) as run:
        image = pipe("a red fox in snow").images[0]

The denoiser's own outputs are recorded by a forward hook; at ``scheduler.step``, where the noisy
sample, its level and the layout are exact, the rule's guided prediction takes the place of the
pipeline's. See ``docs/steer.md`` for what is supported and what every error means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ..core.step import Guidance
from .apply import Applied, apply_rule, autograd_allowed
from .families import check_supported
from .intercept import Arguments, Interception
from .levels import LevelReader, LevelReading, adds_noise
from .loading import load_weak
from .observe import Recorder
from .predictions import DOUBLED, SINGLE, Predictions, is_doubled, layout_of
from .trajectory import StepRecord, Trajectory
from .validate import check_arguments, check_negative, find_denoisers
from .verify import resolve


def steer(
    pipe: Any,
    rule: Guidance,
    *,
    weak: Callable[..., Any] | str | Path | None = None,
    negative: Mapping[str, Any] | None = None,
    order: str | None = None,
    sign: int | None = None,
    denoiser: nn.Module | Sequence[nn.Module] | None = None,
    keep: bool = False,
) -> Steering:
    """Guide every run of ``pipe`` inside the ``with`` block by ``rule``.

    Args:
        pipe: a diffusers pipeline, classic or Modular: anything with a ``scheduler`` and a
            ``transformer`` or ``unet``. It runs as always; its guidance scale must be above 1 (its
            value does not matter) if the rule needs an unconditional prediction.
        rule: a guidance method, e.g. ``ClassifierFreeGuidance(scale=5.0)``.
        weak: a second model for ``Step.weak``: a module, any function that is called like the
            denoiser and returns like it (a ``degraded`` pass, say), the folder of one, or
            "skip:7,8,9" or "perturb:3", see ``load_weak``.
        negative: arguments of the denoiser that make it unconditional, e.g.
            ``{"encoder_hidden_states": ..., "pooled_projections": ...}``: adds true guidance to
            pipelines that make one prediction a step (Flux), by one more evaluation a step. A
            single row is repeated over the batch.
        order: ``"uc"`` or ``"cu"``: whether the unconditional or the conditional prediction comes
            first. Measured at the first step if not given.
        sign: 1, or -1 if the pipeline negates its network's output. Measured if not given. With
            ``order`` *and* ``sign`` nothing is measured, and the rule replaces whatever the
            pipeline does.
        denoiser: the module or modules that predict, if they have unusual names.
        keep: keep each step's predictions in ``run.steps``.

    Returns:
        A context manager; see ``Steering`` for what ``as run`` gives.

    Raises:
        TypeError: if an argument is of the wrong type; the text says what to pass.
        ValueError: if ``order`` or ``sign`` is none of the possible values.
        NotImplementedError: if the pipeline is known not to work.
        FileNotFoundError: if ``weak`` names no folder.
    """
    check_arguments(pipe, rule, weak, order, sign)
    check_supported(pipe)
    model = load_weak(weak, pipe) if isinstance(weak, (str, Path)) else weak
    modules = find_denoisers(pipe, denoiser)
    check_negative(negative, modules)
    return Steering(pipe, rule, modules, model, negative, order, sign, keep)


class Steering(AbstractContextManager["Steering"]):
    """The ``run`` of ``with steer(pipe, rule) as run``.

    Attributes:
        steps: one ``StepRecord`` for each ``scheduler.step`` of the latest run of the pipeline.
        evaluations: network calls since the block was entered, the pipeline's and the rule's.
        trajectories: how many runs of the pipeline the block has seen begin.
    """

    def __init__(
        self,
        pipe: Any,
        rule: Guidance,
        modules: list[nn.Module],
        weak: Callable[..., Any] | None = None,
        negative: Mapping[str, Any] | None = None,
        order: str | None = None,
        sign: int | None = None,
        keep: bool = False,
    ) -> None:
        self.pipe, self.rule, self.weak, self.negative = pipe, rule, weak, negative
        self.order, self.sign, self.keep = order, sign, keep
        self.steps: list[StepRecord] = []
        self.evaluations = self.trajectories = 0
        self._scheduler = pipe.scheduler
        self._recorder = Recorder(modules)
        self._reader = LevelReader(pipe.scheduler)
        self._interception = Interception(pipe.scheduler, self._on_step, self._begin)
        self._now = Trajectory()

    def __enter__(self) -> Steering:
        self._interception.attach()
        try:
            self._recorder.attach()
        except BaseException:
            self._interception.detach()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._interception.detach()
        self._recorder.detach()
        self._now = Trajectory()
        if error is None and self._recorder.seen and not self.evaluations:
            raise RuntimeError(
                f"the denoiser of {type(self.pipe).__name__} ran {self._recorder.seen} times, "
                "but pipe.scheduler.step was never called, so nothing was guided: the "
                "pipeline steps a copy of its scheduler or another scheduler, and cannot be "
                "steered"
            )

    def _begin(self) -> None:
        self._now = Trajectory()
        self._reader = LevelReader(self._scheduler)
        self._recorder.take()
        self.steps = []
        self.trajectories += 1

    def _on_step(self, real: Callable[..., Any], arguments: Arguments) -> Any:
        """Guide one step, then let the scheduler take it."""
        if arguments["per_token_timesteps"] is not None:
            raise NotImplementedError(
                "the pipeline gives every token its own noise level (per_token_timesteps), "
                "which steer cannot express"
            )
        timestep = arguments["timestep"]
        reading = self._advance(timestep, arguments.kwargs)
        with autograd_allowed() as normal:
            output, sample = normal(arguments["model_output"]), normal(arguments["sample"])
            seen = self._predictions(output, sample, reading, timestep)
            applied = apply_rule(self.rule, seen, self._now, output, timestep, self.keep)
        self._record(seen, applied)
        arguments["model_output"] = applied.output
        if applied.sample is not None:
            arguments["sample"] = applied.sample
        return real(*arguments.args, **arguments.kwargs)

    def _advance(self, timestep: Any, options: Mapping[str, Any]) -> LevelReading:
        """Read the noise level and count the solver's steps, before the scheduler moves on."""
        reading, now = self._reader.read(timestep), self._now
        now.stage = self._reader.stage()
        now.ratios = self._reader.remaining(timestep) if now.index < 0 else None
        if now.index < 0:
            now.count = self._reader.steps(timestep)
            now.stochastic = adds_noise(self._scheduler, **options)
        if now.index < 0 or now.stage == 0:
            now.index += 1
        if not getattr(self.rule, "commutes", False):
            now.following = self._reader.following(timestep)
        return reading

    def _predictions(
        self, output: Tensor, sample: Tensor, reading: LevelReading, timestep: Any
    ) -> Predictions:
        """Read the recorded calls; verify what the pipeline did with them where that is new."""
        now, calls = self._now, self._recorder.take()
        if now.doubled is None:
            now.doubled = is_doubled(calls, output, sample, self.pipe)
        layout = layout_of(calls, sample, now.doubled)
        if self.negative is not None and layout != SINGLE:
            raise ValueError(
                "negative= adds an unconditional prediction, but the pipeline makes one "
                "already: leave negative= out, or turn the pipeline's own guidance off in the "
                "call (guidance_scale or true_cfg_scale of 1)"
            )
        scale = getattr(self._scheduler, "scale_model_input", None)
        seen = Predictions(
            calls=calls,
            layout=layout,
            x=sample.chunk(2)[0] if layout == DOUBLED else sample,
            dtype=output.dtype,
            reading=reading,
            recorder=self._recorder,
            scale=(lambda x: x) if scale is None else (lambda x: scale(x, timestep)),
            network=getattr(self.pipe, "prediction_kind", None),
            negative=self.negative,
            weak=self.weak,
            rebuilds=now.rebuilds,
        )
        if now.index == now.stage == 0 and not getattr(self.rule, "commutes", False):
            seen.check_sample(self.pipe)
        seen.settle(*self._verdict(seen, output))
        now.had_uncond |= seen.uncond is not None
        return seen

    def _verdict(self, seen: Predictions, output: Tensor) -> tuple[str, int]:
        now = self._now
        if seen.layout in now.verdicts:
            return now.verdicts[seen.layout]
        target = seen.part(output)
        dtype = seen.calls[0].output.dtype
        verdict = resolve(
            self.pipe, target, seen.pair, len(seen.calls), self.order, self.sign, dtype
        )
        now.attempts += 1
        if verdict.settled or now.attempts >= _ATTEMPTS:
            now.verdicts[seen.layout] = verdict.order, verdict.sign
        return verdict.order, verdict.sign

    def _record(self, seen: Predictions, applied: Applied) -> None:
        now, level = self._now, seen.reading.level
        one = level.sigma.numel() == 1 and level.sigma.device.type == "cpu"
        now.rebuilds = seen.rebuilds
        self.evaluations += seen.evaluations
        self.steps.append(
            StepRecord(
                index=now.index,
                stage=now.stage,
                sigma=float(level.sigma) if one else None,
                ratio=float(level.ratio) if one else None,
                evaluations=seen.evaluations,
                guided=applied.guided,
                step=applied.step,
                denoised=applied.denoised,
            )
        )


_ATTEMPTS = 3  # steps at which an undecided verification is tried again
