"""A seed names a sample, not a place in a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from diffsteer.core import noise_like_seeds, seeded_generators, seeded_noise

SEEDS = [7, 0, 123456789, 7]


@pytest.mark.parametrize("shape", [(3,), (4, 8, 8), (1, 3, 5)])
def test_a_row_depends_on_its_seed_alone(shape: tuple[int, ...]) -> None:
    whole = seeded_noise(SEEDS, shape)
    rows = [seeded_noise([seed], shape) for seed in SEEDS]
    assert torch.equal(whole, torch.cat(rows)) and whole.shape == (4, *shape)
    assert torch.equal(whole[0], whole[3]) and not torch.equal(whole[0], whole[1])


def test_the_generators_of_a_pipeline_draw_the_same() -> None:
    """What ``pipe(generator=[...])`` does: diffusers' randn_tensor with a list of generators."""
    from diffusers.utils.torch_utils import randn_tensor

    theirs = randn_tensor((4, 2, 8, 8), generator=seeded_generators(SEEDS))
    assert torch.equal(seeded_noise(SEEDS, (2, 8, 8)), theirs)


def test_generators_go_on_where_they_were() -> None:
    generators = seeded_generators([1, 2])
    first, second = noise_like_seeds(generators, (5,)), noise_like_seeds(generators, (5,))
    assert not torch.equal(first, second)
    assert torch.equal(first, seeded_noise([1, 2], (5,)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_precision_does_not_change_a_seed(dtype: torch.dtype) -> None:
    assert torch.equal(seeded_noise([3], (9,), dtype=dtype), seeded_noise([3], (9,)).to(dtype))


def test_is_standard_normal_across_and_within_seeds() -> None:
    noise = seeded_noise(range(500), (20,)).numpy()
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert stats.kstest(noise[:, 0], "norm").pvalue > 1e-3
    pairs = np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]
    assert abs(pairs) < 4 / np.sqrt(500)


def test_no_seeds_no_samples() -> None:
    assert seeded_noise([], (3, 4)).shape == (0, 3, 4)


def test_numpy_integers_are_integers() -> None:
    assert torch.equal(seeded_noise(np.array([5]), (3,)), seeded_noise([5], (3,)))


@pytest.mark.parametrize(
    "seed, error",
    [(1.0, TypeError), ("1", TypeError), (True, TypeError), (-1, ValueError), (2**64, ValueError)],
)
def test_what_is_no_seed_is_refused(seed: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="seeds must"):
        seeded_noise([seed], (3,))  # type: ignore[list-item]


@pytest.mark.gpu
def test_the_same_noise_on_the_gpu() -> None:
    assert torch.equal(seeded_noise(SEEDS, (8,), device="cuda").cpu(), seeded_noise(SEEDS, (8,)))
