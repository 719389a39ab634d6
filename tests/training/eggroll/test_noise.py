"""The draw: pinned bit by bit, the same whatever is drawn beside it, with the moments it claims."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import pytest
import torch

from diffsteer.training.eggroll import BASELINE, NoiseFormat, member_noise
from diffsteer.training.eggroll.noise import bias_noise, pair_factors

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Matrix:
    name: str = "blocks.0.to_q"
    rows: int = 5
    columns: int = 7


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def words(noise: NoiseFormat, name: str, part: str, pair: int, step: int, count: int) -> list[int]:
    """The format in plain integers, from its description alone."""
    fields = ("diffsteer eggroll", 1, noise.seed, step // noise.reuse, name, part)
    text = "\0".join(str(field) for field in fields).encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    start = mix((key + GAMMA * (pair + 1)) & MASK)
    return [mix((start + GAMMA * (word + 1)) & MASK) for word in range(count)]


def normal_of(code: int, rms: float) -> float:
    """The quantile that a signed 16-bit code stands for, on its grid."""
    upper = code if code >= 0 else -1 - code
    value = NormalDist().inv_cdf((upper + 2**15 + 0.5) / 2**16) / rms
    return math.copysign(round(value * 2**16) / 2**16, 1 if code >= 0 else -1)


@pytest.fixture(scope="module")
def rms() -> float:
    inverse = NormalDist().inv_cdf
    squares = [inverse((i + 2**15 + 0.5) / 2**16) ** 2 for i in range(2**15)]
    return math.sqrt(math.fsum(squares) / 2**15)


def test_the_gaussian_draw_is_what_its_description_says(rms: float) -> None:
    noise, layer = NoiseFormat(seed=11, rank=2, reuse=3), Matrix()
    a, b = member_noise(noise, layer, 4, 10)
    drawn = words(noise, layer.name, "weight", 4, 10, 6)  # 24 draws, ceil(2 * 12 / 4) words
    codes = [(w >> shift) & 0xFFFF for w in drawn for shift in (0, 16, 32, 48)]
    values = [normal_of(c - 2**16 if c >= 2**15 else c, rms) for c in codes]
    expected = torch.tensor(values).view(2, 12)
    assert torch.equal(b, expected[:, :7].T)
    assert torch.equal(a, expected[:, 7:].T)


def test_the_sign_draw_is_what_its_description_says() -> None:
    noise, layer = NoiseFormat(seed=2**40, kind="rademacher"), Matrix(rows=70)
    a, b = member_noise(noise, layer, 0, 0)
    drawn = words(noise, layer.name, "weight", 0, 0, 2)
    signs = [1.0 if (w >> bit) & 1 else -1.0 for w in drawn for bit in range(64)][:77]
    assert torch.cat([b, a]).flatten().tolist() == signs
    bias = bias_noise(noise, layer, [0], 0)[0]
    (word, _) = words(noise, layer.name, "bias", 0, 0, 2)
    assert bias[:64].tolist() == [1.0 if (word >> bit) & 1 else -1.0 for bit in range(64)]


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_a_pair_is_the_same_whatever_is_drawn_beside_it(kind: str) -> None:
    noise, layer = NoiseFormat(seed=0, rank=3, kind=kind), Matrix()
    together = pair_factors(noise, layer, range(9), 5)
    shuffled = pair_factors(noise, layer, [8, 2, 2], 5)
    for whole, part in zip(together, shuffled, strict=True):
        assert torch.equal(whole[[8, 2, 2]], part)
    alone = member_noise(noise, layer, 2, 5)
    assert torch.equal(together[0][2].T, alone[0])
    wide = member_noise(noise, layer, 2, 5, dtype=torch.float64)
    assert torch.equal(wide[0].float(), alone[0])
    narrow = member_noise(noise, layer, 2, 5, dtype=torch.bfloat16)
    assert torch.equal(narrow[1], alone[1].bfloat16())


def test_other_layers_pairs_steps_and_seeds_get_other_noise() -> None:
    noise = NoiseFormat(seed=3)
    draws = [
        member_noise(replace(noise, seed=seed), Matrix(name, 40, 40), pair, step)[0].flatten()
        for seed in (3, 4)
        for name in ("a", "b")
        for pair in (0, 1)
        for step in (0, 1)
    ]
    correlation = torch.corrcoef(torch.stack(draws))
    assert (correlation - torch.eye(16)).abs().max() < 4.5 / math.sqrt(40)
    assert torch.equal(draws[0], member_noise(noise, Matrix("a", 40, 40), 0, 0)[0].flatten())


def test_directions_are_reused_for_as_many_steps_as_asked() -> None:
    noise, layer = NoiseFormat(seed=0, reuse=2), Matrix()
    first, second, third = (member_noise(noise, layer, 0, step)[0] for step in range(3))
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


@pytest.mark.parametrize(("kind", "kurtosis"), [("gaussian", 2.9992), ("rademacher", 1.0)])
def test_entries_have_mean_zero_variance_one_and_the_kurtosis_claimed(
    kind: str, kurtosis: float
) -> None:
    layer = Matrix(rows=500, columns=500)
    a, b = pair_factors(NoiseFormat(1, kind=kind), layer, range(400), 0, dtype=torch.float64)
    entries = torch.cat([a.flatten(), b.flatten()])
    n = math.sqrt(len(entries))
    assert abs(entries.mean()) < 4 / n
    assert abs(entries.square().mean() - 1) < 4 * math.sqrt(max(kurtosis - 1, 1e-12)) / n + 1e-9
    assert abs(entries.pow(4).mean() - kurtosis) < 4 * math.sqrt(96) / n + 1e-4
    assert abs(entries.pow(3).mean()) < 4 * math.sqrt(15) / n


def test_members_come_in_pairs_of_opposite_signs() -> None:
    noise = NoiseFormat(0)
    assert [noise.source(m) for m in (0, 1, 6, 7)] == [(0, 1.0), (0, -1.0), (3, 1.0), (3, -1.0)]
    assert noise.source(BASELINE) == (0, 0.0)
    single = replace(noise, antithetic=False)
    assert [single.source(m) for m in (0, 1, 7)] == [(0, 1.0), (1, 1.0), (7, 1.0)]
    with pytest.raises(ValueError, match="members are numbered from 0"):
        noise.source(-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"kind": "uniform"}, "kind must be one of gaussian, rademacher"),
        ({"reuse": 0}, "reuse must be at least 1"),
        ({"version": 2}, "noise format 2 is not known"),
    ],
)
def test_formats_that_cannot_be_drawn_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseFormat(seed=0, **change)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_the_gpu_draws_the_bits_of_the_cpu(kind: str) -> None:
    noise, layer = NoiseFormat(seed=7, rank=4, kind=kind), Matrix(rows=33, columns=129)
    here = pair_factors(noise, layer, range(5), 2)
    there = pair_factors(noise, layer, range(5), 2, device="cuda")
    assert all(torch.equal(x, y.cpu()) for x, y in zip(here, there, strict=True))
