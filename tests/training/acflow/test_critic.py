"""The critic: shapes, what it is told, and that it learns."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffsteer.training.acflow import Critic, critic_loss, explained_variance, forward_noised
from diffsteer.training.acflow.critic_learner import token_grid
from diffsteer.training.acflow.critic_memory import CriticMemory
from diffsteer.training.acflow.features import condition_features, feature_sizes
from diffsteer.training.acflow.sampling import Rollouts

SHAPES = {
    "image": ((3, 8, 8), None), "odd": ((4, 9, 5), None), "video": ((4, 3, 8, 8), None),
    "tokens": ((12, 16), (3, 4)), "vector": ((2,), None), "line": ((4, 1, 6), None),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_fresh_critic_is_zero_and_takes_every_layout(name):
    shape, grid = SHAPES[name]
    features = {"label": torch.tensor([1, 2]), "pooled": torch.randn(2, 5)}
    critic = Critic(shape, feature_sizes(features), width=8, grid=grid)
    value = critic(torch.randn(2, *shape), torch.tensor([0.1, 0.9]), features)
    assert value.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="expected samples of shape"):
        critic(torch.randn(2, *shape, 1), torch.tensor([0.1, 0.9]), features)


def test_tokens_need_a_grid_that_fits():
    with pytest.raises(ValueError, match="grid of their tokens"):
        Critic((12, 16), grid=(5, 2))
    assert token_grid((12, 16), torch.zeros(1, 3, 30, 40)) == (3, 4)
    assert token_grid((3, 8, 8), torch.zeros(1, 3, 8, 8)) is None


def test_what_a_critic_knows_of_the_condition():
    given = {
        "class_labels": torch.tensor([3, 4]), "pooled": torch.ones(2, 5),
        "text": torch.arange(12.0).reshape(2, 2, 3), "text_mask": torch.ones(2, 2), "n": [1, 2],
        "guidance": torch.ones(2),
    }  # fmt: skip
    found = condition_features(given)
    assert feature_sizes(found) == {"class_labels": 0, "pooled": 5, "text": 3}
    assert found["text"].tolist() == [[1.5, 2.5, 3.5], [7.5, 8.5, 9.5]]


def test_p8_a_critic_learns_a_linear_reward_and_more_of_it_the_cleaner_the_state():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    critic = Critic((2,), {})
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)

    def batch(count):
        clean = torch.randn(count, 2, generator=generator)
        sigma = torch.rand(count, generator=generator)
        noise = torch.randn(count, 2, generator=generator)
        return forward_noised(clean, noise, sigma), sigma, clean @ torch.tensor([0.8, -0.6])

    for _ in range(150):
        x, sigma, reward = batch(128)
        critic_loss(critic(x, sigma, {}), reward).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    x, sigma, reward = batch(4000)
    with torch.no_grad():
        value = critic(x, sigma, {})
    assert float(critic_loss(value, reward).mean()) < 0.7 * float(reward.var())
    explained = explained_variance(reward, value, sigma, bins=4)
    # The best that can be known of a unit Gaussian reward is alpha^2 / (alpha^2 + sigma^2).
    assert explained[0] > 0.85 and explained[0] > explained[1] > explained[2] > explained[3] - 0.05
    assert explained[3] < 0.3


def test_huber_charges_large_errors_linearly():
    value, shaped = torch.zeros(3), torch.tensor([0.5, 1.0, 3.0])
    assert critic_loss(value, shaped, huber=1.0).tolist() == [0.25, 1.0, 5.0]
    with pytest.raises(ValueError, match="target must be"):
        critic_loss(value, shaped, target="median")


def test_explained_variance_of_too_few_states_is_unknown():
    z, sigma = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.15, 0.9])
    found = explained_variance(z, z, sigma, bins=2)
    assert found == [1.0, None]


def test_a_memory_holds_the_last_updates_and_draws_each_sample_once():
    memory = CriticMemory(3)
    one = SimpleNamespace(gather=lambda value: value)
    for update in range(5):
        numbers = torch.arange(8.0) + 10 * update  # two updates of four samples are on hand
        data = Rollouts(numbers[:, None], [], [], {"labels": numbers.long()}, 1)
        memory.add(data, range(4, 8), numbers[4:], one)
    found = memory.draw(12, seed=0)
    assert found.shaped.tolist() == [10 * update + n for update in (2, 3, 4) for n in range(4, 8)]
    assert torch.equal(found.clean[:, 0], found.shaped)
    assert torch.equal(found.features["labels"], found.shaped.long())
    few, other = memory.draw(4, seed=0).shaped, memory.draw(4, seed=1).shaped
    assert few.tolist() == sorted(set(few.tolist())) and not torch.equal(few, other)
