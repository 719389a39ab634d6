"""Flow schedulers that take a k-Diff network's output; imported late, it needs diffusers.

Each is a stock scheduler in front of which the network's ``u = k * clean - (1 - k) * noise`` is
turned into the velocity that the stock one expects. So any pipeline of flow matching samples a
k-Diff network unchanged, and k is saved in its ``scheduler_config.json``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config

# Loaders of diffusers look for it beside the class of a saved scheduler.
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from torch import Tensor

from ..core.prediction import Kind, Level, from_denoised, to_denoised
from ..core.tensors import widen

SMALLEST_SIGMA = 1e-6  # a velocity divides by sigma; every real schedule stays far above


class KDiffScheduler:
    """What the schedulers of this module add to a stock one.

    All arguments are those of the stock scheduler, and one keyword more:
        k: in [0, 1], the one the network was trained at. Guidance by a pipeline's own scale needs
            no thought: it is the same on u, velocities and images.

    Raises:
        ValueError: if ``k`` is missing or not in [0, 1], ``invert_sigmas`` is set, or a solver that
            knows several processes is not told ``use_flow_sigmas=True`` and
            ``prediction_type="flow_prediction"``.
    """

    config: Any

    @property
    def raw_kind(self) -> Kind:
        """What ``step`` takes; ``steer`` reads it."""
        return Kind.kdiff(self.config.k)

    def __init_subclass__(cls, stock: Any = None, **rest: Any) -> None:
        """Wrap the constructor and the step of the stock class, with their own signatures.

        diffusers reads from the one what to save, pipelines from the other what to pass.
        """
        super().__init_subclass__(**rest)
        if stock is not None:
            constructor, step = _constructor(stock), _step(stock)
            setattr(cls, "__init__", constructor)  # noqa: B010 (mypy: unsound to assign)
            setattr(cls, "step", step)  # noqa: B010


def _check(k: Any, options: dict[str, Any], parameters: Any) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, float)) or not 0 <= k <= 1:
        raise ValueError(f"k must be the k the network was trained at, in [0, 1], got {k!r}")
    if options.get("invert_sigmas"):
        raise ValueError("invert_sigmas: k-Diff networks count noise as stock flows do; leave it")
    flow = options.get("prediction_type") == "flow_prediction" and options.get("use_flow_sigmas")
    if "use_flow_sigmas" in parameters and not flow:
        raise ValueError(
            "a k-Diff network lives on the straight path: give use_flow_sigmas=True and "
            "prediction_type='flow_prediction'"
        )


def _constructor(stock: Any) -> Callable[..., None]:
    """The stock constructor with ``k``: diffusers reads what to save from the signature."""
    known = inspect.signature(stock.__init__)
    defaults = {name: p.default for name, p in known.parameters.items() if name != "self"}

    def __init__(self: Any, *args: Any, k: float | None = None, **options: Any) -> None:
        options.update(zip(defaults, args, strict=False))
        _check(k, {**defaults, **options}, defaults)
        stock.__init__(self, **options)

    extra = inspect.Parameter("k", inspect.Parameter.KEYWORD_ONLY, default=None)
    signature = known.replace(parameters=[*known.parameters.values(), extra])
    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.__doc__ = "See ``KDiffScheduler``."
    made: Callable[..., None] = register_to_config(__init__)
    return made


def _step(stock: Any) -> Callable[..., Any]:
    """The stock step, given the network's u."""

    @functools.wraps(stock.step)
    def step(
        self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any
    ) -> Any:
        if options.get("per_token_timesteps") is not None:
            raise ValueError("per_token_timesteps: a k-Diff output is read at one noise level")
        if self.step_index is None:
            self._init_step_index(timestep)
        level = Level.flow(self.sigmas[self.step_index].clamp(min=SMALLEST_SIGMA))
        # Wide until the end: rounded to bfloat16 the denoised sample would lose the velocity.
        denoised = to_denoised(widen(model_output), self.raw_kind, sample, level)
        velocity = from_denoised(denoised, Kind.VELOCITY, sample, level).to(model_output.dtype)
        return stock.step(self, velocity, timestep, sample, *args, **options)

    made: Callable[..., Any] = step
    return made


class KDiffFlowMatchEulerScheduler(
    KDiffScheduler, FlowMatchEulerDiscreteScheduler, stock=FlowMatchEulerDiscreteScheduler
):
    """``FlowMatchEulerDiscreteScheduler`` for a k-Diff network; see ``KDiffScheduler``."""


class KDiffFlowMatchHeunScheduler(
    KDiffScheduler, FlowMatchHeunDiscreteScheduler, stock=FlowMatchHeunDiscreteScheduler
):
    """``FlowMatchHeunDiscreteScheduler`` for a k-Diff network; see ``KDiffScheduler``."""


class KDiffFlowMatchLCMScheduler(
    KDiffScheduler, FlowMatchLCMScheduler, stock=FlowMatchLCMScheduler
):
    """``FlowMatchLCMScheduler`` for a k-Diff network; see ``KDiffScheduler``."""


class KDiffDPMSolverMultistepScheduler(
    KDiffScheduler, DPMSolverMultistepScheduler, stock=DPMSolverMultistepScheduler
):
    """``DPMSolverMultistepScheduler`` for a k-Diff network; see ``KDiffScheduler``."""


class KDiffUniPCMultistepScheduler(
    KDiffScheduler, UniPCMultistepScheduler, stock=UniPCMultistepScheduler
):
    """``UniPCMultistepScheduler`` for a k-Diff network; see ``KDiffScheduler``."""
