"""Per-sample scalars, dot products and norms."""

from __future__ import annotations

import math

import pytest
import torch

from diffsteer.core import per_sample, sample_dot, sample_norm

SHAPES = [(3,), (3, 7), (3, 4, 5), (3, 2, 4096), (2, 8192), (3, 5, 2500)]


@pytest.mark.parametrize("shape", SHAPES)
def test_dot_and_norm_run_over_everything_but_the_batch(shape: tuple[int, ...]) -> None:
    a, b = torch.randn(shape).double(), torch.randn(shape).double()
    dots = torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)])
    norms = torch.stack([x.square().sum().sqrt() for x in a])
    torch.testing.assert_close(sample_dot(a, b), dots)
    torch.testing.assert_close(sample_norm(a), norms)


def test_strided_inputs() -> None:
    a = torch.randn(2, 300, 40).transpose(1, 2)
    torch.testing.assert_close(sample_norm(a), sample_norm(a.contiguous()))
    torch.testing.assert_close(sample_norm(a[:, ::3]), sample_norm(a[:, ::3].contiguous()))


def test_weights_leave_out_what_is_padding() -> None:
    a, b = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    weight = torch.tensor([1.0, 1, 1, 0, 0])[:, None]
    torch.testing.assert_close(sample_dot(a, b, weight), sample_dot(a[:, :3], b[:, :3]))
    torch.testing.assert_close(sample_norm(a, weight), sample_norm(a[:, :3]))


def test_norms_of_long_samples_keep_their_digits() -> None:
    """One float32 sum over a video latent loses four of its seven digits on the CPU."""
    a = torch.randn(1, 3_000_001)
    exact = math.sqrt(float(a.double().square().sum()))
    assert float(sample_norm(a)) == pytest.approx(exact, rel=3e-7)
    assert float(sample_dot(a, a)) == pytest.approx(exact**2, rel=6e-7)


@pytest.mark.parametrize("like", [(3, 3), (3, 2, 3), (3, 2, 3, 3), (3, 1, 2, 3, 3)])
def test_one_value_a_sample_never_runs_over_the_width(like: tuple[int, ...]) -> None:
    scalar, x = torch.tensor([1.0, 2.0, 3.0]), torch.ones(like)
    assert torch.equal((per_sample(scalar, x) * x).flatten(1)[:, 0], scalar)
    assert (per_sample(scalar, x) * x).flatten(1).std(1).max() == 0


def test_a_scalar_goes_to_all() -> None:
    assert per_sample(torch.tensor(2.0), torch.ones(3, 4)).shape == (1, 1)
    assert per_sample(torch.tensor([2.0]), torch.ones(3, 4)).shape == (1, 1)


@pytest.mark.parametrize("shape", [(4,), (2,), (3, 1), (3, 1, 1, 1), (1, 1)])
def test_nothing_is_guessed(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(\) or \(3,\), got .*; pass noise levels"):
        per_sample(torch.ones(shape), torch.ones(3, 2, 4, 4))
