"""Argument checks of the guidance methods: errors name argument, value and remedy."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor, nn

from ..core.tensors import send


def check_number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    infinite: bool = False,
    whole: bool = False,
    remedy: str,
) -> None:
    """Refuse what is not a number in the given range.

    Args:
        name: of the argument.
        value: what the user gave.
        low: smallest value allowed.
        high: largest value allowed.
        open_low: whether ``low`` itself is refused.
        open_high: whether ``high`` itself is refused.
        infinite: whether plus infinity is allowed.
        whole: whether only whole numbers are allowed.
        remedy: what to do instead, a clause.

    Raises:
        TypeError: if ``value`` is not a real number.
        ValueError: if it is NaN, infinite without leave, out of range, or no whole number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} must be a number, got {value!r} of type {type(value).__name__}; {remedy}"
        )
    number = float(value)
    if math.isnan(number) or (math.isinf(number) and not (infinite and number > 0)):
        raise ValueError(f"{name} must be a finite number, got {value}; {remedy}")
    below = number <= low if open_low else number < low
    above = number >= high if open_high else number > high
    if below or above:
        left = "(" if open_low else "["
        right = "]" if (infinite or high < math.inf) and not open_high else ")"
        raise ValueError(f"{name} must be in {left}{low:g}, {high:g}{right}, got {value}; {remedy}")
    if whole and number != int(number):
        raise ValueError(f"{name} must be a whole number, got {value}; {remedy}")


def check_interval(low: Any, high: Any) -> None:
    """Refuse ends between which there is no noise-to-signal ratio.

    Raises:
        TypeError: if an end is not a number.
        ValueError: if ``low`` is negative, an end is NaN, or ``low >= high``.
    """
    check_number("low", low, low=0.0, remedy="sigma is a noise-to-signal ratio")
    check_number("high", high, infinite=True, remedy="use math.inf for no upper end")
    if low >= high:
        raise ValueError(
            f"low must be less than high, got low={low} and high={high}; "
            "guidance is on where low < sigma <= high"
        )


def check_pair(cond: Tensor, uncond: Tensor) -> None:
    """Refuse predictions of different shapes, which PyTorch would broadcast in silence.

    Raises:
        ValueError: naming both shapes.
    """
    if cond.shape != uncond.shape:
        raise ValueError(
            "the two predictions must have the same shape, got "
            f"{tuple(cond.shape)} (conditional) and {tuple(uncond.shape)} (unconditional)"
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse what is not one of ``choices``.

    Raises:
        ValueError: naming the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_reached(ratios: Tensor | None, low: float, high: float) -> None:
    """Refuse an interval of noise levels that no step of the run lies in.

    Args:
        ratios: ``Step.ratios``; nothing is checked where it is None.
        low: exclusive.
        high: inclusive.

    Raises:
        ValueError: with the levels of the run.
    """
    if ratios is None or not len(ratios) or bool(((ratios > low) & (ratios <= high)).any()):
        return
    raise ValueError(
        f"no step of this run lies in low < sigma <= high with low={low:g} and high={high:g}: its "
        f"{len(ratios)} noise-to-signal ratios go from {float(ratios.max()):.4g} to "
        f"{float(ratios.min()):.4g}. Choose ends inside, or more steps; flow sigmas in [0, 1] are "
        "given by GuidanceInterval.flow, or as sigma / (1 - sigma)"
    )


def check_rule(name: str, rule: Any) -> None:
    """Refuse what is not a guidance method, ready to be called.

    Raises:
        TypeError: for a string, a class that was not instantiated, or anything that is not
            callable.
    """
    if isinstance(rule, type):
        raise TypeError(
            f"{name} must be a guidance method, got the class {rule.__name__} itself; "
            f"make one of it first, e.g. {rule.__name__}(scale=4.0)"
        )
    if not callable(rule):
        raise TypeError(
            f"{name} must be a guidance method such as ClassifierFreeGuidance(scale=4.0), "
            f"got {rule!r} of type {type(rule).__name__}; methods are objects, not names"
        )


def check_still(rule: Any, who: str) -> None:
    """Refuse a rule to be wrapped by ``who`` that is none, or that moves the noisy sample.

    Raises:
        TypeError: for what is no guidance method.
        ValueError: for one that moves the sample: its prediction belongs to another sample than
            ``step.cond``.
    """
    check_rule("rule", rule)
    if getattr(rule, "moves", False):
        name = type(rule).__name__
        raise ValueError(
            f"rule moves the sample, so {who} would compare predictions at two samples; put {name} "
            f"outermost: {name}({who}(...))"
        )


def check_model(name: str, model: Any) -> None:
    """Refuse what cannot be called as the denoiser is called; None will do.

    Raises:
        TypeError: for a class, or anything that is not callable.
    """
    if isinstance(model, type) or not (model is None or callable(model)):
        raise TypeError(
            f"{name} must be called like the denoiser (a module such as weak_pipe.transformer), "
            f"got {model!r}"
        )


def check_classifier(classifier: Any) -> None:
    """Refuse what does not map images to logits, or would do so in training mode.

    Raises:
        TypeError: if it is not callable.
        ValueError: if it is a module in training mode.
    """
    if not callable(classifier):
        raise TypeError(f"classifier must map images to logits, got {classifier!r}")
    if isinstance(classifier, nn.Module) and classifier.training:
        raise ValueError("classifier is in training mode; call classifier.eval() first")


def one_label_a_sample(labels: Tensor, sample: Tensor) -> Tensor:
    """The labels as integers beside ``sample``, (B, ...).

    Raises:
        ValueError: unless there is one a sample.
    """
    if labels.shape != (sample.shape[0],):
        raise ValueError(
            f"labels must have shape ({sample.shape[0]},), one a sample, got {tuple(labels.shape)}"
        )
    return send(labels, sample.device).long()
