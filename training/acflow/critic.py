"""The critic: a small network from a noisy state, its level and its condition to one number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import Features

__all__ = ["Critic", "level_embedding"]

LEVEL_SIZE = 256


def level_embedding(sigma: Tensor, size: int = LEVEL_SIZE) -> Tensor:
    """Cosines and sines of ``1000 * sigma`` at geometric frequencies, (B, size), float32."""
    frequency = torch.arange(size // 2, device=sigma.device, dtype=torch.float32)
    frequency = (-math.log(10_000) * frequency / (size // 2)).exp()
    angle = 1000 * sigma.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)


class Critic(nn.Module):
    """``V(x_t, sigma, condition)``: convolutions, LayerNorm and an MLP, in float32.

    The last layer starts at zero, so that a fresh critic is 0 everywhere and the first update is
    that of ORW-CFM-W2. The architecture is a reconstruction from the abstract's "cheap critic".

    Args:
        shape: of one sample: (C, H, W) an image or a latent, (C, F, H, W) a video, (N, C) tokens of
            the grid ``grid``, or (D,) a vector.
        features: what the condition is summed up in, see `Features`.
        width: channels of the first layer; the deepest have four times as many.
        grid: rows and columns of the tokens, for samples of shape (N, C).

    Raises:
        ValueError: the sample has another number of dimensions, or tokens do not fill the grid.
    """

    def __init__(
        self,
        shape: Sequence[int],
        features: Mapping[str, int] | None = None,
        *,
        width: int = 32,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.grid = tuple(shape), grid
        if len(self.shape) not in (1, 2, 3, 4):
            raise ValueError(f"a critic takes samples of 1 to 4 dimensions, got {self.shape}")
        if len(self.shape) == 2 and (grid is None or grid[0] * grid[1] != self.shape[0]):
            raise ValueError(f"samples of shape {self.shape} need the grid of their tokens")
        hidden = 16 * width if len(self.shape) > 1 else 128
        self.body, size = self._body(width, hidden)
        self.level = nn.Sequential(
            nn.Linear(LEVEL_SIZE, 256), nn.SiLU(), nn.Linear(256, LEVEL_SIZE), nn.SiLU()
        )
        self.condition = Features(features or {}, LEVEL_SIZE)
        layers: list[nn.Module] = []
        inputs = size + LEVEL_SIZE + self.condition.size
        for _ in range(3):
            layers += [nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.SiLU()]
            inputs = hidden
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(*layers, last)

    def forward(self, x: Tensor, sigma: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """Values (B,) of states ``x`` (B, ...) at ``sigma`` (B,)."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"expected samples of shape {self.shape}, got {tuple(x.shape[1:])}")
        found = self._summary(x.float())
        parts = [found, self.level(level_embedding(sigma)), self.condition(features, len(x))]
        values: Tensor = self.head(torch.cat(parts, 1))[:, 0]
        return values

    def _body(self, width: int, hidden: int) -> tuple[nn.Module, int]:
        """The network that sums a sample up, and the size of its summary."""
        if len(self.shape) == 1:
            return nn.Sequential(nn.Linear(self.shape[0], hidden), nn.SiLU()), hidden
        channels = self.shape[1] if len(self.shape) == 2 else self.shape[0]
        side = min(self.grid) if self.grid and len(self.shape) == 2 else min(self.shape[-2:])
        halvings = min(4, max(1, int(math.log2(side)))) if side > 1 else 1
        wider = [2 * width, *[4 * width] * 3][:halvings]
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        before = width
        for after in wider:
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1)]
            layers += [nn.GroupNorm(1, after), nn.SiLU()]
            before = after
        return nn.Sequential(*layers), before

    def _summary(self, x: Tensor) -> Tensor:
        if len(self.shape) == 1:
            found: Tensor = self.body(x)
            return found
        frames = 1
        if len(self.shape) == 4:
            frames = x.shape[2]
            x = x.transpose(1, 2).flatten(0, 1)
        elif self.grid is not None and len(self.shape) == 2:
            x = x.transpose(1, 2).unflatten(2, self.grid)
        # Convolutions run faster on this layout, on the CPU and on tensor cores.
        pooled = self.body(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        return F.silu(pooled.unflatten(0, (-1, frames)).mean(1))
