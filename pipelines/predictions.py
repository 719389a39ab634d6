"""From the recorded denoiser calls of one step to a conditional and an unconditional prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.prediction import Kind
from ..core.step import MissingPrediction
from .families import DOUBLING, listed
from .levels import LevelReading
from .observe import Call, Recorder, half_of, network_input, normal, plain, replay, same_input
from .spaces import as_scheduled

SINGLE, BATCHED, SEQUENTIAL, DOUBLED = "single", "batched", "sequential", "doubled"


def layout_of(calls: list[Call], sample: Tensor, doubled: bool) -> str:
    """How the pipeline lays out its predictions at this step.

    Args:
        calls: the denoiser's calls since the last ``scheduler.step``.
        sample: the noisy sample that the pipeline passes, (B, ...).
        doubled: whether the scheduler is given every sample twice (DiTPipeline).

    Returns:
        ``"single"`` (no guidance), ``"batched"`` (one call of 2B rows), ``"sequential"`` (two calls
        of B rows) or ``"doubled"`` (one call of 2B rows, and 2B rows for the scheduler).

    Raises:
        NotImplementedError: with the picture of calls, if it is none of these.
    """
    rows, batch = [call.output.shape[0] for call in calls], sample.shape[0]
    if rows == [batch]:
        return DOUBLED if doubled else SINGLE
    if rows == [2 * batch]:
        return BATCHED
    if rows == [batch, batch]:
        return SEQUENTIAL
    made = "; ".join(call.describe() for call in calls) or "no call at all"
    raise NotImplementedError(
        "steer takes one prediction a step or a pair of them, but for a sample of shape "
        f"{tuple(sample.shape)} the pipeline made: {made}. Three-way guidance, PAG, skip-layer "
        "guidance and the like mix more than two: switch them off in the call (PAG and SLG are "
        "DegradedPassGuidance). If another module predicts, name it: steer(..., denoiser=module)"
    )


def is_doubled(calls: list[Call], output: Tensor, sample: Tensor, pipe: Any) -> bool:
    """Whether the scheduler is given one batch twice, and not a batch of equal samples.

    Waits for the device; asked once a trajectory.
    """
    if len(calls) != 1 or sample.shape[0] % 2 or calls[0].output.shape[0] != sample.shape[0]:
        return False
    given = [sample, output[:, : sample.shape[1]], calls[0].output]
    x, guided, raw = (bool((a == b).all()) for a, b in (tensor.chunk(2) for tensor in given))
    return x and guided and (not raw or listed(pipe, DOUBLING))


def align(prediction: Tensor, sample: Tensor) -> Tensor:
    """The part of a prediction that belongs to the sample, in the sample's layout.

    Learned variances (channels) and the tokens of reference images come after it along dimension 1.

    Raises:
        NotImplementedError: if the shapes have no such relation.
    """
    shape, wanted = prediction.shape[1:], sample.shape[1:]
    if shape == wanted:
        return prediction
    if len(shape) == len(wanted) and shape[1:] == wanted[1:] and shape[0] > wanted[0]:
        return prediction[:, : wanted[0]]
    if [n for n in shape if n != 1] == [n for n in wanted if n != 1]:
        return prediction.reshape(-1, *wanted)
    raise NotImplementedError(
        f"the denoiser predicts rows of shape {tuple(shape)}, but the scheduler steps "
        f"{tuple(wanted)}: the pipeline rearranges the prediction in between, and steer does "
        "not guess how. If another module predicts, name it with steer(..., denoiser=module)"
    )


@dataclass
class Predictions:
    """The predictions of one step, and how to make more of them.

    Attributes:
        calls: the recorded calls.
        layout: see ``layout_of``.
        x: the noisy sample, (B, ...), never doubled.
        dtype: the dtype in which the pipeline hands predictions to the scheduler.
        reading: what the scheduler takes, and at which level.
        recorder: paused while we call the denoiser.
        scale: the scheduler's ``scale_model_input`` at this step.
        network: what the network predicts, if the pipeline converts that; else None.
        negative: overrides that make a single call unconditional, or None.
        weak: the second model, or None.
        order: ``"uc"`` or ``"cu"``, set after verification.
        sign: 1 or -1, set after verification.
        evaluations: network calls made at this step.
        rebuilds: whether rebuilding the network's input was checked already.
    """

    calls: list[Call]
    layout: str
    x: Tensor
    dtype: torch.dtype
    reading: LevelReading
    recorder: Recorder
    scale: Callable[[Tensor], Tensor]
    network: Kind | None = None
    negative: Mapping[str, Any] | None = None
    weak: Callable[..., Any] | None = None
    order: str = "uc"
    sign: int = 1
    evaluations: int = 0
    rebuilds: bool = False
    pair: list[Tensor] = field(default_factory=list)
    _last: tuple[Tensor, int, Tensor] | None = None

    def __post_init__(self) -> None:
        """Cut the recorded outputs into one or two predictions, in the pipeline's order."""
        self.evaluations += len(self.calls)
        outputs = [call.output for call in self.calls]
        if not torch.is_inference_mode_enabled():
            outputs = [normal(output) for output in outputs]
        predictions = [self._read(output, self.x) for output in outputs]
        doubled = self.layout in (BATCHED, DOUBLED)
        self.pair = list(predictions[0].chunk(2)) if doubled else predictions

    def settle(self, order: str, sign: int) -> None:
        """Apply what verification found, and add the prediction of ``negative``."""
        self.order, self.sign = order, sign
        if sign < 0:
            self.pair = [-prediction for prediction in self.pair]
        if self.negative is not None:
            self.order = "cu"
            self.pair.append(self.evaluate(None, "uncond"))

    @property
    def cond(self) -> Tensor:
        """The conditional prediction in the scheduler's kind and dtype."""
        return self.pair[self._place("cond")] if len(self.pair) == 2 else self.pair[0]

    @property
    def uncond(self) -> Tensor | None:
        """The unconditional one, or None."""
        return self.pair[self._place("uncond")] if len(self.pair) == 2 else None

    def part(self, output: Tensor) -> Tensor:
        """What of the scheduler's input are predictions: not its learned variance, not its copy."""
        output = output.chunk(2)[0] if self.layout == DOUBLED else output
        return align(output, self.x)

    def whole(self, guided: Tensor, output: Tensor) -> Tensor:
        """The inverse of ``part``: ``guided`` in the place of the predictions in ``output``."""
        guided = self.both(guided)
        if guided.shape == output.shape:
            return guided
        return torch.cat([guided, output[:, guided.shape[1] :]], dim=1)

    def both(self, tensor: Any) -> Any:
        """A tensor (or None) twice, where the scheduler is given everything twice."""
        if self.layout == DOUBLED and tensor is not None:
            return torch.cat([tensor, tensor])
        return tensor

    def check_sample(self, pipe: Any) -> None:
        """Refuse pipelines that pass ``scheduler.step`` the sample scaled for the network.

        DiTPipeline does, which is harmless with DDIM and wrong with Euler. Waits for the device.

        Raises:
            ValueError: if the sample is not what the scheduler takes it for.
        """
        call = self.calls[0]
        scaled = self.scale(self.x)
        unscaled = scaled is self.x or bool((scaled == self.x).all())
        if unscaled or not isinstance(call.sample, Tensor):
            return
        rows = call.sample[: self.x.shape[0]].to(self.x.dtype)
        if rows.shape == self.x.shape and bool((rows == self.x).all()):
            raise ValueError(
                f"{type(pipe).__name__} hands this scheduler the sample already scaled for the "
                "network, so its noise level is wrong and denoised predictions with it; use "
                "DDIMScheduler or DPMSolverMultistepScheduler"
            )

    def evaluate(self, x: Tensor | None, branch: str, **overrides: Any) -> Tensor:
        """Evaluate the denoiser again; the prediction of one branch, shape of ``x``."""
        fresh = not overrides and not torch.is_grad_enabled()
        if x is not None and fresh and self._last is not None and self._last[0] is x:
            if self._last[1] == _version(x):  # the other half of the same doubled batch
                return self._pick(self._last[2], branch, x)
        call, overrides = self._call(branch, overrides)
        sample = None if x is None else self._input(call, x)
        output = self._replay(call, None, branch, sample=sample, overrides=overrides)
        if x is not None and fresh and self._half(branch) is not None:
            self._last = (x, _version(x), output)
        return self._pick(output, branch, self.x if x is None else x)

    def evaluate_weak(self, model: Any, branch: str, x: Any = None, **overrides: Any) -> Tensor:
        """Evaluate another model on the recorded inputs; shape of the sample."""
        function = self.weak if model is None else model
        if function is None:
            raise MissingPrediction(
                "this step has no weak model; pass one, e.g. steer(pipe, rule, "
                "weak=weak_transformer), or --weak to a script"
            )
        call, overrides = self._call(branch, overrides)
        sample = None if x is None else self._input(call, x)
        try:
            output = self._replay(call, function, branch, sample=sample, overrides=overrides)
            return self._pick(output, branch, self.x if x is None else x)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise ValueError(
                f"the weak model ({type(function).__name__}) does not fit: {error}. It must be a "
                "smaller or less trained version of the pipeline's, for the same inputs and size"
            ) from error

    def argument(self, name: str, branch: str = "cond") -> Any:
        """An argument of the recorded call, tensors cut to the rows of one branch.

        Raises:
            MissingPrediction: if the call has no such argument.
        """
        call, overrides = self._call(branch, {})
        value = overrides.get(name, call.argument(name))
        if value is None:
            raise MissingPrediction(
                f"the pipeline calls its {type(plain(call.module)).__name__} without {name!r}; its "
                f"arguments are {', '.join(call.names)}"
            )
        return half_of(value, self._half(branch), call.output.shape[0])

    def _place(self, branch: str) -> int:
        return self.order.index(branch[0])

    def _half(self, branch: str) -> int | None:
        return self._place(branch) if self.layout in (BATCHED, DOUBLED) else None

    def _call(self, branch: str, overrides: dict[str, Any]) -> tuple[Call, dict[str, Any]]:
        if branch not in ("cond", "uncond"):
            raise ValueError(f"branch must be 'cond' or 'uncond', got {branch!r}")
        if self.layout == SEQUENTIAL:
            return self.calls[self._place(branch)], overrides
        if self.layout == SINGLE and branch == "uncond":
            if self.negative is None and not overrides:
                raise MissingPrediction(
                    "the pipeline ran without guidance, so there are no unconditional inputs "
                    "to evaluate; turn classifier-free guidance on in the call, or give "
                    "steer(..., negative={...})"
                )
            return self.calls[0], {**(self.negative or {}), **overrides}
        return self.calls[0], overrides

    def _replay(self, call: Call, function: Any, branch: str, **changes: Any) -> Tensor:
        cache = f"diffsteer_{'weak_' if function is not None else ''}"
        cache += branch if self._half(branch) is None else "both"
        self.evaluations += 1
        with self.recorder.paused():
            half = self._half(branch)
            return replay(call, function, half=half, cache=cache, **changes)

    def _input(self, call: Call, x: Tensor) -> Any:
        if x.shape != self.x.shape:
            raise ValueError(f"predict: expected shape {tuple(self.x.shape)}, got {tuple(x.shape)}")
        if not self.rebuilds:
            with torch.no_grad():
                rebuilt = network_input(call, self.x, self.scale)
                if not same_input(rebuilt, call.sample):
                    raise NotImplementedError(
                        "this pipeline changes the sample before it calls the denoiser, in a "
                        "way that steer cannot repeat, so the model cannot be evaluated at "
                        "another sample"
                    )
            self.rebuilds = True
        return network_input(call, x.to(self.x.dtype), self.scale)

    def _pick(self, output: Tensor, branch: str, x: Tensor) -> Tensor:
        half = self._half(branch)
        part = output if half is None else output.chunk(2)[half]
        prediction = self._read(part, x)
        return -prediction if self.sign < 0 else prediction

    def _read(self, output: Tensor, x: Tensor) -> Tensor:
        prediction = align(output, self.x).to(self.dtype)
        return as_scheduled(prediction, self.network, self.reading, x)


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version
