"""What weighted flow matching converges to: exact on discrete endpoints and on Gaussians."""

from __future__ import annotations

import math

import pytest
import torch
from endpoints import Endpoints

from diffsteer.training.acflow import (
    actor_loss,
    advantage,
    critic_loss,
    explained_variance,
    family_weights,
    forward_noised,
    normalised_weights,
)
from diffsteer.training.acflow.weights import effective_sample_share

MODEL = Endpoints.random()
TAU = 1.3


def minimiser(x, sigma, weight, reference=None, alpha=0.0):
    """The velocity that minimises the actor's loss over the endpoints, by its normal equation."""
    p = MODEL.posterior(x, sigma)
    index = torch.arange(len(MODEL.points)).repeat(len(x))
    rows = torch.arange(len(x)).repeat_interleave(len(MODEL.points))
    target = MODEL.velocities(x, sigma).flatten(0, 1)
    v = torch.zeros_like(x).requires_grad_(True)

    def loss(at):
        ref = None if reference is None else reference[rows]
        terms = actor_loss(at[rows], target, weight[rows, index], reference=ref, alpha=alpha)
        return (p[rows, index] * terms.total).sum()

    # The loss is quadratic in each coordinate of v: one Newton step from anywhere is exact.
    (gradient,) = torch.autograd.grad(loss(v), v, create_graph=True)
    columns = [
        torch.autograd.grad(gradient[:, d].sum(), v, retain_graph=True)[0][:, d]
        for d in range(x.shape[1])
    ]
    return -(gradient / torch.stack(columns, 1)).detach()


def test_p2_boltzmann_weights_give_the_velocity_of_the_tilted_distribution():
    _, sigma, x = MODEL.states(64)
    weight = family_weights(MODEL.rewards.expand(64, -1), tau=TAU)
    found = minimiser(x, sigma, weight)
    torch.testing.assert_close(found, MODEL.tilted(TAU).velocity(x, sigma), rtol=0, atol=1e-10)


@pytest.mark.parametrize("critic", ["perfect", "arbitrary"])
def test_p2_any_critic_leaves_that_target_where_it_is(critic):
    _, sigma, x = MODEL.states(64)
    value = MODEL.value(x, sigma) if critic == "perfect" else (3 * x[:, 0]).sin() + 2 * sigma
    advantages = advantage(MODEL.rewards.expand(64, -1), value[:, None], clip=math.inf)
    found = minimiser(x, sigma, family_weights(advantages, tau=TAU))
    torch.testing.assert_close(found, MODEL.tilted(TAU).velocity(x, sigma), rtol=0, atol=1e-10)


def test_p3_weights_of_the_value_alone_change_nothing():
    _, sigma, x = MODEL.states(64)
    value = MODEL.value(x, sigma)[:, None].expand(-1, len(MODEL.points))
    found = minimiser(x, sigma, family_weights(value, tau=TAU))
    torch.testing.assert_close(found, MODEL.velocity(x, sigma), rtol=0, atol=1e-10)


def test_clipping_the_advantage_does_move_the_target():
    _, sigma, x = MODEL.states(64)
    value = MODEL.value(x, sigma)[:, None]
    clipped = advantage(MODEL.rewards.expand(64, -1), value, clip=0.5)
    found = minimiser(x, sigma, family_weights(clipped, tau=TAU))
    gap = (found - MODEL.tilted(TAU).velocity(x, sigma)).norm(dim=1).max()
    effect = (MODEL.velocity(x, sigma) - MODEL.tilted(TAU).velocity(x, sigma)).norm(dim=1).max()
    assert 0.01 < gap < effect


@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_the_reference_term_pulls_by_alpha_over_the_mean_weight(alpha):
    _, sigma, x = MODEL.states(32)
    reference = MODEL.velocity(x, sigma)
    weight = family_weights(MODEL.rewards.expand(32, -1), tau=TAU)
    mean = (MODEL.posterior(x, sigma) * weight).sum(1, keepdim=True)
    tilted = MODEL.tilted(TAU).velocity(x, sigma)
    expected = (mean * tilted + alpha * reference) / (mean + alpha)
    found = minimiser(x, sigma, weight, reference, alpha)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_p4_the_target_nears_the_reference_as_alpha_grows():
    _, sigma, x = MODEL.states(32)
    reference = MODEL.velocity(x, sigma)
    weight = family_weights(MODEL.rewards.expand(32, -1), tau=TAU)
    drift = [
        float((minimiser(x, sigma, weight, reference, alpha) - reference).norm())
        for alpha in (0.1, 1.0, 10.0, 1e6)
    ]
    assert drift == sorted(drift, reverse=True)
    assert drift[0] > 0.1 and drift[-1] < 1e-4


