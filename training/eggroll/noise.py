"""Perturbations that are never stored: each entry is a function of seed, step, pair and layer.

The draw (format 1) is integer arithmetic and a table, so it has the same bits on every device:

    key   = blake2b("diffsteer eggroll 1", seed, step // reuse, layer name, part)      64 bits
    pair  = mix(key + gamma * (pair index + 1))
    word  = mix(pair + gamma * (word index + 1))             mix, gamma: those of SplitMix64
    draws = the words as little-endian 16-bit numbers, looked up in a table of normal quantiles,
            or bit by bit, lowest first, as signs

Row k of the r x (n + m) draws of a pair holds column k of B (n entries), then column k of A (m).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ...core.tensors import send

__all__ = [
    "BASELINE",
    "NOISE_KINDS",
    "Matrix",
    "NoiseFormat",
    "bias_noise",
    "member_noise",
    "pair_factors",
]

BASELINE = -1  # the member without noise: the mean parameters
NOISE_KINDS = ("gaussian", "rademacher")
VERSION = 1

_GAMMA = 0x9E3779B97F4A7C15
_TABLE_DIGEST = "7d1e2b7bb7897ef6"


class Matrix(Protocol):
    """What noise is drawn for: a named matrix of ``rows`` outputs and ``columns`` inputs."""

    @property
    def name(self) -> str:
        """Where the matrix is in the model; the key of its noise."""

    @property
    def rows(self) -> int:
        """Outputs, m."""

    @property
    def columns(self) -> int:
        """Inputs, n."""


@dataclass(frozen=True)
class NoiseFormat:
    """Which noise a run draws. Store it with the run: replaying needs every field.

    Args:
        seed: of the run.
        rank: columns of A and B, r; the perturbation is ``E = A B^T / sqrt(r)``.
        kind: "gaussian" or "rademacher". Both have mean 0, variance 1 and are symmetric. The
            Gaussian takes 65536 values, up to 4.3 deviations; its kurtosis is 2.999.
        antithetic: members 2p and 2p + 1 get plus and minus the noise of pair p. False: member p
            gets plus the noise of "pair" p.
        reuse: steps that share directions. 1: new ones at every step.
        version: of the draw.

    Raises:
        ValueError: an argument is out of range, or the version is not one that this code draws.
    """

    seed: int
    rank: int = 1
    kind: str = "gaussian"
    antithetic: bool = True
    reuse: int = 1
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.kind not in NOISE_KINDS:
            raise ValueError(f"kind must be one of {', '.join(NOISE_KINDS)}, got {self.kind!r}")
        if self.reuse < 1:
            raise ValueError(
                f"reuse must be at least 1, got {self.reuse}: 1 draws new directions at every "
                "step (in the authors' code 0 means the same directions for ever)"
            )
        if self.version != VERSION:
            raise ValueError(
                f"noise format {self.version} is not known here, which draws format {VERSION}; "
                "use the version of the package that the run was made with"
            )

    def source(self, member: int) -> tuple[int, float]:
        """The pair whose noise ``member`` gets, and with which sign; (0, 0.0) for BASELINE."""
        if member == BASELINE:
            return 0, 0.0
        if member < 0:
            raise ValueError(f"members are numbered from 0 (or BASELINE, -1), got {member}")
        return (member // 2, 1.0 - 2.0 * (member % 2)) if self.antithetic else (member, 1.0)

    def pairs_of(self, members: int) -> int:
        """How many pairs (or single directions) ``members`` members use."""
        return members // 2 if self.antithetic else members


def member_noise(
    noise: NoiseFormat,
    layer: Matrix,
    pair: int,
    step: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The factors of one pair at one layer: A (m, r) and B (n, r), with ``E = A B^T / sqrt(r)``.

    The same bits on every rank and device and for any grouping of members: the draw is exact
    integer arithmetic; ``dtype`` is a cast at the end (exact for float32 and wider).
    """
    a, b = pair_factors(noise, layer, [pair], step, device=device, dtype=dtype)
    return a[0].T, b[0].T


def pair_factors(
    noise: NoiseFormat,
    layer: Matrix,
    pairs: Sequence[int],
    step: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The factors of several pairs, transposed: A (P, r, m) and B (P, r, n), views of one draw."""
    width = layer.columns + layer.rows
    flat = _draw(noise, layer.name, "weight", pairs, step, noise.rank * width, device)
    both = flat.view(len(pairs), noise.rank, width).to(dtype)
    return both[..., layer.columns :], both[..., : layer.columns]


def bias_noise(
    noise: NoiseFormat,
    layer: Matrix,
    pairs: Sequence[int],
    step: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The noise of a layer's bias, (P, m): full, since a vector has no ranks."""
    return _draw(noise, layer.name, "bias", pairs, step, layer.rows, device).to(dtype)


def _draw(
    noise: NoiseFormat,
    name: str,
    part: str,
    pairs: Sequence[int],
    step: int,
    count: int,
    device: torch.device | str,
) -> Tensor:
    """``count`` draws for each pair, (P, count), float32."""
    fields = ("diffsteer eggroll", noise.version, noise.seed, step // noise.reuse, name, part)
    text = "\0".join(map(str, fields)).encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    index = send(torch.tensor(pairs, dtype=torch.int64), device)
    starts = _mix((index + 1) * _signed(_GAMMA) + _signed(key))
    per_word = 4 if noise.kind == "gaussian" else 64
    words = torch.arange(1, math.ceil(count / per_word) + 1, device=device) * _signed(_GAMMA)
    bits = _mix(starts[:, None] + words)
    values = _normal(bits) if noise.kind == "gaussian" else _signs(bits)
    return values[:, :count]


def _signed(value: int) -> int:
    """The 64-bit pattern of ``value`` as the int64 that torch computes with (it wraps around)."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _mix(z: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014), a bijection of 64-bit integers."""
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    # torch's >> copies the sign bit; the mask makes it the logical shift.
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _normal(bits: Tensor) -> Tensor:
    lanes = bits.view(torch.int16)
    index = lanes.to(torch.int32).add_(2**15)
    return _table(str(bits.device)).index_select(0, index.flatten()).view(lanes.shape)


def _signs(bits: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    single = (bits.view(torch.uint8)[..., None] >> places) & 1
    return single.flatten(1).float().mul_(2).sub_(1)


@lru_cache(maxsize=16)
def _table(device: str) -> Tensor:
    """65536 quantiles of the normal law, variance 1, on a grid of 2**-16; checked by its digest."""
    upper = torch.special.ndtri((torch.arange(2**15, dtype=torch.float64) + 2**15 + 0.5) / 2**16)
    upper = (upper / upper.square().mean().sqrt() * 2**16).round() / 2**16
    table = torch.cat([-upper.flip(0), upper]).float()
    digest = hashlib.blake2b(table.numpy().tobytes(), digest_size=8).hexdigest()
    if digest != _TABLE_DIGEST:
        raise RuntimeError(
            f"the table of normal quantiles came out otherwise on this machine ({digest} instead "
            f"of {_TABLE_DIGEST}): its noise would not agree with other machines; use "
            "kind='rademacher', which needs no table, and report this"
        )
    return table.to(device)
