"""Reweighted self-training on a ring of eight Gaussians: what each weight does in many rounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from diffsteer.training.acflow import (
    actor_loss,
    advantage,
    critic_loss,
    family_weights,
    forward_noised,
    normalised_weights,
    shape_rewards,
)

MODES, STD, STEPS = 8, 0.15, 20
ROUNDS, WARM_UP, UPDATES, BATCH = 24, 6, 20, 256
TAU, CLIP, RATE = 1.0, 2.0, 1e-3
ANGLES = torch.arange(MODES) * (2 * math.pi / MODES)
MEANS = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


@dataclass(frozen=True)
class Toy:
    """A row of the table: how samples are weighed, and alpha.

    ``scale`` leaves the rewards unshaped and multiplies them instead; None shapes them.
    """

    name: str
    weigh: Callable[[Tensor, Tensor], Tensor] | None
    alpha: float = 0.0
    warm_up: int = WARM_UP
    scale: float | None = None


def boltzmann(advantages: Tensor) -> Tensor:
    return normalised_weights(advantages, torch.zeros(len(advantages), dtype=torch.long), tau=TAU)


def toys() -> list[Toy]:
    """The rows, each weight with and without the Wasserstein-2 term."""
    weights: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "w = 1": lambda z, v: torch.ones_like(z),
        "exp(tau V)": lambda z, v: boltzmann(advantage(v, 0.0, clip=CLIP)),
        "exp(tau z), ORW": lambda z, v: boltzmann(z),
        "exp(tau clip(z - V)), AC-Flow": lambda z, v: boltzmann(advantage(z, v, clip=CLIP)),
    }
    rows = [Toy("base model", None)]
    rows += [Toy(name, weigh, alpha) for alpha in (0.0, 1.0) for name, weigh in weights.items()]

    def signed(z: Tensor, v: Tensor) -> Tensor:
        return family_weights(advantage(z, v, clip=CLIP), family="signed")

    def unclipped(z: Tensor, v: Tensor) -> Tensor:
        return boltzmann(advantage(z, v, clip=math.inf))

    clipped = weights["exp(tau clip(z - V)), AC-Flow"]
    rows += [Toy("signed z - V", signed, 2.5)]
    rows += [Toy("AC-Flow without clipping", unclipped, 1.0)]
    rows += [Toy("AC-Flow without warm-up", clipped, 1.0, warm_up=0)]
    rows += [Toy("AC-Flow, rewards times 20, unshaped", clipped, 1.0, scale=20.0)]
    return [
        *rows,
        Toy("ORW, rewards times 20, unshaped", lambda z, v: boltzmann(z), 1.0, scale=20.0),
    ]


def network(seed: int, inputs: int = 3, outputs: int = 2) -> nn.Sequential:
    torch.manual_seed(seed)
    sizes = [inputs, 128, 128, 128]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(128, outputs))


def value_of(model: nn.Module, x: Tensor, sigma: Tensor) -> Tensor:
    out: Tensor = model(torch.cat([x, sigma[:, None]], 1))
    return out


def reward_of(x: Tensor) -> Tensor:
    """A number of each mode, in [0, 1], of the mode that is nearest."""
    table = torch.linspace(0, 1, MODES)[torch.tensor([3, 0, 5, 1, 7, 2, 4, 6])]
    return table[torch.cdist(x, MEANS).argmin(1)]


@torch.no_grad()
def draw(model: nn.Module, count: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(count, 2, generator=generator)
    sigmas = torch.linspace(1, 0, STEPS + 1)
    for now, then in pairwise(sigmas):
        x = x + (then - now) * value_of(model, x, now.expand(count))
    return x


def batch(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, states, levels and velocities."""
    rows = torch.randint(len(clean), (BATCH,), generator=generator)
    noise = torch.randn(BATCH, 2, generator=generator)
    sigma = torch.rand(BATCH, generator=generator).clamp(1e-3, 1 - 1e-3)
    x = forward_noised(clean[rows], noise, sigma)
    return rows, x, sigma, noise - clean[rows]


def base_model(seed: int, updates: int = 3000) -> nn.Sequential:
    """A model of the ring itself."""
    generator = torch.Generator().manual_seed(seed)
    model = network(seed)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - update / updates)
        clean = MEANS[torch.randint(MODES, (BATCH,), generator=generator)]
        clean = clean + STD * torch.randn(BATCH, 2, generator=generator)
        _, x, sigma, velocity = batch(clean, generator)
        (value_of(model, x, sigma) - velocity).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def run_toy(toy: Toy, base: nn.Sequential, seed: int) -> dict[str, float]:
    """Rounds of sampling and reweighted training; what the end looks like."""
    generator = torch.Generator().manual_seed(seed + 1)
    model, critic = network(seed), network(seed, outputs=1)
    model.load_state_dict(base.state_dict())
    actor = torch.optim.Adam(model.parameters(), RATE)
    learner = torch.optim.Adam(critic.parameters(), 2e-3)
    for round_ in range(ROUNDS if toy.weigh is not None else 0):
        clean = draw(model, 1024, generator)
        groups = torch.zeros(1024, dtype=torch.long)
        rewards = reward_of(clean)
        shaped = shape_rewards(rewards, groups).float()
        shaped = shaped if toy.scale is None else toy.scale * rewards
        for _ in range(UPDATES):
            rows, x, sigma, velocity = batch(clean, generator)
            value = value_of(critic, x, sigma)[:, 0]
            if round_ >= toy.warm_up and toy.weigh is not None:
                weight = toy.weigh(shaped[rows], value.detach())
                policy = value_of(model, x, sigma)
                with torch.no_grad():
                    reference = value_of(base, x, sigma)
                loss = actor_loss(
                    policy, velocity, weight, reference=reference, alpha=toy.alpha
                ).total
                loss.mean().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                actor.step()
                actor.zero_grad()
            critic_loss(value, shaped[rows]).mean().backward()
            learner.step()
            learner.zero_grad()
    return measure(draw(model, 4000, generator))


def measure(x: Tensor) -> dict[str, float]:
    """Mean reward, normalised entropy of the modes, mean distance to the nearest mode."""
    distance, nearest = torch.cdist(x, MEANS).min(1)
    share = torch.bincount(nearest, minlength=MODES) / len(x)
    entropy = -float(torch.special.xlogy(share, share).sum()) / math.log(MODES)
    return {
        "reward": float(reward_of(x).mean()),
        "entropy": entropy,
        "distance": float(distance.mean()),
    }
