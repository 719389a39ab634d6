"""Skip-layer and perturbed-attention guidance: the formula of diffusers' guiders, the window."""

from __future__ import annotations

import pytest
import torch
from diffusers.guiders import PerturbedAttentionGuidance, SkipLayerGuidance
from torch import Tensor

from diffsteer.core import Kind, Level, MissingPrediction, Step, from_denoised, to_denoised
from diffsteer.guidance import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    DegradedPassGuidance,
    GuidanceInterval,
    LinearScale,
    ManifoldProjectedGuidance,
    away_from_degraded,
)

CFG = ClassifierFreeGuidance(4.0)
OPEN = {"start": 0.0, "stop": 1.0}


def outputs(count: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return list(torch.randn(count, 2, 3, 4, 4, generator=draw, dtype=torch.float64))


def step_of(
    index: int, count: int, predictions: list[Tensor], level: Level | None = None
) -> tuple[Step, list[object]]:
    """A step whose weak model notes that it was asked."""
    cond, uncond, degraded = predictions
    asked: list[object] = []

    def weak(model: object, branch: str = "cond", **_: object) -> Tensor:
        asked.append(model)
        return degraded

    at = level or Level.flow(0.5)
    return Step(cond, at, index, count, 0.5, cond, uncond, evaluate_weak=weak), asked


GUIDERS = {
    "skip": lambda start, stop: SkipLayerGuidance(
        4.0, 2.8, start, stop, skip_layer_guidance_layers=[0]
    ),
    "perturb": lambda start, stop: PerturbedAttentionGuidance(
        4.0, 2.8, start, stop, perturbed_guidance_layers=[0]
    ),
}


@pytest.mark.parametrize("start, stop", [(0.1, 0.5), (0.25, 1.0)])
@pytest.mark.parametrize("guider", GUIDERS)
def test_is_the_guider_of_diffusers(guider: str, start: float, stop: float) -> None:
    count, theirs = 20, GUIDERS[guider](start, stop)
    # The guider leaves out the step at ``start`` where the steps divide evenly.
    rule = DegradedPassGuidance(CFG, 2.8, start + 1e-3, stop)
    for index in range(count):
        step, asked = step_of(index, count, outputs())
        theirs.set_state(index, count, torch.tensor(500))
        on = theirs._is_slg_enabled()
        expected = theirs.forward(*outputs()[:2], outputs()[2] if on else None).pred
        torch.testing.assert_close(rule(step), expected)
        assert bool(asked) is on, "outside the window the pass is not even made"


def test_the_same_in_every_parameterization() -> None:
    x, *raw = outputs(4)
    level = Level.flow(0.6)
    rule = DegradedPassGuidance(CFG, 2.0, **OPEN)
    guided = rule(step_of(1, 9, raw, level)[0])
    denoised = [to_denoised(output, Kind.VELOCITY, x, level) for output in raw]
    through = rule(step_of(1, 9, denoised, level)[0])
    torch.testing.assert_close(from_denoised(through, Kind.VELOCITY, x, level), guided)
    assert rule.commutes
    assert not DegradedPassGuidance(AdaptiveProjectedGuidance(3.0)).commutes


def test_beside_no_guidance_it_is_autoguidance() -> None:
    """``cond + s (cond - weak)`` is autoguidance at scale 1 + s."""
    alone = DegradedPassGuidance(ClassifierFreeGuidance(1.0), 1.5, **OPEN)
    step, _ = step_of(1, 9, outputs())
    torch.testing.assert_close(alone(step), AutoGuidance(2.5)(step))
    assert not alone.needs_uncond and DegradedPassGuidance(CFG).needs_uncond


def test_scales_that_change_and_the_pass_of_the_rule_itself() -> None:
    ramp = DegradedPassGuidance(CFG, LinearScale(0.0, 4.0), **OPEN, model=len)
    first, unasked = step_of(0, 5, outputs())
    assert torch.equal(ramp(first), CFG(first)) and not unasked
    middle, asked = step_of(2, 5, outputs())
    expected = away_from_degraded(CFG(middle), middle.cond, outputs()[2], 2.0)
    assert torch.equal(ramp(middle), expected) and asked == [len]


def test_a_window_of_noise_levels() -> None:
    """``outside`` keeps the rule beside running where the push is off."""
    pushed = DegradedPassGuidance(CFG, 2.0, **OPEN)
    rule = GuidanceInterval.flow(pushed, 0.5, 0.9, outside=CFG)
    for sigma, on in ((0.95, False), (0.7, True), (0.3, False)):
        step, asked = step_of(1, 9, outputs(), Level.flow(sigma))
        assert torch.equal(rule(step), (pushed if on else CFG)(step))
        assert len(asked) == 2 * on


def test_momentum_of_the_rule_beside_goes_on() -> None:
    apg = AdaptiveProjectedGuidance(4.0, momentum=-0.5)
    rule, memory = DegradedPassGuidance(apg, 2.0, start=0.0, stop=0.5), {}
    alone: dict[object, object] = {}
    for index in range(4):
        step, _ = step_of(index, 4, [t * (index + 1) for t in outputs()])
        step.memory, plain = memory, step_of(index, 4, [t * (index + 1) for t in outputs()])[0]
        plain.memory = alone
        push = 2.0 * (step.cond - outputs()[2] * (index + 1)) if index < 2 else 0
        torch.testing.assert_close(rule(step), apg(plain) + push)


def test_what_it_refuses() -> None:
    step, _ = step_of(0, 4, outputs())
    with pytest.raises(
        ValueError, match=r"none of the 4 steps lies between start=0.01 and stop=0.2"
    ):
        DegradedPassGuidance(CFG)(step)
    with pytest.raises(MissingPrediction, match=r"no weak model.*weak="):
        cond, uncond, _ = outputs()
        DegradedPassGuidance(CFG, **OPEN)(Step(cond, Level.flow(0.5), 0, 4, 0.5, cond, uncond))
    with pytest.raises(ValueError, match=r"start must be less than stop, got start=0\.5"):
        DegradedPassGuidance(CFG, start=0.5, stop=0.5)
    with pytest.raises(ValueError, match=r"stop must be in \[0, 1\], got 28"):
        DegradedPassGuidance(CFG, stop=28)
    with pytest.raises(TypeError, match="model must be called like the denoiser"):
        DegradedPassGuidance(CFG, model="skip:1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"outermost: ManifoldProjectedGuidance\(DegradedPass"):
        DegradedPassGuidance(ManifoldProjectedGuidance(CFG))
