"""Measure what a pipeline did with its predictions before ``scheduler.step``.

A pipeline with classifier-free guidance hands the scheduler ``sign * (uncond + w * (cond -
uncond))``. Fitting ``a * uncond + b * cond`` to what arrived tells the order (the larger
coefficient is the condition's), the sign (a + b) and, by what is left over, whether the pipeline
does something else besides, which a rule put in its place would silently drop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .families import default_order, default_sign, remedy

# Relative residual that rounding explains, by the dtype in which the pipeline computed. Measured
# for plain guidance: 6e-9, 6e-5, 5e-4; for a norm rescale 2e-2 and more.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
_SAMPLED = 1 << 17


@dataclass(frozen=True)
class Fit:
    """``output = first_weight * first + second_weight * second``, and how well that holds.

    Attributes:
        first_weight: coefficient of the first prediction; 0 for a single prediction.
        second_weight: coefficient of the second.
        residual: relative to the norm of the output.
        rounding: the residual that rounding explains.
        decided: False where the two predictions are too alike to tell them apart.
    """

    first_weight: float
    second_weight: float
    residual: float
    rounding: float
    decided: bool = True

    @property
    def total(self) -> float:
        """The sum of the weights: the sign, unless the pipeline rescales."""
        return self.first_weight + self.second_weight

    @property
    def sign(self) -> int:
        """1 or -1: whether the pipeline negates."""
        return 1 if self.total >= 0 else -1

    @property
    def linear(self) -> bool:
        """Whether the pipeline did linear guidance and nothing else, to rounding."""
        slack = 30 * self.rounding if self.rounding < 1e-3 else 3 * self.rounding
        plain = not self.decided or abs(abs(self.total) - 1) <= slack
        return plain and self.residual <= self.rounding

    @property
    def order(self) -> str | None:
        """``"uc"`` or ``"cu"`` where one weight is above 1 (only the condition's is), else None."""
        if not self.decided:
            return None
        first, second = self.first_weight * self.sign, self.second_weight * self.sign
        if max(first, second) <= 1 + 1e-2:  # an interpolation: w and 1 - w look alike
            return None
        return "uc" if second > first else "cu"


def fit_pair(
    output: Tensor, first: Tensor, second: Tensor, dtype: torch.dtype | None = None
) -> Fit:
    """Least squares of ``output`` on two predictions, all of one shape. Waits for the device.

    ``dtype`` is the network's own, in which the pipeline may have mixed before it widened.
    """
    m, f, s = _sample(output, first, second)
    d = f - s  # the basis (second, difference) stays sound where the predictions are nearly equal
    ss, dd, sd = _dots(s, s), _dots(d, d), _dots(s, d)
    rounding = _tolerance(output.dtype, first.dtype, dtype)
    apart = dd > (0.1 * rounding) ** 2 * ss and dd * ss - sd * sd > 1e-6 * dd * ss
    if not apart:
        weight = _dots(m, s) / ss if ss > 0 else 1.0
        return Fit(0.0, weight, _left(m - weight * s, m), max(rounding, 1e-3), decided=False)
    determinant = ss * dd - sd * sd
    ms, md = _dots(m, s), _dots(m, d)
    total = (ms * dd - md * sd) / determinant
    weight = (md * ss - ms * sd) / determinant
    return Fit(weight, total - weight, _left(m - total * s - weight * d, m), rounding)


def fit_single(output: Tensor, only: Tensor, dtype: torch.dtype | None = None) -> Fit:
    """The same for one prediction: ``output = +-only`` in a pipeline without guidance."""
    m, s = _sample(output, only)
    sign = 1.0 if _dots(m, s) >= 0 else -1.0
    return Fit(0.0, sign, _left(m - sign * s, m), _tolerance(output.dtype, only.dtype, dtype))


class Verdict(NamedTuple):
    """Which prediction is which, the pipeline's sign, and whether the measurement could tell."""

    order: str
    sign: int
    settled: bool


def resolve(
    pipe: Any,
    output: Tensor,
    pair: list[Tensor],
    calls: int,
    order: str | None,
    sign: int | None,
    dtype: torch.dtype | None = None,
) -> Verdict:
    """Order and sign of the predictions: the user's word, or measured, or by the class name.

    Args:
        pipe: the pipeline, for its name and its options.
        output: what it passes to ``scheduler.step``.
        pair: one or two raw predictions of the same shape.
        calls: how many calls of the denoiser they came from.
        order: the user's word, or None. Where the user gives order *and* sign nothing is measured:
            the rule then replaces whatever the pipeline makes of its predictions.
        sign: the user's word, or None.
        dtype: of the network's own output, where ``pair`` is wider.

    Raises:
        ValueError: if the pipeline does more than linear guidance, or the user's word is wrong.
    """
    if order is not None and sign is not None:
        return Verdict(order, sign, True)
    if len(pair) == 1:
        fit = fit_single(output, pair[0], dtype)
    else:
        _check_options(pipe)
        first, second = pair
        fit = fit_pair(output, first, second, dtype)
    if not fit.linear:
        raise ValueError(_hidden(pipe, fit, len(pair), calls))
    if sign is not None and fit.decided and fit.sign != sign:
        raise ValueError(
            f"sign={sign} was given, but the pipeline applies {fit.sign}; leave sign out"
        )
    if order is not None and fit.order not in (None, order):
        raise ValueError(
            f"order={order!r} was given, but the pipeline weighs its two predictions by "
            f"{fit.first_weight:.3g} and {fit.second_weight:.3g}, which means {fit.order!r}; "
            "leave order out"
        )
    measured = fit.sign if fit.decided or fit.total else default_sign(pipe)
    return Verdict(order or fit.order or default_order(pipe, calls), sign or measured, fit.decided)


def _check_options(pipe: Any) -> None:
    rescale = getattr(pipe, "guidance_rescale", 0.0)
    if isinstance(rescale, (int, float)) and rescale > 0:
        raise ValueError(
            f"the pipeline runs with guidance_rescale={rescale}, which a rule replaces: call "
            f"it with guidance_rescale=0.0; RescaledGuidance(rule, {rescale}) does the same to any "
            "rule"
        )
    if getattr(pipe, "do_perturbed_attention_guidance", False) is True:
        raise ValueError(
            f"{type(pipe).__name__} runs perturbed-attention guidance, which a rule replaces: "
            "call it with pag_scale=0.0, or use the pipeline without PAG; DegradedPassGuidance "
            "with weak='perturb:LAYERS' does it beside any rule"
        )


def _hidden(pipe: Any, fit: Fit, count: int, calls: int) -> str:
    mixed = f"{fit.second_weight:.4g} * prediction"
    if count == 2:
        mixed = f"{fit.first_weight:.4g} * first + {fit.second_weight:.4g} * second"
    order, sign = default_order(pipe, calls), default_sign(pipe)
    return (
        f"{type(pipe).__name__} does more with its predictions than linear guidance: what it "
        f"passes to the scheduler is {mixed} up to a relative rest of {fit.residual:.1e}, where "
        f"rounding explains {fit.rounding:.0e} and the weights must add up to 1 or -1. The rule "
        f"would silently replace that. Remedy: {remedy(pipe)}. If the rule shall replace it, say "
        f"so with steer(pipe, rule, order={order!r}, sign={sign}): 'uc' means that the "
        "unconditional prediction comes first, sign=-1 that the pipeline negates"
    )


def _tolerance(*dtypes: torch.dtype | None) -> float:
    return max(_ROUNDING.get(dtype, 1e-5) for dtype in dtypes if dtype is not None)


def _sample(*tensors: Tensor) -> list[Tensor]:
    # An odd stride visits every channel, whether channels or tokens come last.
    stride = max(1, tensors[0].numel() // _SAMPLED) | 1
    picked = [t.detach().reshape(-1)[::stride].float() for t in tensors]
    return list(torch.stack(picked).cpu().double())


def _dots(a: Tensor, b: Tensor) -> float:
    return float(a @ b)


def _left(rest: Tensor, whole: Tensor) -> float:
    norm = float(whole.norm())
    return float(rest.norm()) / norm if norm > 0 else float(rest.norm())
