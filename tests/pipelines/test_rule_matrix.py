"""Every rule on every family of pipelines: it guides, it is off to the bit, it costs its price."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from tiny_pipelines import REQUIRED, Tiny, build
from torch import Tensor

from diffsteer import steer
from diffsteer.core import Guidance, MissingPrediction, needs_uncond
from diffsteer.guidance import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    CalibratedClassifierGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    DegradedPassGuidance,
    FrequencyDecoupledGuidance,
    GradientFreeClassifierGuidance,
    GuidanceInterval,
    ManifoldProjectedGuidance,
    RescaledGuidance,
    rules,
)
from diffsteer.pipelines import RuleGuider, degraded, install_guider

FAMILIES = (*REQUIRED, "wan", "qwen")
SEQUENTIAL = ("flux", "qwen", "wan")  # one call a branch; the others batch both
CFG = ClassifierFreeGuidance(3.0)
LABELS = torch.tensor([3, 7])
STEPS = 3


def ten_logits(images: Tensor) -> Tensor:
    return 5 * images.flatten(1)[:, :10]


def one_of_two(images: Tensor) -> Tensor:
    return 5 * images.flatten(1)[:, :2]


@dataclass(frozen=True)
class Case:
    """A rule, the same rule doing nothing, and the network calls it adds to a pipeline's own.

    ``extra``: where the pipeline batches both branches, and where it does not; at steps whose flow
    sigma is greater than ``above``. ``images``: it needs rows and columns; packed tokens have none.
    """

    on: Any
    off: Any
    extra: tuple[int, int] = (0, 0)
    above: float = 0.0
    images: bool = False


def unchanged(latents: Tensor) -> Tensor:
    return latents


def elucd(**settings: Any) -> CalibratedClassifierGuidance:
    given = {"scale": 0.5, "labels": LABELS, "decode": unchanged, **settings}
    return CalibratedClassifierGuidance(ten_logits, **given)


CASES: dict[str, Case] = {
    "ClassifierFreeGuidance": Case(CFG, ClassifierFreeGuidance(1.0)),
    "AdaptiveProjectedGuidance": Case(
        AdaptiveProjectedGuidance(6.0), AdaptiveProjectedGuidance(1.0)
    ),
    "GuidanceInterval": Case(
        GuidanceInterval(AdaptiveProjectedGuidance(6.0), 0.05),
        GuidanceInterval(ClassifierFreeGuidance(1.0), 0.05),
    ),
    "ClassifierFreeZeroStarGuidance": Case(
        ClassifierFreeZeroStarGuidance(3.0), ClassifierFreeZeroStarGuidance(1.0, 0)
    ),
    "FrequencyDecoupledGuidance": Case(
        FrequencyDecoupledGuidance(6.0, 2.0), FrequencyDecoupledGuidance(1.0, 1.0), images=True
    ),
    "RescaledGuidance": Case(
        RescaledGuidance(AdaptiveProjectedGuidance(6.0)),
        RescaledGuidance(ClassifierFreeGuidance(1.0)),
    ),
    "DegradedPassGuidance": Case(
        DegradedPassGuidance(CFG, 2.0, start=0, stop=1),
        DegradedPassGuidance(ClassifierFreeGuidance(1.0), 0.0),
        (1, 1),
    ),
    "AutoGuidance": Case(AutoGuidance(2.5), AutoGuidance(1.0), (1, 1)),
    "GradientFreeClassifierGuidance": Case(
        GradientFreeClassifierGuidance(
            one_of_two, 3.0, decode=unchanged, labels=LABELS, mode="const"
        ),
        GradientFreeClassifierGuidance(one_of_two, 0.0, decode=unchanged, labels=LABELS),
        (1, 1),
    ),
    "CalibratedClassifierGuidance": Case(elucd(rule=CFG), elucd(scale=0.0)),
    "ManifoldProjectedGuidance": Case(
        ManifoldProjectedGuidance(CFG, iterations=2, above=0.5),
        ManifoldProjectedGuidance(ClassifierFreeGuidance(1.0), iterations=0),
        # K iterations of two branches, one known, and the pair at the moved sample.
        (2 * 2 - 1 + 1, 2 * 2 - 1 + 2),
        above=0.5,
    ),
}
PACKED = ("flux", "qwen")
PAIRS = [
    (rule, family)
    for rule, case in CASES.items()
    for family in FAMILIES
    if not (case.images and family in PACKED)
]
MATRIX = pytest.mark.parametrize("rule", CASES)
EVERYWHERE = pytest.mark.parametrize("rule, family", PAIRS)


@cache
def shared(family: str, dtype: torch.dtype = torch.float32) -> Tiny:
    return build(family, dtype)


@cache
def weak_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    tiny = shared(family, dtype)
    module = getattr(tiny.pipe, tiny.denoisers[0])
    layer = "mid_block" if tiny.denoisers[0] == "unet" else 0
    return degraded(module, skip=[layer])


def rows_of(value: Any, rows: Sequence[int]) -> Any:
    """Those rows of a list or tensor with one row an image."""
    if isinstance(value, Tensor) and value.ndim and len(value) == 2:
        return value[list(rows)]
    return [value[i] for i in rows] if isinstance(value, list) and len(value) == 2 else value


def run(
    family: str,
    rule: Guidance,
    rows: Sequence[int] = (0, 1),
    dtype: torch.dtype = torch.float32,
    **call: Any,
) -> tuple[Tensor, Any]:
    """The images of these rows; each has noise of its own, whatever rows are made with it."""
    tiny = shared(family, dtype)
    given: Any = (
        {"order": "cu", "sign": 1} if family == "qwen" else {}
    )  # it renormalises: not measured
    inputs = {name: rows_of(value, rows) for name, value in tiny.inputs().items()}
    inputs["generator"] = [torch.Generator().manual_seed(row) for row in rows]
    if getattr(rule, "labels", None) is not None:
        rule = replace(rule, labels=rows_of(rule.labels, rows))
    with steer(tiny.pipe, rule, weak=weak_of(family, dtype), **given) as block:
        return tiny.call(num_inference_steps=STEPS, **{**inputs, **call}), block


@cache
def guided(family: str, rule: str) -> tuple[Tensor, Any]:
    return run(family, prepared(family, CASES[rule].on))


@cache
def plain(family: str, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return run(family, ClassifierFreeGuidance(scale), dtype=dtype)[0]


@cache
def conditions(family: str) -> Any:
    """What makes the family's model conditional on one of two prompts, from its own calls."""
    tables: dict[str, Tensor] = {}

    class Look:
        commutes = True

        def __call__(self, step: Any) -> Tensor:
            for name in ("encoder_hidden_states", "pooled_projections"):
                with suppress(MissingPrediction):
                    tables[name] = step.argument(name).clone()
            return step.cond

    run(family, Look())
    return tables


