"""What low-rank evolution is compared with: dense noise, two-point estimates, gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer.core import seeded_noise
from diffsteer.eval import load_classifier
from diffsteer.training.data import derive_seed
from diffsteer.training.eggroll import Shaped, find_layers, shape_fitness
from diffsteer.training.eggroll.questions import Questions
from diffsteer.training.prompts import call_inputs

Scores = Callable[[Questions], Tensor]  # the scores of the images of the weights as they are


@dataclass
class DenseEvolution:
    """Evolution strategies with a full Gaussian matrix for every layer, one member at a time.

    With a population of 2 it is SPSA, as MeZO uses it: one difference a step, divided by the
    running root mean square of the differences instead of by the deviation of a population.

    Args:
        model: updated in place; float32 offsets are kept beside it.
        sigma: deviation of the perturbation.
        lr: step in units of sigma, as ``Eggroll`` has it.
        population: members, in pairs.
        seed: of the noise.
    """

    model: nn.Module
    sigma: float
    lr: float
    population: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Remember the weights."""
        self.layers = find_layers(self.model)
        self.weights = {name: layer.module.weight for name, layer in self.layers.items()}
        self.base = {name: w.detach().float().clone() for name, w in self.weights.items()}
        self.offsets = {name: torch.zeros_like(base) for name, base in self.base.items()}
        self.square = 0.0
        self.generation = 0

    def step(self, scores: Scores, asked: Questions) -> float:
        """One generation; the mean score of its members."""
        table = torch.empty(self.population, asked.columns)
        for member in range(self.population):
            self._write(member)
            table[member] = scores(asked).view(asked.columns, -1).mean(1)
        shaped = self._shape(table)
        pairs = (shaped.values[0::2] - shaped.values[1::2]).tolist()
        scale = self.lr * self.sigma / self.population**0.5
        for pair, weight in enumerate(pairs):
            for name, offset in self.offsets.items():
                offset.add_(self._noise(name, pair), alpha=scale * weight)
        self.generation += 1
        self._write(None)
        return float(table.mean())

    def _shape(self, table: Tensor) -> Shaped:
        if self.population > 2:
            return shape_fitness(table)
        half = float((table[0] - table[1]).mean()) / 2
        self.square += (half**2 - self.square) / min(self.generation + 1, 50)
        values = torch.tensor([half, -half], dtype=torch.float64) / max(self.square**0.5, 1e-12)
        return Shaped(values, 2, 1.0)

    @torch.no_grad()
    def _write(self, member: int | None) -> None:
        sign = 0.0 if member is None else 1.0 - 2.0 * (member % 2)
        for name, weight in self.weights.items():
            total = self.base[name] + self.offsets[name]
            if member is not None:
                total.add_(self._noise(name, member // 2), alpha=sign * self.sigma)
            weight.copy_(total)

    def _noise(self, name: str, pair: int) -> Tensor:
        seed = derive_seed(self.seed, "dense", self.generation, pair, name)
        return torch.randn(self.base[name].shape, generator=torch.Generator().manual_seed(seed))


def differentiable_images(pipe: Any, asked: Questions, steps: int) -> Tensor:
    """The images of a class-conditional pipeline with their gradient: Euler steps of the flow."""
    labels = torch.tensor(call_inputs(pipe, asked.prompts)["class_labels"])
    network, size = pipe.transformer, pipe.transformer.config.sample_size
    device = network.device
    x = seeded_noise(asked.seeds, (network.config.in_channels, size, size), device=device)
    labels = labels.to(device)
    levels = torch.linspace(1, 1 / steps, steps).tolist()
    for sigma, after in zip(levels, [*levels[1:], 0.0], strict=True):
        level = torch.tensor(sigma, device=device)
        output = network(
            x, timestep=(level * 1000).expand(len(x)), class_labels=labels, return_dict=False
        )[0]
        x = x + (after - sigma) * pipe.velocity(output.float(), x, level)
    return (x / 2 + 0.5).clamp(0, 1)


def differentiable_reward(images: Tensor, asked: Questions) -> Tensor:
    """The reward "class" with its gradient, (B,)."""
    logits = load_classifier("guidance").to(images.device)(images)
    labels = torch.tensor([prompt.label for prompt in asked.prompts], device=logits.device)
    return logits.log_softmax(1).gather(1, labels[:, None])[:, 0]


def reward_gradient(
    pipe: Any, reward: Callable[[Tensor, Questions], Tensor], asked: Questions, steps: int
) -> tuple[float, dict[str, Tensor]]:
    """The mean reward and its gradient by the weight of each layer, by backpropagation."""
    layers = find_layers(pipe.transformer)
    weights = {name: layer.module.weight for name, layer in layers.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    kernel = torch.nn.attention.SDPBackend.MATH  # the others' backward is slow on the CPU
    with torch.enable_grad(), torch.nn.attention.sdpa_kernel(kernel):
        value = reward(differentiable_images(pipe, asked, steps), asked).mean()
        found = torch.autograd.grad(value, list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return float(value.detach()), dict(
        zip(weights, [g.detach().float() for g in found], strict=True)
    )
