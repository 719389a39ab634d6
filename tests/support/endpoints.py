"""K discrete endpoints under Gaussian noise: a flow whose every conditional mean is known exactly.

``x = (1 - sigma) * endpoint + sigma * noise`` makes the posterior of the endpoint a softmax, so the
best velocity under any weights is a ratio of two sums. Float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Weight = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``weight(x, sigma, value of each endpoint) -> (B, K)``."""


@dataclass(frozen=True)
class Endpoints:
    """``points`` (K, D) with ``probabilities`` (K,) and ``rewards`` (K,)."""

    points: Tensor
    probabilities: Tensor
    rewards: Tensor

    @classmethod
    def random(cls, count: int = 6, dim: int = 2, seed: int = 0) -> Endpoints:
        g = torch.Generator().manual_seed(seed)
        points = torch.randn(count, dim, generator=g, dtype=torch.float64) * 1.5
        probabilities = torch.rand(count, generator=g, dtype=torch.float64) + 0.2
        rewards = torch.randn(count, generator=g, dtype=torch.float64)
        return cls(points, probabilities / probabilities.sum(), rewards)

    def tilted(self, tau: float) -> Endpoints:
        """The distribution proportional to ``p * exp(tau * R)``."""
        p = self.probabilities * (tau * self.rewards).exp()
        return Endpoints(self.points, p / p.sum(), self.rewards)

    def posterior(self, x: Tensor, sigma: Tensor) -> Tensor:
        """P(endpoint | x), (B, K)."""
        means = (1 - sigma)[:, None, None] * self.points
        log = -(x[:, None] - means).square().sum(2) / (2 * sigma[:, None] ** 2)
        return (log + self.probabilities.log()).softmax(1)

    def velocities(self, x: Tensor, sigma: Tensor) -> Tensor:
        """``noise - clean`` for each possible endpoint, (B, K, D)."""
        noise = (x[:, None] - (1 - sigma)[:, None, None] * self.points) / sigma[:, None, None]
        return noise - self.points

    def velocity(self, x: Tensor, sigma: Tensor, weight: Tensor | None = None) -> Tensor:
        """The minimiser of ``E[w * |v - u|^2 | x]``, (B, D), for weights (B, K)."""
        p = self.posterior(x, sigma)
        p = p if weight is None else p * weight
        return (p[..., None] * self.velocities(x, sigma)).sum(1) / p.sum(1, keepdim=True)

    def value(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The perfect critic ``E[R | x]``, (B,)."""
        return self.posterior(x, sigma) @ self.rewards

    def states(self, count: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Endpoints (B,), levels (B,) and states (B, D) of the forward path."""
        g = torch.Generator().manual_seed(seed)
        index = torch.multinomial(self.probabilities, count, replacement=True, generator=g)
        sigma = torch.rand(count, generator=g, dtype=torch.float64) * 0.9 + 0.05
        noise = torch.randn(count, self.points.shape[1], generator=g, dtype=torch.float64)
        x = (1 - sigma)[:, None] * self.points[index] + sigma[:, None] * noise
        return index, sigma, x
