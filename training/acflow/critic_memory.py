"""The samples of the last updates, which the critic is fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.tensors import send
from .sampling import Rollouts

__all__ = ["CriticMemory", "Remembered"]


class Remembered(NamedTuple):
    """Samples of all ranks: clean (n, ...), what is known of their conditions, shaped rewards."""

    clean: Tensor
    features: dict[str, Tensor]
    shaped: Tensor

    def take(self, index: Tensor) -> Remembered:
        """Some of them, by number."""
        index = send(index, self.clean.device)
        features = {name: value[index] for name, value in self.features.items()}
        return Remembered(self.clean[index], features, self.shaped[index])


@dataclass
class CriticMemory:
    """Holds the samples of the last ``updates`` updates, the same on every rank.

    A critic that takes several steps on the few samples of one update learns these by heart and
    nothing that holds for the next ones.

    Attributes:
        updates: how many updates are remembered.
        parts: the samples of each, the oldest first.
    """

    updates: int = 1
    parts: list[Remembered] = field(default_factory=list)

    def add(self, data: Rollouts, local: range, shaped: Tensor, accelerator: Any) -> None:
        """Remember an update; the oldest one is forgotten where there is no room.

        Args:
            data: the samples of this rank.
            local: those of the update among them.
            shaped: their shaped rewards on all ranks, (n,).
            accelerator: accelerate's.
        """
        rows = slice(local.start, local.stop)
        gather = accelerator.gather
        features = {name: gather(value[rows]) for name, value in data.features.items()}
        self.parts.append(Remembered(gather(data.clean[rows]), features, shaped))
        del self.parts[: -self.updates]

    def draw(self, count: int, seed: int) -> Remembered:
        """``count`` different samples at random, in the order in which they were added."""
        total = sum(len(part.shaped) for part in self.parts)
        generator = torch.Generator().manual_seed(seed)
        index, start, found = torch.randperm(total, generator=generator)[:count].sort()[0], 0, []
        for part in self.parts:
            stop = start + len(part.shaped)
            found.append(part.take(index[(index >= start) & (index < stop)] - start))
            start = stop
        names = found[0].features
        return Remembered(
            torch.cat([part.clean for part in found]),
            {name: torch.cat([part.features[name] for part in found]) for name in names},
            torch.cat([part.shaped for part in found]),
        )

    def state_dict(self) -> list[dict[str, Any]]:
        """What is remembered; nothing where no later update learns from it."""
        return [part._asdict() for part in self.parts] if self.updates > 1 else []

    def load_state_dict(self, state: list[Mapping[str, Any]], device: torch.device) -> None:
        """Go on from a saved memory."""
        self.parts = [
            Remembered(
                part["clean"].to(device),
                {name: value.to(device) for name, value in part["features"].items()},
                part["shaped"].to(device),
            )
            for part in state
        ]