def prepared(family: str, rule: Any) -> Any:
    """GFCG needs to know what makes this model conditional."""
    if not isinstance(rule, GradientFreeClassifierGuidance):
        return rule
    if family == "dit":  # of whose classes the classifier knows ten
        return replace(rule, classifier=ten_logits, labels=None, label_map=torch.arange(10))
    return replace(rule, condition=conditions(family), labels=torch.tensor([0, 1]))


def test_every_rule_is_in_the_matrix() -> None:
    assert CASES.keys() == rules().keys()


@EVERYWHERE
def test_guides_and_costs_its_price(family: str, rule: str) -> None:
    latents, block = guided(family, rule)
    assert torch.isfinite(latents).all() and not latents.requires_grad
    base = plain(family, 3.0 if rule in ("CalibratedClassifierGuidance",) else 1.0)
    assert not torch.allclose(latents, base, rtol=1e-3)
    own = 2 if family in SEQUENTIAL else 1
    extra, above = CASES[rule].extra[family in SEQUENTIAL], CASES[rule].above
    for record in block.steps:
        flow_sigma = 1 / (1 + 1 / record.ratio)
        assert record.evaluations == own + (extra if flow_sigma > above else 0)
    assert block.evaluations == sum(record.evaluations for record in block.steps)


@EVERYWHERE
def test_off_is_the_conditional_prediction_to_the_bit(family: str, rule: str) -> None:
    latents, block = run(family, prepared(family, CASES[rule].off))
    assert torch.equal(latents, plain(family, 1.0))
    own = 2 if family in SEQUENTIAL else 1
    assert {record.evaluations for record in block.steps} == {own}


