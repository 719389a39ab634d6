"""Rewards of the colours of an image: brightness, and nearness to a colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.tensors import send
from .protocol import Metadata

__all__ = ["Brightness", "ColourTarget"]

LUMA = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709


@dataclass(frozen=True)
class Brightness:
    """The mean luma of the pixels (BT.709 weights, no gamma), in [0, 1].

    Args:
        target: None rewards bright images; a number rewards images of that mean luma, by minus the
            distance to it.

    Raises:
        ValueError: ``target`` is outside [0, 1].
    """

    target: float | None = None

    def __post_init__(self) -> None:
        """Refuse a target that no image has."""
        if self.target is not None and not 0 <= self.target <= 1:
            raise ValueError(f"target must be in [0, 1], got {self.target}")

    def __call__(
        self, images: Tensor, prompts: Sequence[str] = (), metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores (B,), differentiable in the images."""
        weights = send(LUMA, images.device)
        luma = images.float().mean((2, 3)) @ weights
        return luma if self.target is None else -(luma - self.target).abs()


@dataclass(frozen=True)
class ColourTarget:
    """Minus the root mean square distance of the pixels to one colour: 0 at best, -1 at worst.

    Args:
        red: of the colour, in [0, 1].
        green: of the colour.
        blue: of the colour.

    Raises:
        ValueError: a value is outside [0, 1].
    """

    red: float = 1.0
    green: float = 0.5
    blue: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no colour."""
        for value in (self.red, self.green, self.blue):
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise ValueError(f"red, green and blue must be in [0, 1], got {value}")

    def __call__(
        self, images: Tensor, prompts: Sequence[str] = (), metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores (B,), differentiable in the images."""
        colour = torch.tensor((self.red, self.green, self.blue), device=images.device)
        gaps = images.float() - colour[:, None, None]
        return -gaps.square().mean((1, 2, 3)).sqrt()
