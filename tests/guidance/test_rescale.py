"""Guidance rescale: diffusers' formula, in the space of the outputs whatever is inside."""

from __future__ import annotations

import pytest
import torch
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance as Guider
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor

from diffsteer.core import Kind, Level, Step, to_denoised
from diffsteer.guidance import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    GuidanceInterval,
    ManifoldProjectedGuidance,
    RescaledGuidance,
    classifier_free,
    rescaled,
)

CFG = ClassifierFreeGuidance(5.0)
LEVELS = {"flow": Level.flow(0.7), "ve": Level.ve(3.0), "vp": Level.vp(0.3)}
KINDS = (Kind.NOISE, Kind.V, Kind.VELOCITY, Kind.DENOISED, Kind.edm(0.5))


def three(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A sample and two raw outputs that have something in common."""
    draw = torch.Generator().manual_seed(seed)
    x, cond, other = torch.randn(3, 4, 3, 8, 8, generator=draw, dtype=torch.float64)
    return x, cond, 0.6 * cond + 0.5 * other + 0.3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_is_the_function_of_diffusers(rescale: float, dtype: torch.dtype) -> None:
    _, cond, uncond = (t.to(dtype) for t in three())
    guided = classifier_free(cond, uncond, 7.5)
    ours, theirs = rescaled(guided, cond, rescale), rescale_noise_cfg(guided, cond, rescale)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs)


def test_is_the_guider_of_diffusers() -> None:
    _, cond, uncond = three()
    guider = Guider(guidance_scale=7.5, guidance_rescale=0.7)
    guider.set_state(0, 10, torch.tensor(999))
    step = Step(cond, Level.flow(0.5), 0, 10, 0.5, cond, uncond)
    ours = RescaledGuidance(ClassifierFreeGuidance(7.5), 0.7)(step)
    torch.testing.assert_close(ours, guider(_batches(cond, uncond)).pred)


def _batches(cond: Tensor, uncond: Tensor) -> list[object]:
    class Batch:
        def __init__(self, name: str, value: Tensor) -> None:
            self.noise_pred = value
            setattr(self, Guider._identifier_key, name)

    return [Batch("pred_cond", cond), Batch("pred_uncond", uncond)]


def test_a_whole_rescale_gives_the_spread_of_the_condition() -> None:
    _, cond, uncond = three()
    guided = rescaled(classifier_free(cond, uncond, 7.5), cond, 1.0)
    torch.testing.assert_close(guided.flatten(1).std(1), cond.flatten(1).std(1))


def test_each_sample_has_its_own() -> None:
    _, cond, uncond = three()
    cond[1] *= 10
    guided = classifier_free(cond, uncond, 7.5)
    rows = [rescaled(guided[i : i + 1], cond[i : i + 1], 0.7) for i in range(len(cond))]
    torch.testing.assert_close(rescaled(guided, cond, 0.7), torch.cat(rows))


def test_what_has_no_spread_is_left_alone() -> None:
    constant = torch.full((2, 3), 4.0)
    assert torch.equal(rescaled(constant, torch.randn(2, 3), 0.7), constant)
    single = torch.randn(5)  # one number a sample
    assert torch.equal(rescaled(single, torch.randn(5), 1.0), single)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_spread_is_that_of_the_outputs_in_every_space(kind: Kind, level: str) -> None:
    """Handed denoised predictions, it does what it does to the outputs that they were made of."""
    x, cond, uncond = three()
    raw = RescaledGuidance(CFG)(Step(x, LEVELS[level], 0, 9, 0.5, cond, uncond))
    given = (to_denoised(output, kind, x, LEVELS[level]) for output in (cond, uncond))
    step = Step(x, LEVELS[level], 0, 9, 0.5, *given, output_kind=kind)
    denoised = RescaledGuidance(CFG)(step)
    torch.testing.assert_close(denoised, to_denoised(raw, kind, x, LEVELS[level]))
    other = RescaledGuidance(CFG, space="denoised")(step)
    assert torch.allclose(denoised, other) is (kind == Kind.DENOISED)


def test_a_denoised_rule_inside_is_rescaled_as_an_output() -> None:
    x, cond, uncond = three()
    apg, level, kind = AdaptiveProjectedGuidance(9.0), LEVELS["flow"], Kind.VELOCITY
    step = Step(x, level, 0, 9, 0.5, cond, uncond, output_kind=kind)
    guided = RescaledGuidance(apg, 1.0)(step)
    sigma = level.sigma
    outputs = [(x - denoised) / sigma for denoised in (guided, cond, apg(step))]
    spread, wanted, before = (output.flatten(1).std(1) for output in outputs)
    torch.testing.assert_close(spread, wanted)
    assert not torch.allclose(before, wanted)


def test_who_is_handed_what() -> None:
    assert RescaledGuidance(CFG).commutes
    assert not RescaledGuidance(CFG, space="denoised").commutes
    assert not RescaledGuidance(AdaptiveProjectedGuidance(3.0)).commutes
    assert RescaledGuidance(GuidanceInterval(CFG, 0.5)).commutes
    assert not RescaledGuidance(ClassifierFreeGuidance(1.0)).needs_uncond


def test_where_the_rule_does_nothing_it_does_nothing() -> None:
    x, cond, uncond = three()
    step = Step(x, Level.ve(9.0), 0, 9, 0.5, cond, uncond)
    assert RescaledGuidance(GuidanceInterval(CFG, 0.3, 3.0))(step) is cond
    assert torch.equal(RescaledGuidance(CFG, 0.0)(step), CFG(step))


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"outermost: ManifoldProjectedGuidance\(RescaledGuidance"):
        RescaledGuidance(ManifoldProjectedGuidance(CFG))
    with pytest.raises(ValueError, match=r"rescale must be in \[0, 1\], got 7.5; 0 is off"):
        RescaledGuidance(CFG, 7.5)
    with pytest.raises(ValueError, match="space must be one of 'output', 'denoised'"):
        RescaledGuidance(CFG, space="latent")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got the class ClassifierFreeGuidance itself"):
        RescaledGuidance(ClassifierFreeGuidance)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="same shape"):
        rescaled(torch.zeros(2, 3), torch.zeros(2, 1), 0.5)
