"""Watch a pipeline sample: its samples, and what its denoiser was conditioned on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...core.prediction import Kind
from ...pipelines.families import check_supported
from ...pipelines.intercept import Arguments, Interception
from ...pipelines.levels import LevelReader, LevelReading
from ...pipelines.observe import Recorder, network_input, same_input
from ...pipelines.predictions import BATCHED, SINGLE, Predictions, layout_of
from ...pipelines.validate import find_denoisers
from ...pipelines.verify import resolve
from .conditioning import Conditioning
from .flow_model import FlowModel, fit_timestep, timestep_name

__all__ = ["Observed", "Observer", "check_flow_pipeline", "find_denoiser"]

Replace = Callable[[Tensor, Tensor, float, float], Tensor]
"""``replace(sample, velocity, sigma, next_sigma)``: the sample to go on from."""


def find_denoiser(pipe: Any) -> nn.Module:
    """The one module of ``pipe`` that predicts.

    Raises:
        TypeError: there is none.
        NotImplementedError: there are several, or the pipeline is known not to work.
    """
    check_supported(pipe)
    modules = find_denoisers(pipe, None)
    if len(modules) > 1:
        raise NotImplementedError(
            f"{type(pipe).__name__} predicts with {len(modules)} networks by turns; only pipelines "
            "with one can be trained here"
        )
    return modules[0]


def check_flow_pipeline(pipe: Any) -> None:
    """Refuse pipelines that do not sample by flow matching.

    Raises:
        ValueError: with the scheduler that was found, and what is needed.
    """
    scheduler = getattr(pipe, "scheduler", None)
    config = getattr(scheduler, "config", {})
    name = type(scheduler).__name__
    own = callable(getattr(scheduler, "noise_level", None))
    if "FlowMatch" in name or config.get("use_flow_sigmas", False) or own:
        return
    raise ValueError(
        f"{type(pipe).__name__} samples with {name}, which is no flow-matching scheduler; "
        "fine-tuning by flow matching needs a flow model (Stable Diffusion 3, Flux, Sana, Qwen, "
        "Wan, the embedded one)"
    )


@dataclass
class Observed:
    """What one run of a pipeline showed.

    Attributes:
        clean: the last sample, (B, ...), in the scheduler's layout.
        cond: the condition of its samples.
        uncond: that of the unconditional prediction, or None without guidance.
        states: every state in the order of time, the last sample included, if they were kept.
        sigmas: the levels of the steps.
        times: what the denoiser was told at them.
        evaluations: network passes a sample.
    """

    clean: Tensor
    cond: Conditioning
    uncond: Conditioning | None = None
    states: list[Tensor] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    times: list[Any] = field(default_factory=list)
    evaluations: int = 0


class Observer(AbstractContextManager["Observer"]):
    """``with Observer(pipe) as seen: pipe(...)``, then ``seen.observed``.

    Args:
        pipe: a flow-matching diffusers pipeline.
        model: what an earlier run showed; None finds it out at the first step, which waits for the
            device.
        replace: gives the sample to go on from in the place of the solver's (stochastic sampling).
        keep_states: keep the states of the trajectory.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        model: FlowModel | None = None,
        replace: Replace | None = None,
        keep_states: bool = False,
    ) -> None:
        self.pipe, self.model, self.replace, self.keep_states = pipe, model, replace, keep_states
        self._reader = LevelReader(pipe.scheduler)
        self._recorder = Recorder([find_denoiser(pipe)])
        self._interception = Interception(pipe.scheduler, self._on_step, self._begin)
        self._found: Observed | None = None
        self._verdict = ("uc", 1)

    def __enter__(self) -> Observer:
        self._interception.attach()
        self._recorder.attach()
        return self

    def __exit__(self, *error: Any) -> None:
        self._interception.detach()
        self._recorder.detach()

    @property
    def observed(self) -> Observed:
        """What was seen.

        Raises:
            RuntimeError: ``scheduler.step`` was never called.
        """
        if self._found is None:
            raise RuntimeError(
                f"{type(self.pipe).__name__} never called pipe.scheduler.step: it steps a copy of "
                "its scheduler, and cannot be trained here"
            )
        return self._found

    def learnt(self) -> FlowModel:
        """The model as the run showed it; waits for the device.

        Raises:
            NotImplementedError: the denoiser is called in a way that cannot be repeated.
        """
        seen = self.observed
        name = timestep_name(seen.cond)
        values = [float(torch.as_tensor(value).float().flatten()[0]) for value in seen.times]
        steps = float(self.pipe.scheduler.config.get("num_train_timesteps", 1000))
        slope, offset = fit_timestep(seen.sigmas, values, steps=steps)
        kind = getattr(self.pipe, "prediction_kind", None)
        order, sign = self._verdict
        return FlowModel(name, slope, offset, kind, sign, order)

    def _begin(self) -> None:
        self._recorder.take()
        self._found = None

    def _on_step(self, real: Callable[..., Any], arguments: Arguments) -> Any:
        sample, output = arguments["sample"], arguments["model_output"]
        reading = self._reader.read(arguments["timestep"])
        calls = self._recorder.take()
        if self._found is None:
            _check_reading(self.pipe, reading)
            self._found = self._first(calls, sample, output, reading)
        seen = self._found
        seen.sigmas.append(float(reading.level.sigma))
        name = timestep_name(Conditioning.of(calls[0])) if self.model is None else None
        seen.times.append(calls[0].argument(name) if name else None)
        seen.evaluations += sum(call.output.shape[0] for call in calls) // len(sample)
        if self.keep_states:
            seen.states.append(sample.detach())
        following = self._reader.following(arguments["timestep"]) if self.replace else None
        result = real(*arguments.args, **arguments.kwargs)
        after = result[0]
        if self.replace is not None:
            ahead = 0.0 if following is None else float(following.sigma)
            after = self.replace(sample, output, float(reading.level.sigma), ahead)
            result = _with_sample(result, after.to(result[0].dtype))
            after = result[0]
        seen.clean = after.detach()
        return result

    def _first(
        self, calls: list[Any], sample: Tensor, output: Tensor, reading: LevelReading
    ) -> Observed:
        """Tell conditional and unconditional calls apart, and check what can be repeated."""
        layout = layout_of(calls, sample, False)
        if self.model is None:
            self._verdict = self._verify(calls, layout, sample, output, reading)
        else:
            self._verdict = (self.model.order, self.model.sign)
        found = [Conditioning.of(call) for call in calls]
        if layout == BATCHED:
            half = found[0].count // 2
            found = [found[0].take(slice(0, half)), found[0].take(slice(half, None))]
        if layout == SINGLE:
            return Observed(sample, found[0])
        first = self._verdict[0].index("c")
        return Observed(sample, found[first], found[1 - first])

    def _verify(
        self, calls: list[Any], layout: str, sample: Tensor, output: Tensor, reading: LevelReading
    ) -> tuple[str, int]:
        network = getattr(self.pipe, "prediction_kind", None)
        seen = Predictions(
            calls=calls,
            layout=layout,
            x=sample,
            dtype=output.dtype,
            reading=reading,
            recorder=self._recorder,
            scale=lambda x: x,
            network=network,
        )
        verdict = resolve(self.pipe, seen.part(output), seen.pair, len(calls), None, None)
        if not same_input(network_input(calls[0], sample, lambda x: x), calls[0].sample):
            raise NotImplementedError(
                f"{type(self.pipe).__name__} changes the sample before it calls the denoiser, in a "
                "way that cannot be repeated, so it cannot be trained here"
            )
        return verdict.order, verdict.sign


def _check_reading(pipe: Any, reading: LevelReading) -> None:
    sigma, alpha = reading.level.sigma, reading.level.alpha
    straight = bool(((alpha + sigma - 1).abs() < 1e-4).all())
    if reading.kind != Kind.VELOCITY or reading.sign != 1 or not straight:
        raise ValueError(
            f"{type(pipe).__name__} steps a {reading.kind.name} prediction; fine-tuning by flow "
            "matching needs a flow model, whose scheduler takes the velocity noise - clean"
        )


def _with_sample(result: Any, sample: Tensor) -> Any:
    if isinstance(result, tuple):
        return (sample, *result[1:])
    result["prev_sample"] = sample
    return result