def test_a_soft_critic_makes_the_pull_the_same_everywhere():
    _, sigma, x = MODEL.states(32)
    p = MODEL.posterior(x, sigma)
    soft = (p * (TAU * MODEL.rewards).exp()).sum(1).log() / TAU
    weight = family_weights(MODEL.rewards - soft[:, None], tau=TAU)
    reference, alpha = MODEL.velocity(x, sigma), 0.7
    expected = (MODEL.tilted(TAU).velocity(x, sigma) + alpha * reference) / (1 + alpha)
    found = minimiser(x, sigma, weight, reference, alpha)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    # and the linex loss is least at that critic
    level = soft.clone().requires_grad_(True)
    losses = critic_loss(level[:, None], MODEL.rewards.expand(32, -1), target="soft", tau=TAU)
    (p * losses).sum().backward()
    torch.testing.assert_close(level.grad, torch.zeros_like(soft), rtol=0, atol=1e-12)


def test_the_mean_critic_is_the_conditional_expectation():
    _, sigma, x = MODEL.states(32)
    level = MODEL.value(x, sigma).requires_grad_(True)
    losses = critic_loss(level[:, None], MODEL.rewards.expand(32, -1))
    (MODEL.posterior(x, sigma) * losses).sum().backward()
    torch.testing.assert_close(level.grad, torch.zeros_like(level), rtol=0, atol=1e-12)


def test_signed_weights_are_the_first_order_of_the_tilt():
    _, sigma, x = MODEL.states(32)
    reference, value, alpha = MODEL.velocity(x, sigma), MODEL.value(x, sigma)[:, None], 7.0
    weight = family_weights(MODEL.rewards.expand(32, -1) - value, family="signed")
    found = minimiser(x, sigma, weight, reference, alpha)
    step = 1e-5
    slope = (MODEL.tilted(step).velocity(x, sigma) - MODEL.tilted(-step).velocity(x, sigma)) / (
        2 * step
    )
    torch.testing.assert_close(found, reference + slope / alpha, rtol=0, atol=1e-8)


def test_p6_a_perfect_critic_leaves_less_the_cleaner_the_state():
    count = 40_000
    index, _, _ = MODEL.states(count)
    rewards = MODEL.rewards[index]
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    shares, spreads, explained = [], [], []
    for level in (0.95, 0.75, 0.5, 0.25, 0.05):
        sigma = torch.full((count,), level, dtype=torch.float64)
        x = forward_noised(MODEL.points[index], noise, sigma)
        value = MODEL.value(x, sigma)
        a = advantage(rewards, value, clip=math.inf)
        assert abs(float(a.mean())) <= 4 * float(a.std()) / count**0.5
        spreads.append(float(a.std()))
        shares.append(float(effective_sample_share(family_weights(a, tau=TAU))))
        explained.append(explained_variance(rewards, value, sigma, bins=1)[0])
    assert spreads == sorted(spreads, reverse=True)
    assert explained == sorted(explained)
    # In between a critic may well leave fewer effective samples than none: that is no theorem.
    plain = float(effective_sample_share(family_weights(rewards, tau=TAU)))
    assert shares[-1] > 0.99 and abs(shares[0] - plain) < 0.05


@pytest.mark.parametrize("reward, mean, variance", [("linear", TAU, 1.0), ("square", 0.0, None)])
def test_p9_one_round_on_a_gaussian(reward, mean, variance):
    """N(0, 1) under R = x moves by tau, under R = -x^2 / 2 shrinks to variance 1 / (1 + tau)."""
    clean = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    values = clean if reward == "linear" else -clean.square() / 2
    weight = normalised_weights(values, torch.zeros(4001, dtype=torch.long), tau=TAU)
    density = (-clean.square() / 2).exp() * weight
    density = density / density.sum()
    variance = 1 / (1 + TAU) if variance is None else variance
    torch.testing.assert_close(float((density * clean).sum()), mean, rtol=0, atol=1e-4)
    spread = float((density * (clean - mean).square()).sum())
    torch.testing.assert_close(spread, variance, rtol=1e-3, atol=0)
    # that the weighted flow has this very distribution is P2


def test_p5_the_drift_bounds_the_wasserstein_distance():
    """Linear fields v = a x + b from one noise; the bound has the Lipschitz constant of the second.

    Time runs from noise (0) to data (1); x1' = x1 + (v1 - v2) along paths of field 1.
    """
    a1, b1, a2, b2 = -0.4, 0.9, 0.1, 0.2
    steps, count = 400, 4001
    quantile = torch.linspace(0.5 / count, 1 - 0.5 / count, count, dtype=torch.float64)
    noise = math.sqrt(2) * torch.erfinv(2 * quantile - 1)
    one, two, integral = noise.clone(), noise.clone(), 0.0
    for _ in range(steps):
        gap = actor_loss(
            (a1 * one + b1)[:, None],
            torch.zeros(count, 1, dtype=torch.float64),
            torch.zeros(count, dtype=torch.float64),
            reference=(a2 * one + b2)[:, None],
        ).drift
        integral += float(gap.mean()) / steps
        one, two = one + (a1 * one + b1) / steps, two + (a2 * two + b2) / steps
    # Both maps are increasing, so equal quantiles are the optimal coupling.
    distance = float((one - two).square().mean())
    assert 0.2 * integral < distance <= math.exp(2 * abs(a2)) * integral
