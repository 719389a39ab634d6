"""The baseline: marginals of the stochastic sampler, densities, the clipped ratio, the loop."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from diffsteer.training.acflow import GRPOConfig, GRPOTrainer
from diffsteer.training.acflow.grpo import gaussian_kl, grpo_loss, sde_step, step_log_density
from diffsteer.training.acflow.run_files import read_log


def test_without_noise_a_step_is_that_of_euler():
    x, v = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    sigma, following = torch.full((4,), 0.8), torch.full((4,), 0.6)
    mean, std = sde_step(x, v, sigma, following, noise_level=0.0)
    torch.testing.assert_close(mean, x - 0.2 * v)
    assert std.tolist() == [0.0] * 4


def test_a_grid_that_begins_just_below_one_is_as_noisy_as_one_that_begins_there():
    x, v = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(0))
    following = torch.tensor([0.875])
    mean, std = sde_step(x, v, torch.tensor([1.0]), following)
    below, its_std = sde_step(x, v, torch.tensor([0.999]), following)
    torch.testing.assert_close(its_std, std, rtol=0.01, atol=0)
    torch.testing.assert_close(below, mean, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_stochastic_sampling_keeps_the_marginals(noise_level):
    """Data N(2, 0.5^2): with the exact velocity the samples must be distributed like the data."""
    mean, spread, count, steps = 2.0, 0.5, 20_000, 200
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for now, then in pairwise(sigmas):
        alpha = 1 - now
        gain = alpha * spread**2 / (alpha**2 * spread**2 + now**2)
        clean = mean + gain * (x - alpha * mean)
        velocity = (x - clean) / now
        if then == 0:
            x = x - now * velocity
            break
        level = noise_level
        m, std = sde_step(x, velocity, now.expand(count), then.expand(count), noise_level=level)
        x = m + std[:, None] * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    assert float(x.mean()) == pytest.approx(mean, abs=0.03)
    assert float(x.std()) == pytest.approx(spread, abs=0.03)


def test_densities_and_kl_are_those_of_normal_distributions():
    mean, other, after = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    std = torch.tensor([0.3, 1.0, 2.0, 0.1])
    normal = torch.distributions.Normal(mean, std[:, None])
    found = step_log_density(after, mean, std)
    torch.testing.assert_close(found, normal.log_prob(after).mean(1))
    apart = torch.distributions.kl_divergence(
        normal, torch.distributions.Normal(other, std[:, None])
    )
    torch.testing.assert_close(gaussian_kl(mean, other, std), apart.mean(1))


def test_the_loss_stops_rewarding_ratios_beyond_the_clip():
    log = torch.tensor([0.0, 0.5, 0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss = grpo_loss(log, torch.zeros(4), advantages, clip=0.1)
    loss.total.sum().backward()
    assert loss.clipped.tolist() == [0, 1, 1, 1]
    expected = [-1.0, -1.1, math.exp(0.5), 0.9]
    torch.testing.assert_close(loss.total.detach(), torch.tensor(expected))
    # no gradient where the ratio has gone as far as it may in the rewarded direction
    torch.testing.assert_close(log.grad, torch.tensor([-1.0, 0.0, math.exp(0.5), 0.0]))


def test_the_loop_runs_and_its_first_ratios_are_one(start):
    options = {"config": GRPOConfig, "trainer": GRPOTrainer, "critic": False}
    run = start(**options, warmup_min=0, warmup_max=0, epochs=3, sample_steps=4, ratio_clip=1e-5)
    densities = []
    inner = run.learner._step_losses

    def spy(data, advantages, index, rows):
        densities.append((run.learner.before.clone(), data.states.shape))
        return inner(data, advantages, index, rows)

    run.learner._step_losses = spy
    before = {n: v.clone() for n, v in run.learner.policy.state_dict().items()}
    assert run.run()
    lines = read_log(run.out)
    assert lines[0]["ratio_clipped"] < 1e-6 + lines[0]["drift"] + 0.5
    assert lines[0]["drift"] == 0
    assert densities[0][0].shape == (8, 3) and densities[0][1] == (8, 5, 3, 8, 8)
    assert any(not torch.equal(v, before[n]) for n, v in run.learner.policy.state_dict().items())


def test_ratios_of_an_unchanged_policy_are_one(start):
    """What sampling noted and what training computes again agree."""
    options = {"config": GRPOConfig, "trainer": GRPOTrainer, "critic": False}
    run = start(**options, epochs=1, sample_steps=4, learning_rate=1e-12, ratio_clip=1e-3)
    run.run()
    assert read_log(run.out)[0]["ratio_clipped"] == 0


@pytest.mark.parametrize(
    "change, text",
    [
        ({"critic": True}, "GRPO has none"),
        ({"levels_per_sample": 10}, "at most 9"),
        ({"noise_level": 0.0}, "noise_level must be positive"),
        ({"guidance_scale": 2.0, "train_cfg": "distil"}, "as they were sampled"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        GRPOConfig(**change)
