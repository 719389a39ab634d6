"""What a critic knows of the condition: the arguments of the denoiser's call, summed up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Features", "condition_features", "feature_sizes"]

CODES = 1024  # class labels and the like are looked up modulo this


def condition_features(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """One vector a sample from each argument of a denoiser's call that has one row a sample.

    Integers (B,), such as class labels, stay as they are; vectors (B, D) too, such as pooled
    embeddings; of sequences (B, L, D) the mean token is taken. Masks, lists and whatever else are
    left out.

    Args:
        arguments: the row-wise arguments, without sample and timestep.
    """
    found = {}
    for name, value in sorted(arguments.items()):
        if not isinstance(value, Tensor) or "mask" in name:
            continue
        if value.ndim == 1 and not value.is_floating_point():
            found[name] = value
        elif value.ndim == 2 and value.is_floating_point():
            found[name] = value.float()
        elif value.ndim == 3 and value.is_floating_point():
            found[name] = value.float().mean(1)
    return found


def feature_sizes(features: Mapping[str, Tensor]) -> dict[str, int]:
    """The size of each vector by name; 0 for integers."""
    return {name: 0 if f.ndim == 1 else f.shape[1] for name, f in features.items()}


class Features(nn.Module):
    """Brings the vectors of `condition_features` to one size and adds them up.

    Args:
        sizes: of each vector by name; 0 for integers, which get an embedding.
        size: of the result.
    """

    def __init__(self, sizes: Mapping[str, int], size: int) -> None:
        super().__init__()
        self.sizes = dict(sizes)
        self.size = size if self.sizes else 0
        self.parts = nn.ModuleDict()
        for name, width in self.sizes.items():
            key = name.replace(".", "/")
            if width:
                self.parts[key] = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size))
            else:
                self.parts[key] = nn.Embedding(CODES, size)

    def forward(self, features: Mapping[str, Tensor], rows: int) -> Tensor:
        """The sum over all vectors, (B, size)."""
        total = None
        for name, width in self.sizes.items():
            value, part = features[name], self.parts[name.replace(".", "/")]
            found = part(value) if width else part(value.long() % CODES)
            total = found if total is None else total + found
        if total is None:
            parameter = next(self.parameters(), None)
            return torch.zeros(rows, 0, device=None if parameter is None else parameter.device)
        return total
