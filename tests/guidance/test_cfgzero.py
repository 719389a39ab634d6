"""CFG-Zero*: the best factor of the unconditional velocity, and steps of zero velocity."""

from __future__ import annotations

import pytest
import torch
from diffusers.guiders import ClassifierFreeZeroStarGuidance as Guider
from torch import Tensor

from diffsteer.core import (
    GaussianMixture,
    GuidedDenoiser,
    Kind,
    Level,
    MissingPrediction,
    Step,
    from_denoised,
    sample_dot,
    to_denoised,
)
from diffsteer.guidance import (
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    LinearScale,
    optimised_scale,
    zero_star,
)
from diffsteer.samplers import euler_step, flow_sigmas, integrate


def three(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x, cond, other = torch.randn(3, 4, 3, 8, 8, generator=draw, dtype=torch.float64)
    return x, cond, 0.6 * cond + 0.5 * other


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_is_the_guider_of_diffusers_on_velocities(scale: float, steps: int) -> None:
    guider = Guider(guidance_scale=scale, zero_init_steps=steps)
    rule = ClassifierFreeZeroStarGuidance(scale, steps)
    for index, sigma in enumerate((1.0, 0.7, 0.4, 0.1)):
        x, cond, uncond = three(index)
        guider.set_state(index, 4, torch.tensor(1000 * sigma))
        theirs = guider.forward(cond, uncond).pred
        level = Level.flow(sigma)
        pair = [to_denoised(output, Kind.VELOCITY, x, level) for output in (cond, uncond)]
        guided = rule(Step(x, level, index, 4, sigma, *pair))
        ours = from_denoised(guided, Kind.VELOCITY, x, level)
        # The guider's factor is of float32 whatever it is given.
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_factor_is_the_best_and_the_push_orthogonal() -> None:
    _, cond, uncond = three()
    best = optimised_scale(cond, uncond)
    for other in (best * 0.99, best * 1.01):
        errors = [
            (cond - s.view(-1, 1, 1, 1) * uncond).flatten(1).norm(dim=1) for s in (best, other)
        ]
        assert (errors[0] < errors[1]).all()
    push = zero_star(cond, uncond, 5.0) - cond
    zero = torch.zeros(len(cond), dtype=cond.dtype)
    torch.testing.assert_close(sample_dot(push, uncond), zero, atol=1e-9, rtol=0)


def test_a_factor_of_the_unconditional_velocity_does_not_matter() -> None:
    _, cond, uncond = three()
    torch.testing.assert_close(zero_star(cond, 3 * uncond, 5.0), zero_star(cond, uncond, 5.0))
    assert torch.equal(zero_star(cond, 0 * uncond, 5.0), cond + 4.0 * cond)
    assert torch.equal(zero_star(cond, uncond, 1.0), cond)


@pytest.mark.parametrize("level", [Level.ve(3.0), Level.vp(0.3)], ids=["ve", "vp"])
def test_one_method_for_every_model(level: Level) -> None:
    """The same sample on the straight path, the same denoised predictions: the same result."""
    x, cond, uncond = three()
    alpha, sigma = level.alpha, level.sigma
    flow, total = Level.flow(sigma / (alpha + sigma)), alpha + sigma
    for index in (0, 1):
        rule = ClassifierFreeZeroStarGuidance(5.0, zero_init_steps=1)
        here = rule(Step(x, level, index, 9, 0.5, cond, uncond))
        there = rule(Step(x / total, flow, index, 9, 0.5, cond, uncond))
        torch.testing.assert_close(here, there)


def test_steps_of_zero_leave_the_sample_where_it_is() -> None:
    data = GaussianMixture.ring(4)
    rule, seen = ClassifierFreeZeroStarGuidance(2.0, zero_init_steps=2), []

    def watched(x: Tensor, sigma: Tensor, **_: object) -> Tensor:
        seen.append(x.clone())
        return data.denoise(x, Level.flow(sigma))

    model = GuidedDenoiser(rule, watched, watched, level=Level.flow)
    start = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    integrate(model, start, flow_sigmas(6), euler_step)
    visited = seen[::2]  # both branches at each
    torch.testing.assert_close(visited[2], start)
    assert not torch.allclose(visited[3], start)


def test_a_schedule_and_when_the_unconditional_prediction_is_needed() -> None:
    x, cond, uncond = three()
    ramp = ClassifierFreeZeroStarGuidance(LinearScale(1.0, 5.0), 0)
    constant = ClassifierFreeZeroStarGuidance(5.0, 0)
    first, last = (Step(x, Level.flow(0.5), index, 5, 0.5, cond, uncond) for index in (0, 4))
    assert ramp(first) is cond and torch.equal(ramp(last), constant(last))
    assert ramp.needs_uncond and not ClassifierFreeZeroStarGuidance(1.0).needs_uncond
    with pytest.raises(MissingPrediction, match="ClassifierFreeZeroStarGuidance needs the uncond"):
        ClassifierFreeZeroStarGuidance(5.0)(Step(x, Level.flow(1.0), 0, 5, 0.5, cond))


def test_it_differs_from_plain_guidance_by_the_factor_alone() -> None:
    """Where the velocities are of equal length along one another, the factor is 1."""
    x, cond, _ = three()
    turned = cond.roll(1, -1)
    along = sample_dot(cond, turned) / sample_dot(cond, cond)
    uncond = turned + (1 - along).view(-1, 1, 1, 1) * cond  # <cond, uncond> = <cond, cond>
    scaled = uncond * (sample_dot(cond, uncond) / sample_dot(uncond, uncond)).view(-1, 1, 1, 1)
    plain = ClassifierFreeGuidance(5.0)(Step(x, Level.flow(0.5), 0, 5, 0.5, cond, scaled))
    torch.testing.assert_close(zero_star(cond, uncond, 5.0), plain)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"zero_init_steps must be a whole number, got 0.04"):
        ClassifierFreeZeroStarGuidance(5.0, 0.04)  # type: ignore[arg-type]
    x, cond, uncond = three()
    with pytest.raises(ValueError, match="zero_init_steps=4 of 4 steps: nothing would be sampled"):
        ClassifierFreeZeroStarGuidance(5.0, 4)(Step(x, Level.flow(1.0), 0, 4, 1, cond, uncond))