@EVERYWHERE
def test_the_same_in_inference_mode(family: str, rule: str) -> None:
    with torch.inference_mode():
        again, _ = run(family, prepared(family, CASES[rule].on))
    assert torch.equal(again.clone(), guided(family, rule)[0])


@EVERYWHERE
def test_no_image_looks_at_another(family: str, rule: str) -> None:
    """Whatever its neighbour is, and on whichever side."""
    whole, chosen = guided(family, rule)[0], prepared(family, CASES[rule].on)
    close = {"rtol": 1e-4, "atol": 1e-4 * float(whole.abs().max())}
    torch.testing.assert_close(run(family, chosen, rows=(1, 0))[0], whole.flip(0), **close)
    torch.testing.assert_close(run(family, chosen, rows=(1, 1))[0][1], whole[1], **close)


@EVERYWHERE
def test_half_precision_stays_so(family: str, rule: str) -> None:
    latents, block = run(family, prepared(family, CASES[rule].on), dtype=torch.bfloat16)
    assert torch.isfinite(latents).all() and all(record.guided for record in block.steps)
    assert latents.dtype == plain(family, 1.0, torch.bfloat16).dtype  # that of the pipeline itself
    assert shared(family, torch.bfloat16).pipe.dtype == torch.bfloat16


@pytest.mark.parametrize("family", PACKED)
def test_packed_tokens_have_no_frequencies(family: str) -> None:
    with pytest.raises(ValueError, match=r"need rows and columns.*packed tokens \(Flux"):
        run(family, CASES["FrequencyDecoupledGuidance"].on)


@MATRIX
@pytest.mark.parametrize("family", ["dit", "flux"])
def test_without_guidance_only_those_run_that_say_so(family: str, rule: str) -> None:
    chosen = prepared(family, CASES[rule].on)
    off = {shared(family).guidance_argument: 1.0}
    if not needs_uncond(chosen):
        latents, block = run(family, chosen, **off)
        assert torch.allclose(latents, run(family, chosen)[0], rtol=1e-3, atol=1e-4)
        assert all(record.guided for record in block.steps)
    else:
        with pytest.raises(MissingPrediction, match="distilled"):
            run(family, chosen, **off)


@MATRIX
@pytest.mark.parametrize("family", ["modular-sd3", "modular-z-image"])
def test_as_a_guider_component(family: str, rule: str) -> None:
    chosen = CASES[rule].on
    if rule == "ManifoldProjectedGuidance":
        with pytest.raises(ValueError, match=r"use steer\(pipe, rule\)"):
            RuleGuider(chosen)
        return
    tiny = shared(family)
    weak = degraded(tiny.pipe.transformer, skip=[0])
    if rule in ("AutoGuidance", "DegradedPassGuidance"):
        chosen = replace(chosen, model=weak)
    if rule == "GradientFreeClassifierGuidance":
        if family == "modular-z-image":
            pytest.skip("its conditions are lists of any length: no table of them")
        chosen = replace(chosen, condition=conditions(family), labels=torch.tensor([0, 1]))
    with steer(tiny.pipe, chosen) as block:
        steered = tiny.call(num_inference_steps=STEPS)
    guided = build_with(family, chosen).call(num_inference_steps=STEPS)
    assert block.evaluations and torch.allclose(guided, steered, rtol=1e-4, atol=1e-4)


def build_with(family: str, rule: Guidance) -> Tiny:
    tiny = build(family)
    install_guider(tiny.pipe, RuleGuider(rule))
    return tiny
