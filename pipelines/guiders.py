"""The guidance methods as components of Modular pipelines, and of classic ones with a guider.

    install_guider(pipe, AdaptiveProjectedGuider(guidance_scale=8.0))

One adapter serves all rules. It acts in the denoised space like ``steer``: a forward hook, in place
only while a prediction is made, shows it the sample and lets rules evaluate the model again; the
noise level comes from the scheduler of the pipeline it is attached to. See ``docs/modular.md``.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.modular_pipelines import ComponentSpec

from ..core.step import Guidance
from ..guidance import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    GuidanceInterval,
    parse_scale,
)
from .guider_base import BaseGuidance as BaseGuidance
from .guider_base import RuleGuider as RuleGuider


class ClassifierFreeGuider(RuleGuider):
    """Classifier-free guidance as a guider; bit for bit that of diffusers where guidance is on.

    Args:
        guidance_scale: 1 is no guidance; a number, or a ramp ``"linear:1:8"``, ``"cosine:8:1"``.
        interval_low: guidance is off at this sigma (noise-to-signal ratio) and below.
        interval_high: guidance is off above this sigma; None for no upper end.
        start: see ``RuleGuider``.
        stop: see ``RuleGuider``.
        enabled: see ``RuleGuider``.

    Raises:
        TypeError: if an argument is no number.
        ValueError: if one is NaN or out of range; the text says what to pass.
    """

    @register_to_config
    def __init__(
        self,
        *,  # diffusers forgets positional arguments in new() and from_config()
        guidance_scale: float | str = 7.5,
        interval_low: float = 0.0,
        interval_high: float | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        rule = ClassifierFreeGuidance(scale=_scale(guidance_scale))
        self._begin_life(_within(rule, interval_low, interval_high), start, stop, enabled)


class AdaptiveProjectedGuider(RuleGuider):
    """Adaptive projected guidance (arXiv 2410.02416) as a guider, on denoised predictions.

    diffusers' guider of that name acts on the raw prediction, which is another method.

    Args:
        guidance_scale: 1 is no guidance; a number, or a ramp ``"linear:1:8"``, ``"cosine:8:1"``.
        eta: how much of the update along the conditional prediction is kept; 0 recommended.
        radius: longest update as an absolute norm; takes the place of ``relative_radius``.
        relative_radius: longest update in units of ``latent_std * sqrt(elements of a sample)``.
            With None for this and ``radius`` nothing is clipped.
        momentum: weight of the earlier updates; -0.75 to -0.25 recommended.
        latent_std: standard deviation of clean samples, used with ``relative_radius``.
        interval_low: guidance is off at this sigma (noise-to-signal ratio) and below.
        interval_high: guidance is off above this sigma; None for no upper end.
        start: see ``RuleGuider``.
        stop: see ``RuleGuider``.
        enabled: see ``RuleGuider``.

    Raises:
        TypeError: if an argument is no number.
        ValueError: if one is NaN or out of range; the text says what to pass.
    """

    @register_to_config
    def __init__(
        self,
        *,  # diffusers forgets positional arguments in new() and from_config()
        guidance_scale: float | str = 8.0,
        eta: float = 0.0,
        radius: float | None = None,
        relative_radius: float | None = 0.05,
        momentum: float = -0.5,
        latent_std: float = 1.0,
        interval_low: float = 0.0,
        interval_high: float | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        rule = AdaptiveProjectedGuidance(
            scale=_scale(guidance_scale),
            eta=eta,
            radius=math.inf if radius is None and relative_radius is None else radius,
            relative_radius=relative_radius,
            momentum=momentum,
            latent_std=latent_std,
        )
        self._begin_life(_within(rule, interval_low, interval_high), start, stop, enabled)


def install_guider(pipe: Any, guider: RuleGuider, name: str = "guider") -> Any:
    """Put a guider into a pipeline, so that it is attached, and kept by ``pipe.save_pretrained``.

    ``pipe.update_components(guider=...)`` works too, but then diffusers silently leaves the guider
    out of what is saved, and ``attach`` is left to you.

    Args:
        pipe: a Modular pipeline, or a classic one with guider components.
        guider: a guider of ours. Give each component its own.
        name: of the component; Wan 2.2 has ``"guider"`` and ``"guider_2"``.

    Returns:
        ``pipe``.

    Raises:
        TypeError: if ``guider`` is none of ours, or ``pipe`` no pipeline.
        ValueError: if the pipeline has no such component.
    """
    if not isinstance(guider, RuleGuider):
        raise TypeError(
            f"guider must be a guider of diffsteer, got {guider!r}; a rule is wrapped first: "
            "RuleGuider(rule)"
        )
    if name not in getattr(pipe, "components", {}):
        takes = [n for n in getattr(pipe, "components", {}) if "guider" in n]
        raise ValueError(
            f"{type(pipe).__name__} has no component {name!r}"
            + (f", only {', '.join(takes)}" if takes else "; use steer(pipe, rule)")
        )
    if not hasattr(pipe, "update_components"):
        pipe.register_modules(**{name: guider})
        return attach(pipe)
    # Modular pipelines save only what they believe to come from files.
    getattr(pipe, "_component_specs", {})[name] = ComponentSpec(name=name, type_hint=type(guider))
    pipe.update_components(**{name: guider})
    return attach(pipe)


def attach(pipe: Any) -> Any:
    """Tell the guiders in ``pipe`` where to read the noise level: ``pipe.scheduler``.

    Needed for exact levels (and at all, for pipelines that are no flow models, such as SDXL). It is
    not part of what is saved: call it after loading. ``install_guider`` calls it.

    Args:
        pipe: a Modular pipeline, or a classic one with guider components.

    Returns:
        ``pipe``.

    Raises:
        TypeError: if ``pipe`` has no scheduler.
        ValueError: if there is no guider of ours in it.
    """
    if isinstance(pipe, type) or not hasattr(pipe, "scheduler"):
        raise TypeError(f"attach takes a pipeline with a scheduler, got {type(pipe).__name__}")
    guiders = [c for c in pipe.components.values() if isinstance(c, RuleGuider)]
    if not guiders:
        raise ValueError(
            f"{type(pipe).__name__} has no guider of diffsteer; put one in first: "
            "install_guider(pipe, AdaptiveProjectedGuider(guidance_scale=8.0))"
        )
    for guider in guiders:
        guider._pipe = weakref.ref(pipe)
    return pipe


def _scale(value: Any) -> Any:
    return parse_scale(value) if isinstance(value, str) else value


def _within(rule: Guidance, low: float, high: float | None) -> Guidance:
    if low == 0 and high is None:
        return rule
    return GuidanceInterval(rule, low, math.inf if high is None else high)


# Saved pipelines record the module of a component; this one stays when files move, and has
# ``BaseGuidance`` beside it, which diffusers looks for there.
for _cls in (RuleGuider, ClassifierFreeGuider, AdaptiveProjectedGuider):
    _cls.__module__ = __name__.rpartition(".")[0]
