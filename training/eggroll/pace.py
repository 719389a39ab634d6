"""How far members are from the mean, and how far the mean may move."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Pace"]


@dataclass(frozen=True)
class Pace:
    """Sizes of perturbations and steps, each at its generation.

    Attributes:
        sigma: deviation of the perturbations at the start.
        lr: rate at the start.
        sigma_decay: factor on sigma at each step.
        lr_decay: factor on the rate at each step.
        delta_decay: part of the difference from the first weights that each step takes back.
        max_step_norm: cap on the Euclidean norm of one step.
        max_delta_norm: cap on that of the difference from the first weights.

    Raises:
        ValueError: a value is out of range.
    """

    sigma: float
    lr: float
    sigma_decay: float = 1.0
    lr_decay: float = 1.0
    delta_decay: float = 0.0
    max_step_norm: float | None = None
    max_delta_norm: float | None = None

    def __post_init__(self) -> None:
        names = ("sigma", "lr", "sigma_decay", "lr_decay", "max_step_norm", "max_delta_norm")
        for name in names:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number above 0, got {value}")
        if not 0 <= self.delta_decay < 1:
            raise ValueError(f"delta_decay must be in [0, 1), got {self.delta_decay}")

    def sigma_at(self, generation: int) -> float:
        """Deviation of the perturbations of a generation."""
        return self.sigma * self.sigma_decay**generation

    def lr_at(self, generation: int) -> float:
        """Rate of the step that ends a generation."""
        return self.lr * self.lr_decay**generation
