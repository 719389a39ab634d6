"""Noise that belongs to a seed, not to a place in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from .tensors import send


def seeded_generators(
    seeds: Sequence[int], device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """One generator a sample: what diffusers pipelines take as ``generator=``.

    Args:
        seeds: one integer in [0, 2**64) a sample.
        device: where the generators live. The CPU (default) gives the same noise on every device.

    Raises:
        TypeError: if a seed is not an integer.
        ValueError: if a seed is out of range.
    """
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, Integral):
            raise TypeError(f"seeds must be integers, got {seed!r} of type {type(seed).__name__}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seeds must be in [0, 2**64), got {seed}")
    return [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]


def noise_like_seeds(
    generators: Sequence[torch.Generator],
    shape: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise, one row a generator.

    Args:
        generators: B generators; each is advanced by one draw of ``shape``.
        shape: the shape of one sample, without the batch dimension.
        device: where the result goes; the draw happens where the generators live, in float32.
        dtype: of the result. The draw is float32 and then cast, so precision does not change a
            seed.

    Returns:
        Shape (B, *shape); row i depends on ``generators[i]`` alone.
    """
    rows = [torch.randn(tuple(shape), generator=g, device=g.device) for g in generators]
    if not rows:
        return torch.empty((0, *shape), device=device, dtype=dtype)
    return send(torch.stack(rows), device, dtype)


def seeded_noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise, (len(seeds), *shape); row i depends on ``seeds[i]`` alone.

    Example:
        >>> whole = seeded_noise([3, 5, 8], (2, 2))
        >>> bool((whole[1:2] == seeded_noise([5], (2, 2))).all())
        True
    """
    return noise_like_seeds(seeded_generators(seeds), shape, device=device, dtype=dtype)
