"""Autoguidance: the formula, its composition with other rules, what it evaluates."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffsteer.core import (
    GaussianMixture,
    GuidedDenoiser,
    Kind,
    Level,
    MissingPrediction,
    Step,
    from_denoised,
    seeded_noise,
    to_denoised,
)
from diffsteer.guidance import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    GuidanceInterval,
    LinearScale,
    ManifoldProjectedGuidance,
    adaptive_projected,
    classifier_free,
)
from diffsteer.guidance.cfgmp import manifold_operator
from diffsteer.samplers import heun_step, integrate, karras_sigmas

DATA = GaussianMixture.random(2, shape=(4, 4), generator=torch.Generator().manual_seed(0))
COND = DATA.denoiser(1)
X, SIGMA = torch.randn(3, 4, 4, dtype=torch.float64), torch.tensor(0.8)


def weak(x: Tensor, sigma: Tensor) -> Tensor:
    return 0.9 * COND(x, sigma) + 0.1


def guided(rule: AutoGuidance | GuidanceInterval, **more: object) -> GuidedDenoiser:
    return GuidedDenoiser(rule, COND, **more)  # type: ignore[arg-type]


def test_extrapolates_from_the_weak_model() -> None:
    expected = classifier_free(COND(X, SIGMA), weak(X, SIGMA), 2.5)
    denoise = guided(AutoGuidance(2.5), weak=weak)
    assert torch.equal(denoise(X, SIGMA), expected)
    assert denoise.evaluations == 2  # no unconditional one
    assert torch.equal(guided(AutoGuidance(2.5, model=weak))(X, SIGMA), expected)


def test_scale_one_spares_the_weak_model() -> None:
    denoise = guided(AutoGuidance(LinearScale(1.0, 3.0)), count=5)
    assert torch.equal(denoise(X, SIGMA), COND(X, SIGMA)) and denoise.evaluations == 1


def test_outside_an_interval_too() -> None:
    denoise = guided(GuidanceInterval(AutoGuidance(2.0), 1.0), weak=weak)
    assert torch.equal(denoise(X, SIGMA), COND(X, SIGMA)) and denoise.evaluations == 1


def test_takes_the_projection_and_clipping_of_apg() -> None:
    rule = AutoGuidance(rule=AdaptiveProjectedGuidance(3.0, radius=0.2, momentum=0.0))
    expected, _ = adaptive_projected(COND(X, SIGMA), weak(X, SIGMA), 3.0, radius=0.2)
    assert torch.equal(guided(rule, weak=weak)(X, SIGMA), expected)
    assert not rule.commutes and AutoGuidance(3.0).commutes


def test_a_rule_that_moves_the_sample_moves_to_where_both_models_agree() -> None:
    """The weak model stands in the place of the unconditional one wherever it is asked."""
    rule = AutoGuidance(
        rule=ManifoldProjectedGuidance(ClassifierFreeGuidance(3.0), iterations=1, above=0.0)
    )
    denoise = guided(rule, weak=weak, level=Level.flow)
    denoise.begin_step(next_sigma=torch.tensor(0.6))
    found = denoise(X, SIGMA)

    def towards(model: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: (model(x, SIGMA) - x) / SIGMA

    moved = manifold_operator(towards(weak), towards(COND), X, 0.5 * (0.8 - 0.6))
    assert denoise.moved is not None and not torch.allclose(moved, X)
    torch.testing.assert_close(denoise.moved, moved, rtol=1e-6, atol=1e-6)
    expected = classifier_free(COND(moved, SIGMA), weak(moved, SIGMA), 3.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_momentum_lives_over_the_trajectory() -> None:
    rule = AutoGuidance(rule=AdaptiveProjectedGuidance(3.0, radius=math.inf))
    denoise = guided(rule, weak=weak)
    found = []
    for _ in range(2):
        denoise.begin_step()
        found.append(denoise(X, SIGMA))
    assert not torch.allclose(found[0], found[1])


def test_a_better_model_of_itself() -> None:
    """What it is for: the model spreads normal data too far, and the weak one further still."""

    def blurred(spread: float) -> GaussianMixture:
        return GaussianMixture(torch.zeros(1, 2).double(), torch.tensor([spread]).double())

    model, bad = blurred(1.2).denoiser(), blurred(1.4).denoiser()
    start = 80.0 * seeded_noise(range(2000), (2,), dtype=torch.float64)
    plain, better = (
        integrate(GuidedDenoiser(rule, model, weak=bad), start, karras_sigmas(16), heun_step)
        for rule in (None, AutoGuidance(2.0))
    )
    assert 0 < abs(better.std() - 1) < 0.5 * abs(plain.std() - 1)


def test_without_a_weak_model_it_says_how_to_give_one() -> None:
    with pytest.raises(MissingPrediction, match="no weak model; pass weak="):
        guided(AutoGuidance(2.0))(X, SIGMA)


def test_works_in_any_parameterization() -> None:
    """Raw outputs of both models, as an adapter hands them to rules that commute."""
    level = Level.flow(0.5)
    cond, other = COND(X, SIGMA), weak(X, SIGMA)
    raw = [from_denoised(p, Kind.VELOCITY, X, level) for p in (cond, other)]
    step = Step(X, level, 0, 1, 0.5, raw[0], evaluate_weak=lambda model, branch: raw[1])
    through = to_denoised(AutoGuidance(2.0)(step), Kind.VELOCITY, X, level)
    torch.testing.assert_close(through, classifier_free(cond, other, 2.0))


@pytest.mark.parametrize(
    "settings, error, text",
    [
        ({"scale": 3.0, "rule": ClassifierFreeGuidance(2.0)}, ValueError, "exactly one of scale"),
        ({"scale": None}, ValueError, "exactly one of scale"),
        ({"scale": math.nan}, ValueError, "scale must be a finite number"),
        ({"scale": "2"}, TypeError, "scale must be a number"),
        ({"rule": "cfg"}, TypeError, "rule must be a guidance method"),
        ({"model": "weak.safetensors"}, TypeError, "model must be called like the denoiser"),
        ({"model": GaussianMixture}, TypeError, "model must be called like the denoiser"),
    ],
)
def test_bad_settings_say_what_to_do(
    settings: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        AutoGuidance(**settings)  # type: ignore[arg-type]
