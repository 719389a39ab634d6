"""Flow matching against closed forms, and against Gaussians whose denoiser is known."""

from __future__ import annotations

import math

import pytest
import torch

from diffsteer.core import Kind, Level, from_denoised
from diffsteer.training import FlowMatching, velocity_loss
from diffsteer.training.flow import TIMESTEPS, logit_normal


def inputs(batch: int = 6):
    generator = torch.Generator().manual_seed(3)
    clean, noise = (torch.randn(batch, 3, 4, 4, generator=generator) for _ in "ab")
    sigma = torch.linspace(0.2, 0.9, batch)
    return clean, noise, Level(1 - sigma, sigma), torch.arange(batch)


def test_the_network_sees_the_straight_path_and_a_thousand_sigma():
    clean, noise, level, labels = inputs()
    seen = []

    def network(*arguments):
        seen.append(arguments)
        return torch.zeros_like(clean)

    velocity_loss(network, clean, noise, level, labels)
    x, timestep, given = seen[0]
    sigma = level.sigma[:, None, None, None]
    assert torch.equal(x, (1 - sigma) * clean + sigma * noise)
    assert torch.equal(timestep, 1000 * level.sigma)
    assert torch.equal(given, labels)


def test_timestep_is_what_the_stock_scheduler_gives_a_pipeline():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(7)
    assert torch.allclose(scheduler.timesteps, TIMESTEPS * scheduler.sigmas[:-1])


def test_a_network_that_says_zero_has_the_mean_square_of_the_velocity():
    clean, noise, level, labels = inputs()
    loss = velocity_loss(lambda x, *_: torch.zeros_like(x), clean, noise, level, labels)
    assert torch.allclose(loss, (noise - clean).pow(2).mean((1, 2, 3)))


def test_both_predictions_of_one_image_have_one_loss():
    clean, noise, level, labels = inputs()
    guess = torch.tanh(clean + 0.3)
    loss = {}
    for kind in (Kind.DENOISED, Kind.VELOCITY):
        loss[kind.name] = velocity_loss(
            lambda x, *_, kind=kind: from_denoised(guess, kind, x, level),
            *(clean, noise, level, labels),
            prediction=kind.name,
        )
    assert torch.allclose(loss["denoised"], loss["velocity"], rtol=1e-4)


def test_the_image_error_is_divided_by_no_less_than_the_floor():
    clean, noise, _, labels = inputs(2)
    sigma = torch.tensor([0.01, 0.5])
    loss = velocity_loss(
        lambda x, *_: clean + 0.3,
        *(clean, noise, Level(1 - sigma, sigma), labels),
        prediction="denoised",
        sigma_floor=0.1,
    )
    assert torch.allclose(loss, torch.tensor([(0.3 / 0.1) ** 2, (0.3 / 0.5) ** 2]))


@pytest.mark.parametrize("prediction", ["velocity", "denoised"])
def test_the_exact_denoiser_has_the_least_loss_and_it_is_the_known_one(prediction):
    """For data N(0, s^2): E|v - E[v|x]|^2 = s^2 / (alpha^2 s^2 + sigma^2) for each dimension."""
    spread, sigma = 0.5, torch.full((4000,), 0.6)
    generator = torch.Generator().manual_seed(0)
    clean = spread * torch.randn(4000, 8, generator=generator)
    noise = torch.randn(4000, 8, generator=generator)
    level, kind = Level.flow(sigma), Kind(prediction)

    def loss(error):
        def network(x, timestep, labels):
            variance = 0.4**2 * spread**2 + 0.6**2
            best = 0.4 * spread**2 / variance * x
            return from_denoised(best + error, kind, x, level)

        labels = torch.zeros(4000, dtype=torch.long)
        return velocity_loss(network, clean, noise, level, labels, prediction=prediction).mean()

    known = spread**2 / (0.4**2 * spread**2 + 0.6**2)
    assert loss(0.0).item() == pytest.approx(known, rel=0.02)
    for error in (0.05, -0.05):
        assert loss(error).item() == pytest.approx(known + (0.05 / 0.6) ** 2, rel=0.02)


def test_levels_are_logit_normal_and_one_a_sample():
    objective = FlowMatching(mean=0.4, std=0.8)
    noise, level = objective.draw((20000, 1, 1, 1), torch.Generator().manual_seed(0))
    logit = torch.logit(level.sigma)
    assert noise.shape == (20000, 1, 1, 1) and level.sigma.shape == (20000,)
    assert logit.mean().item() == pytest.approx(0.4, abs=4 * 0.8 / math.sqrt(20000))
    assert logit.std().item() == pytest.approx(0.8, rel=0.03)
    assert torch.equal(level.alpha, 1 - level.sigma)
    assert torch.equal(logit_normal(torch.zeros(1), mean=0.0, std=9.0), torch.tensor([0.5]))


def test_draws_repeat_with_the_generator_and_are_independent_of_each_other():
    draw = [FlowMatching().draw((500, 4), torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(draw[0][0], draw[1][0]) and torch.equal(draw[0][1].sigma, draw[1][1].sigma)
    assert not torch.equal(draw[0][0], draw[2][0])
    both = torch.stack([torch.logit(draw[0][1].sigma), draw[0][0][:, 0]])
    assert torch.corrcoef(both)[0, 1].abs() < 0.15


@pytest.mark.parametrize("make", [lambda: FlowMatching("epsilon"), lambda: call("epsilon")])
def test_an_unknown_prediction_is_refused_by_name(make):
    with pytest.raises(ValueError, match="'velocity' or 'denoised', got 'epsilon'"):
        make()


def call(prediction):
    clean, noise, level, labels = inputs()
    return velocity_loss(lambda x, *_: x, clean, noise, level, labels, prediction=prediction)
