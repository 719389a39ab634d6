"""What a guider is shown of a step, turned into the ``Predictions`` that ``steer`` works with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..core.prediction import Kind, Level
from ..core.step import MissingPrediction
from ..core.tensors import widen
from .levels import LevelReader, LevelReading
from .observe import Call, Recorder, plain
from .predictions import SEQUENTIAL, SINGLE, Predictions, align

# Every FlowMatchEuler pipeline numbers its timesteps sigma * 1000.
_TRAIN_TIMESTEPS = 1000


class UnknownLevel:
    """Stands where the noise level cannot be known; complains when a rule asks for it."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        raise MissingPrediction(
            "this guidance depends on the noise level, which a guider is not told, and "
            f"{self._reason}. Call diffsteer.pipelines.attach(pipe) once after the guider was put "
            "into the pipeline, and again after loading: then it is read off pipe.scheduler"
        )


def read_level(
    reader: LevelReader | None, timestep: Any, call: Call, unit_time: bool = False
) -> LevelReading:
    """The kind and level of the prediction.

    Args:
        reader: of the attached scheduler; exact. None assumes a flow model whose timestep is
            ``1000 * sigma``.
        timestep: what the pipeline told the guider.
        call: a recorded call of the denoiser.
        unit_time: whether the run's timesteps are in [0, 1], which says nothing about the level.

    Returns:
        A ``LevelReading``; its level raises when it is used if the assumption cannot hold.
    """
    if reader is not None:
        return reader.read(timestep)
    level: Any
    if isinstance(plain(call.module), UNet2DConditionModel):
        level = UnknownLevel("a UNet2DConditionModel is no flow model, so it cannot be guessed")
    elif unit_time:
        level = UnknownLevel("timesteps in [0, 1] do not say which end is noise")
    else:
        level = Level.flow(torch.as_tensor(timestep).reshape(-1)[0].float() / _TRAIN_TIMESTEPS)
    return LevelReading(Kind.VELOCITY, level)


def noisy_sample(call: Call, prediction: Tensor, factor: Tensor | None) -> Tensor:
    """The noisy sample in the layout of the prediction, from what the network was given.

    Args:
        call: the recorded call.
        prediction: what the pipeline made of its output, (B, ...).
        factor: what the scheduler multiplied the sample by for the network, (); None for 1.

    Raises:
        NotImplementedError: if the sample cannot be told from what the pipeline added to it.
    """
    given = call.sample
    given = torch.stack(list(given)) if isinstance(given, (list, tuple)) else given
    try:
        x = align(given, prediction)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"the network is given {tuple(given.shape)} and the guider {tuple(prediction.shape)}: "
            "the noisy sample is not the first part of the network's input, and is not found"
        ) from error
    return x if factor is None else widen(x) / factor


class Received(Predictions):
    """Predictions that a pipeline hands to a guider; its recorded calls serve to evaluate again.

    The pipeline may have changed the sign of what the network returned; that is measured when (and
    only when) a rule evaluates the model again.
    """

    measured = False

    def __post_init__(self) -> None:
        """The pair is given: nothing is read off the recorded calls."""
        self.order = "cu"

    def evaluate(self, x: Tensor | None, branch: str, **overrides: Any) -> Tensor:
        """See ``Predictions.evaluate``."""
        self._measure()
        return super().evaluate(x, branch, **overrides)

    def evaluate_weak(self, model: Any, branch: str, x: Any = None, **overrides: Any) -> Tensor:
        """See ``Predictions.evaluate_weak``."""
        if model is None:
            raise MissingPrediction(
                "a guider has no weak model; give the rule one, or use steer(pipe, rule, weak=...)"
            )
        self._measure()
        return super().evaluate_weak(model, branch, x, **overrides)

    def _measure(self) -> None:
        if not self.measured:
            given, output = self.pair[0].float(), align(self.calls[0].output, self.x).float()
            self.sign = -1 if float((given * output).sum()) < 0 else 1
            self.measured = True


def receive(
    calls: list[Call],
    pair: list[Tensor],
    reading: LevelReading,
    scale: Callable[[Tensor], Tensor] | None,
    sample: Tensor | None = None,
    rebuilds: bool = False,
) -> Received:
    """Put together what the pipeline showed at one step.

    Args:
        calls: the denoiser's calls, the conditional one first.
        pair: the predictions as the pipeline handed them over, in the same order.
        reading: see ``read_level``.
        scale: the scheduler's ``scale_model_input`` at this step; None if it leaves samples alone.
        sample: the noisy sample if the pipeline showed it; else it is read off the first call.
        rebuilds: whether rebuilding the network's input was checked already.
    """
    cond = pair[0]
    if sample is None or sample.shape != cond.shape:
        one = torch.ones((), device=cond.device)
        factor = one if scale is None else scale(one)
        sample = noisy_sample(calls[0], cond, None if factor is one else factor)
    return Received(
        calls=calls,
        layout=SEQUENTIAL if len(calls) == 2 else SINGLE,
        x=sample,
        dtype=cond.dtype,
        reading=reading,
        recorder=Recorder([]),
        scale=scale or (lambda x: x),
        rebuilds=rebuilds,
        evaluations=len(calls),
        pair=pair,
    )
