"""Weight families, their normalisation, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from diffsteer.training.acflow import (
    ACFlowConfig,
    advantage,
    family_weights,
    method_config,
    normalised_weights,
)
from diffsteer.training.acflow.weights import FAMILIES, effective_sample_share

POINTWISE = ("exp", "softplus", "relu_linear", "sigmoid", "binary")


@pytest.mark.parametrize("family", POINTWISE)
def test_p7_a_family_is_one_at_zero_and_increases(family):
    a = torch.arange(-100, 101, dtype=torch.float64) / 20
    w = family_weights(a, family=family, tau=1.7)
    assert float(w[100]) == pytest.approx(1.0)
    assert bool((w.diff() >= 0).all()) and float(w[-1]) > float(w[0])
    assert bool(w.isfinite().all()) and bool((w >= 0).all())


def test_p7_ranks_share_ties_and_average_to_one():
    w = family_weights(torch.tensor([3.0, -1.0, 3.0, 0.0, 9.0]), family="rank")
    torch.testing.assert_close(w, torch.tensor([1.25, 0.0, 1.25, 0.5, 2.0]))
    assert family_weights(torch.zeros(4), family="rank").tolist() == [1.0] * 4


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "signed"])
@pytest.mark.parametrize("normalise", ["batch", "group"])
def test_p7_normalised_weights_average_to_one(family, normalise):
    a = torch.randn(60, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(60) % 5
    w = normalised_weights(a, groups, family=family, normalise=normalise)
    torch.testing.assert_close(w.mean(), torch.tensor(1.0))
    if normalise == "group":
        means = torch.stack([w[groups == g].mean() for g in range(5)])
        torch.testing.assert_close(means, torch.ones(5))


def test_large_rewards_do_not_overflow():
    a = torch.tensor([900.0, 899.0, 0.0])
    w = normalised_weights(a, torch.zeros(3, dtype=torch.long), tau=10.0)
    torch.testing.assert_close(w, torch.tensor([3.0, 3 * math.exp(-10), 0.0]), rtol=1e-4, atol=1e-6)
    by_group = normalised_weights(a, torch.tensor([0, 0, 1]), tau=10.0, normalise="group")
    torch.testing.assert_close(float(by_group[2]), 1.0)


def test_samples_without_a_reward_weigh_nothing_and_count_for_nothing():
    a = torch.tensor([1.0, math.nan, 2.0, -0.5])
    groups = torch.zeros(4, dtype=torch.long)
    w = normalised_weights(a, groups)
    assert float(w[1]) == 0
    torch.testing.assert_close(w[[0, 2, 3]], normalised_weights(a[[0, 2, 3]], groups[:3]))


def test_p1_a_constant_critic_cancels_in_normalised_weights():
    z = torch.randn(32, generator=torch.Generator().manual_seed(1))
    groups = torch.zeros(32, dtype=torch.long)
    plain = normalised_weights(advantage(z, 0.0, clip=math.inf), groups, tau=0.8)
    shifted = normalised_weights(
        advantage(z, torch.full((32,), 3.3), clip=math.inf), groups, tau=0.8
    )
    torch.testing.assert_close(plain, shifted, rtol=1e-5, atol=1e-6)


def test_the_advantage_is_bounded_and_does_not_train_the_critic():
    value = torch.zeros(3, requires_grad=True)
    a = advantage(torch.tensor([9.0, 0.5, -9.0]), value, clip=2.0)
    assert a.tolist() == [2.0, 0.5, -2.0]
    assert not a.requires_grad


def test_the_effective_share():
    assert float(effective_sample_share(torch.ones(8))) == 1.0
    assert float(effective_sample_share(torch.tensor([0.0, 0, 0, 7]))) == 0.25


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_p11_signed_weights_need_alpha_above_the_clip(alpha):
    settings = {"weights": "signed", "normalise": "none", "advantage_clip": 2.0}
    with pytest.raises(ValueError, match="alpha above the advantage clip"):
        ACFlowConfig(alpha=alpha, **settings)
    assert ACFlowConfig(alpha=2.1, **settings).alpha == 2.1


def test_signed_weights_are_never_normalised():
    with pytest.raises(ValueError, match="mean of about zero"):
        normalised_weights(torch.ones(2), torch.zeros(2, dtype=torch.long), family="signed")


@pytest.mark.parametrize(
    "change, text",
    [
        ({"tau": 0.0}, "tau must be positive"),
        ({"alpha": -1.0}, "alpha must be 0 or more"),
        ({"alpha": math.nan}, "alpha must be a finite number"),
        ({"advantage_clip": 0.0}, "advantage_clip must be positive"),
        ({"advantage_clip": math.nan}, "advantage_clip must be a finite number"),
        ({"tau": math.inf}, "tau must be a finite number"),
        ({"weights": "cubic"}, "weights must be one of"),
        ({"guidance_scale": 3.0}, "say what guidance is to do"),
        ({"train_cfg": "both"}, "say what guidance is to do"),
        ({"guidance_scale": 0.5}, "guidance_scale must be 1"),
        ({"warmup_min": 9, "warmup_max": 3}, "warm-up needs"),
        ({"sampler": "ema", "ema": 0.0}, "needs ema above 0"),
        ({"images_per_prompt": 0}, "images_per_prompt must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(change, text):
    with pytest.raises(ValueError, match=text):
        ACFlowConfig(**change)


def test_named_methods_are_special_cases():
    assert method_config("acflow") == ACFlowConfig()
    orw = method_config("orw")
    assert not orw.critic and orw.alpha == 1 and orw.weights == "exp"
    assert method_config("reward-weighted").alpha == 0
    assert method_config("advantage-matching", alpha=3.0).weights == "signed"
    with pytest.raises(ValueError, match="method must be one of"):
        method_config("ppo")
