"""The adapter between a guidance method and diffusers' ``BaseGuidance``."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers.guiders import BaseGuidance as BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor, nn

from ..core.step import Guidance, MissingPrediction, needs_uncond
from ..guidance import AdaptiveProjectedGuidance, ClassifierFreeGuidance, GuidanceInterval
from ..guidance.checks import check_reached
from .apply import apply_rule, autograd_allowed
from .guider_config import describe, restore
from .guider_step import read_level, receive
from .levels import LevelReader
from .observe import Call, first_tensor
from .trajectory import Trajectory


class RuleGuider(BaseGuidance):
    """Any guidance method as a guider.

    Args:
        rule: a guidance method of ``diffsteer.guidance``, or one of your own; or the dictionary
            that a saved config holds.
        start: share of the steps after which guidance begins, in [0, 1).
        stop: share of the steps after which it ends, in [start, 1]; 1 includes every step.
        enabled: False for the conditional prediction alone.

    Raises:
        TypeError: if ``rule`` is no guidance method.
        ValueError: if the rule moves the noisy sample, which a guider cannot, or a share is out of
            range.
        ImportError: if diffusers is older than 0.36.

    Outside ``start`` and ``stop``, at scale 1 and, if attached, outside the sigmas of a
    ``GuidanceInterval`` the unconditional prediction is not computed. What a rule remembers is
    forgotten at every new run, and where guidance is off.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012 (diffusers demands a list)

    def __init__(
        self,
        rule: Guidance | Mapping[str, Any],
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        self._begin_life(restore(rule) if isinstance(rule, Mapping) else rule, start, stop, enabled)
        self.register_to_config(rule=describe(self.rule), start=start, stop=stop, enabled=enabled)

    def _begin_life(self, rule: Any, start: float, stop: float, enabled: bool) -> None:
        if not hasattr(BaseGuidance, "prepare_inputs_from_block_state"):
            raise ImportError(
                f"guiders need diffusers >= 0.36, found {diffusers.__version__}; upgrade it, or "
                "use steer(pipe, rule), which runs with older versions"
            )
        with _without_notice():
            super().__init__(start, stop, enabled)
        if isinstance(rule, (str, type)) or not callable(rule):
            raise TypeError(
                "rule must be a guidance method such as ClassifierFreeGuidance(scale=5.0), got "
                f"{rule!r}. A guider saved with a rule of your own cannot be loaded: make it again"
            )
        if getattr(rule, "moves", False):
            raise ValueError(f"{type(rule).__name__} {_MOVES}")
        self.rule: Guidance = rule
        self._pipe: weakref.ref[Any] | None = None
        self._now = Trajectory()
        self._reader: LevelReader | None = None
        self._handle: Any = None
        self._call: Call | None = None
        self._calls: list[Call] = []
        self._latents: Tensor | None = None
        self._branches, self._on = 1, False
        self._unit_time = False

    @property
    def scheduler(self) -> Any:
        """The scheduler of the pipeline that the guider is attached to, or None."""
        pipe = None if self._pipe is None else self._pipe()
        return getattr(pipe, "scheduler", None)

    @property
    def num_conditions(self) -> int:
        """Whether a run needs the negative prompt (2) or not (1).

        The same before, during and after a run: pipelines ask while they encode the prompt, and
        diffusers' own guiders then answer for the last step of the run before.
        """
        return 2 if self._works() and needs_uncond(self.rule) else 1

    def _works(self) -> bool:
        return bool(self._enabled and self._start < self._stop and not _does_nothing(self.rule))

    @property
    def is_conditional(self) -> bool:
        """Whether the prediction being made is the conditional one."""
        return self._count_prepared == 1

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Take note of a new step, and decide how many predictions it needs; pipelines call it."""
        last, count = self._step, self._num_inference_steps
        super().set_state(step, num_inference_steps, timestep)
        # Wan 2.2 gives its second guider the later steps only, so a run need not begin at 0.
        if step == 0 or last is None or step != last + 1 or count != num_inference_steps:
            self._begin_run(step, num_inference_steps)
        self._calls, self._latents = [], None
        self._now.stage = 0 if self._reader is None else self._reader.stage()
        if self._now.stage == 0 or self._now.index < 0:
            self._now.index += 1
        self._on = self._is_on(timestep)
        self._branches = 2 if self._on and needs_uncond(self.rule) else 1

    def _begin_run(self, step: int, count: int) -> None:
        scheduler = self.scheduler
        self._reader = None if scheduler is None else LevelReader(scheduler)
        order = 1 if scheduler is None else getattr(scheduler, "order", 1)
        self._now = Trajectory(index=step // order - 1, count=count)
        self._unit_time = scheduler is None and step == 0 and float(self._timestep) <= 1

    def _is_on(self, timestep: Any) -> bool:
        index, count = self._now.index, self._now.count
        late = self._stop < 1 and index >= int(self._stop * count)
        if not self._works() or index < int(self._start * count) or late:
            return False
        if self._reader is None or not isinstance(self.rule, GuidanceInterval):
            return True
        if self.rule.outside is not None:
            return True
        ratio = self._reader.read(timestep).level.ratio
        if index == 0:
            check_reached(self._reader.remaining(timestep), self.rule.low, self.rule.high)
        if ratio.device.type != "cpu":  # the rule decides, without waiting for the device
            return True
        return bool(((ratio > self.rule.low) & (ratio <= self.rule.high)).any())

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """One set of inputs a branch, the conditional one first; pipelines call it."""
        self._check_negative(v[1] for v in data.values() if isinstance(v, tuple) and len(v) > 1)
        names = self._input_predictions[: self._branches]
        return [self._prepare_batch(data, index, name) for index, name in enumerate(names)]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """The same for pipelines that hand over their state; pipelines call it."""
        pairs = [v[1] for v in input_fields.values() if isinstance(v, tuple) and len(v) > 1]
        self._check_negative(getattr(data, name, None) for name in pairs)
        self._latents = getattr(data, "latents", None)
        names = self._input_predictions[: self._branches]
        return [
            self._prepare_batch_from_block_state(input_fields, data, index, name)
            for index, name in enumerate(names)
        ]

    def _check_negative(self, inputs: Iterable[Any]) -> None:
        if self._branches == 2 and all(value is None for value in inputs):
            raise MissingPrediction(
                f"{type(self).__name__} needs an unconditional prediction, but the pipeline has no "
                "inputs for one: pass negative_prompt (an empty string will do) or "
                "negative_prompt_embeds"
            )

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Begin to watch the denoiser; pipelines call it before each branch."""
        super().prepare_models(denoiser)
        self._unwatch()  # what a run that broke off has left
        hook = torch.compiler.disable(self._see)
        self._handle = denoiser.register_forward_hook(hook, with_kwargs=True)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Stop watching; pipelines call it after each branch."""
        if self._call is not None:
            self._calls.append(self._call)
        self._unwatch()

    def _see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._call = Call(module, args, kwargs, first_tensor(output))

    def _unwatch(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._call = None

    def __call__(self, data: list[Any]) -> GuiderOutput:
        """Guide one step from the predictions stored in ``data``; pipelines call it."""
        if missing := [d for d in data if not hasattr(d, "noise_pred")]:
            raise ValueError(f"{len(missing)} of {len(data)} branches have no noise_pred")
        return self.forward(**{getattr(d, self._identifier_key): d.noise_pred for d in data})

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The guided prediction, in the kind and dtype of the predictions."""
        calls, self._calls = self._calls, []
        guided = pred_cond
        if not self._on:
            self._now.memory.clear()
        else:
            pair = [pred_cond] if pred_uncond is None else [pred_cond, pred_uncond]
            with autograd_allowed() as normal:
                guided = self._guide(calls, [normal(prediction) for prediction in pair])
        return GuiderOutput(pred=guided, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _guide(self, calls: list[Call], pair: list[Tensor]) -> Tensor:
        if len(calls) != len(pair):
            raise NotImplementedError(
                f"{type(self).__name__} saw {len(calls)} calls of the denoiser between "
                "prepare_models and cleanup_models, expected one for each branch: "
                f"{len(pair)}"
            )
        reading = read_level(self._reader, self._timestep, calls[0], self._unit_time)
        if self._reader is not None and not getattr(self.rule, "commutes", False):
            self._now.following = self._reader.following(self._timestep)
        scale = getattr(self.scheduler, "scale_model_input", None)
        at_step = None if scale is None else lambda x: scale(x, self._timestep)
        seen = receive(calls, pair, reading, at_step, self._latents, self._now.rebuilds)
        applied = apply_rule(self.rule, seen, self._now, pair[0], self._timestep)
        self._now.rebuilds = seen.rebuilds
        if applied.sample is not None:
            raise ValueError(f"{type(self.rule).__name__} {_MOVES}")
        return applied.output

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write ``guider_config.json``.

        Raises:
            ValueError: if the rule has no form as plain values: it is none of our methods.
        """
        if "rule" in self.config and self.config["rule"] is None:
            raise ValueError(
                f"{type(self.rule).__name__} cannot be saved: only the methods of "
                "diffsteer.guidance, with numbers or ramps for arguments, can be written to a "
                "config. Make the guider again after loading, RuleGuider(rule)"
            )
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)


_MOVES = "moves the noisy sample, which a guider cannot do; use steer(pipe, rule)"


def _does_nothing(rule: Any) -> bool:
    if isinstance(rule, GuidanceInterval) and rule.outside is None:
        return _does_nothing(rule.rule)
    known = isinstance(rule, (ClassifierFreeGuidance, AdaptiveProjectedGuidance))
    return known and rule.scale == 1


@contextmanager
def _without_notice() -> Iterator[None]:
    """Keep back the notice that diffusers logs at every construction; our docs say it once."""

    def keep(record: logging.LogRecord) -> bool:
        return "experimental feature" not in record.getMessage()

    log = logging.getLogger(BaseGuidance.__module__)
    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)
