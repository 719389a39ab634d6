"""Theorems about the metrics: they hold for every input, so hypothesis chooses it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsteer.eval import (
    Moments,
    authentic,
    cmmd,
    fd_infinity,
    frechet_distance,
    frechet_distance_from_features,
    inception_score,
    kernel_distance,
    mean_cosine_distance,
    prdc,
    realism,
    vendi,
)
from diffsteer.eval.frechet import (
    Gaussian,
    _sandwich,
    frechet_distance_of_moments,
    frechet_distance_to,
    pivoted_cholesky,
)
from diffsteer.eval.kernel import polynomial_kernel
from diffsteer.eval.moments import _gram
from diffsteer.eval.neighbours import nearest, pair_up, radii_squared

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)


def draw(seed, rows, dim, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=random, dtype=dtype) / dim**0.5
    return torch.randn(rows, dim, generator=random, dtype=dtype) @ mix


def rotation(seed, dim):
    return torch.linalg.qr(draw(seed, dim, dim))[0]


@few
@given(seeds, st.integers(2, 60), st.integers(1, 24), st.floats(-30, 30))
def test_shift_by_d_costs_d_squared_at_any_rank(seed, rows, dim, size):
    x, shift = draw(seed, rows, dim), size * draw(seed + 1, 1, dim)
    expected = float(shift.square().sum())
    found = frechet_distance_from_features(x, x + shift)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@few
@given(seeds, st.integers(3, 60), st.integers(1, 24), st.floats(0.1, 10))
def test_scaling_by_a_costs_one_minus_a_squared_times_the_second_moment(seed, rows, dim, a):
    x = draw(seed, rows, dim) + 1
    sums = Moments.of(x)
    expected = (1 - a) ** 2 * float(sums.mean.square().sum() + sums.covariance.trace())
    assert frechet_distance_from_features(x, a * x) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@few
@given(seeds, st.integers(2, 40), st.integers(2, 40), st.integers(1, 16))
def test_frechet_distance_is_symmetric_and_blind_to_rotation(seed, n, m, dim):
    a, b, turn = draw(seed, n, dim), draw(seed + 1, m, dim) + 0.5, rotation(seed + 2, dim)
    value = frechet_distance_from_features(a, b)
    assert frechet_distance_from_features(b, a) == pytest.approx(value, rel=1e-8, abs=1e-9)
    turned = frechet_distance_from_features(a @ turn, b @ turn)
    assert turned == pytest.approx(value, rel=1e-8, abs=1e-9)


@few
@given(seeds, st.integers(1, 16))
def test_frechet_distance_where_one_covariance_is_a_known_transport_of_the_other(seed, dim):
    root = draw(seed, 2 * dim + 2, dim)
    cov, transport = root.T @ root, torch.diag(draw(seed + 1, 1, dim)[0].abs() + 0.1)
    turn = rotation(seed + 2, dim)
    transport = turn @ transport @ turn.T
    other = transport @ cov @ transport
    zero = torch.zeros(dim, dtype=torch.float64)
    expected = float(cov.trace() + other.trace() - 2 * (cov @ transport).trace())
    found = frechet_distance(zero, cov, zero, (other + other.T) / 2)
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-8 * float(cov.trace() + other.trace()))


@few
@given(seeds, st.integers(1, 30), st.integers(1, 40), st.integers(1, 9), st.floats(0, 8))
def test_pivots_find_the_rank_and_leave_rounding_noise(seed, rank, dim, block, decades):
    rows = draw(seed, rank, dim) * 10 ** torch.linspace(0, -decades / 2, dim)
    matrix = rows.T @ rows
    factor, left = pivoted_cholesky(matrix, block=block)
    scale = float(matrix.diagonal().max())
    assert factor.shape[1] <= min(rank, dim)
    assert float((factor @ factor.T - matrix).abs().max()) <= 1e-13 * dim * scale
    assert left <= 1e-13 * dim * scale


@few
@given(seeds, st.integers(2, 12), st.integers(14, 40))
def test_the_smaller_factor_gives_the_same_distance(seed, few_rows, dim):
    a, b = Moments.of(draw(seed, 3 * dim, dim)), Moments.of(draw(seed + 1, few_rows, dim) + 0.2)
    reference = Gaussian.of(a.mean, a.covariance)
    value = frechet_distance_to(reference, b.mean, b.covariance)
    hinted = frechet_distance_to(reference, b.mean, b.covariance, rank=few_rows - 1)
    assert hinted == pytest.approx(value, rel=1e-9)


@few
@given(seeds, st.integers(1, 20), st.integers(1, 20), st.integers(1, 9), st.booleans())
def test_block_by_block_products_are_the_products(seed, dim, rank, block, triangular):
    factor = draw(seed, dim, dim).tril() if triangular else draw(seed, dim, rank)
    root = draw(seed + 1, dim, dim)
    middle = root + root.T
    plain = factor.T @ middle @ factor
    near = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(_sandwich(factor, middle, block=block).tril(), plain.tril(), **near)
    torch.testing.assert_close(_gram(factor, block=block), factor.T @ factor, **near)


def test_an_indefinite_matrix_is_no_covariance():
    good = draw(1, 20, 8)
    values, vectors = torch.linalg.eigh(good.T @ good)
    values[0] = -1e-4 * values[-1]
    bad = vectors @ torch.diag(values) @ vectors.T
    with pytest.raises(ValueError, match="eigenvalue"):
        frechet_distance(bad[0], (bad + bad.T) / 2, bad[0], torch.eye(8).double())


def test_frechet_distance_of_disjoint_supports_adds_the_traces():
    a, b = torch.zeros(9, 6).double(), torch.zeros(7, 6).double()
    a[:, :3], b[:, 3:] = draw(1, 9, 3), draw(2, 7, 3)
    x, y = Moments.of(a), Moments.of(b)
    expected = (x.mean - y.mean).square().sum() + x.covariance.trace() + y.covariance.trace()
    assert frechet_distance_of_moments(x, y) == pytest.approx(float(expected), rel=1e-12)


@few
@given(seeds, st.integers(2, 30), st.integers(2, 30), st.integers(1, 40))
def test_both_paths_of_the_frechet_distance_agree_at_any_rank(seed, n, m, dim):
    a, b = draw(seed, n, dim), draw(seed + 1, m, dim)
    by_features = frechet_distance_from_features(a, b)
    by_moments = frechet_distance_of_moments(Moments.of(a), Moments.of(b))
    assert by_moments == pytest.approx(by_features, rel=1e-7, abs=1e-7)


@few
@given(seeds, st.lists(st.integers(0, 7), min_size=1, max_size=8), st.permutations(range(9)))
def test_moments_do_not_depend_on_the_split(seed, sizes, order):
    x = draw(seed, sum(sizes) + 2, 5, torch.float32) + 100
    parts = list(torch.split(x, [2, *sizes]))
    whole = Moments.of(x)
    shuffled = [parts[i] for i in order if i < len(parts)]
    merged = Moments.merge([Moments.zero(5), *(Moments.of(p) for p in shuffled if len(p))])
    assert merged.count == whole.count
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-11, atol=1e-12)


@few
@given(seeds, st.integers(4, 50), st.integers(1, 12), st.integers(1, 3), st.integers(3, 64))
def test_a_set_covers_itself(seed, rows, dim, k, chunk):
    x = draw(seed, rows, dim, torch.float32)
    for strict in (True, False):
        found = prdc(x, x, k, strict=strict, chunk=chunk)
        assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
        assert found.density == pytest.approx(1 if strict else (k + 1) / k)


@few
@given(seeds, st.integers(5, 40), st.integers(5, 40), st.integers(2, 10))
def test_prdc_counts_do_not_change_by_shift_rotation_by_axes_or_order(seed, n, m, dim):
    # Integers: shifts and axis swaps are exact, so the counts must be identical, ties included.
    random = torch.Generator().manual_seed(seed)
    a = torch.randint(-4, 5, (n, dim), generator=random).float()
    b = torch.randint(-4, 5, (m, dim), generator=random).float()
    value = prdc(a, b, 3)
    axes = torch.randperm(dim, generator=random)
    rows = torch.randperm(n, generator=random)
    assert prdc(a[rows][:, axes] + 1024, b[:, axes] + 1024, 3, chunk=7) == value


def test_errors_of_precision_and_density_are_those_of_means_over_samples():
    real, fake = draw(1, 200, 3), 1.5 * draw(2, 150, 3)
    found = prdc(real, fake, 3)
    radius = torch.cdist(real, real).sort(1).values[:, 3]
    balls = (torch.cdist(fake, real) <= radius).sum(1).double()
    for value, mean, error in (
        ((balls > 0).double(), found.precision, found.precision_stderr),
        (balls / 3, found.density, found.density_stderr),
    ):
        assert mean == pytest.approx(float(value.mean()))
        assert error == pytest.approx(float(value.std()) / 150**0.5)


@few
@given(seeds, st.integers(6, 60), st.integers(1, 5), st.integers(1, 70))
def test_radii_do_not_depend_on_tiles_or_on_which_half_is_computed(seed, rows, k, chunk):
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (rows, 4), generator=random).float()  # ties and copies too
    points = pair_up(x, x)[0]
    exact = torch.cdist(x.double(), x.double()).fill_diagonal_(torch.inf).square()
    expected = exact.sort(1).values[:, k - 1].round()
    assert torch.equal(radii_squared(points, k, chunk=chunk), expected)
    whole_rows = nearest(points, points, k + 1, chunk=chunk)[0]  # the nearest is itself
    assert torch.equal(whole_rows[:, k], expected)


def test_far_sets_have_nothing_in_common():
    found = prdc(draw(1, 20, 4), draw(2, 30, 4) + 1e4)
    assert (found.precision, found.recall, found.density, found.coverage) == (0, 0, 0, 0)


def test_equal_points_separate_the_two_conventions():
    x, y = torch.ones(12, 3), torch.ones(9, 3)
    closed, open_ = prdc(x, y, 3), prdc(x, y, 3, strict=True)
    assert (closed.precision, closed.recall, closed.coverage) == (1, 1, 1)
    assert closed.density == pytest.approx(12 / 3)
    assert (open_.precision, open_.recall, open_.density, open_.coverage) == (0, 0, 0, 0)


@pytest.mark.parametrize("count", [2, 5, 17])
def test_kernel_distance_of_scaled_orthonormal_sets(count):
    x = count**0.5 * torch.eye(count).double()
    assert kernel_distance(x, x).value == pytest.approx(-14 / count, rel=1e-12)


@few
@given(seeds, st.integers(2, 40), st.integers(2, 40), st.integers(1, 8), st.integers(1, 50))
def test_kernel_distance_is_the_textbook_sum_at_any_chunk(seed, n, m, dim, chunk):
    x, y = draw(seed, n, dim), draw(seed + 1, m, dim) + 0.2
    xx, yy, xy = (polynomial_kernel(a, b) for a, b in ((x, x), (y, y), (x, y)))
    off_x = (xx.sum() - xx.trace()) / (n * (n - 1))
    off_y = (yy.sum() - yy.trace()) / (m * (m - 1))
    expected = float(off_x + off_y - 2 * xy.mean())
    found = kernel_distance(x, y, chunk=chunk).value
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9 * float(xx.abs().max()))


def test_jackknife_error_of_the_kernel_distance_is_its_spread_over_redraws():
    redraws = []
    for seed in range(60):
        random = torch.Generator().manual_seed(seed)
        real, fake = torch.randn(2, 200, 4, generator=random, dtype=torch.float64)
        redraws.append(kernel_distance(real, fake + 1))
    spread = torch.tensor([r.value for r in redraws]).std()
    claimed = torch.tensor([r.stderr for r in redraws]).mean()
    assert 0.7 < float(claimed / spread) < 1.4


@pytest.mark.parametrize("classes, copies", [(10, 30), (4, 8)])
def test_inception_score_of_uniform_and_one_hot_predictions(classes, copies):
    hard = torch.eye(classes).double().repeat(copies, 1)
    one_split = {"splits": 1, "from_probabilities": True}
    assert inception_score(hard, **one_split).value == pytest.approx(classes)
    flat = torch.full((60, classes), 1 / classes).double()
    assert inception_score(flat, splits=3, from_probabilities=True).value == pytest.approx(1)
    by_class = hard[hard.argmax(1).argsort(stable=True)]
    unshuffled = inception_score(by_class, splits=classes, seed=None, from_probabilities=True)
    assert unshuffled.value == pytest.approx(1)  # the trap: the order of files decides


def test_vendi_counts_groups():
    assert vendi(torch.eye(7)) == pytest.approx(7)
    assert vendi(torch.ones(7, 3)) == pytest.approx(1)
    groups = torch.eye(4).repeat_interleave(5, 0)
    for order in (0.5, 1.0, 2.0, math.inf):
        assert vendi(groups, order=order) == pytest.approx(4)


def test_cmmd_of_two_orthogonal_points():
    a, b = torch.tensor([[1.0, 0.0]]).repeat(3, 1), torch.tensor([[0.0, 2.0]]).repeat(4, 1)
    assert cmmd(a, b) == pytest.approx(2000 * (1 - math.exp(-0.01)), rel=1e-12)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-12)


def test_diversity_is_the_mean_over_pairs_of_a_group():
    x, groups = draw(3, 12, 5), torch.tensor([0] * 5 + [1] * 6 + [2])
    unit = torch.nn.functional.normalize(x, dim=1)
    means = []
    for group in (0, 1):
        rows = unit[groups == group]
        gaps = 1 - rows @ rows.T
        means.append(gaps[~torch.eye(len(rows), dtype=torch.bool)].mean())
    assert mean_cosine_distance(x, groups) == pytest.approx(float(sum(means)) / 2)
    assert mean_cosine_distance(torch.ones(4, 3)) == pytest.approx(0, abs=1e-12)


def test_copies_are_not_authentic_and_infinitely_real():
    real = draw(4, 40, 6)
    assert not authentic(real, real[:10]).any()
    assert authentic(real, real[:10] + 100).all()
    scores = realism(real, real)  # the half of the real samples that have a ball meet themselves
    assert int(torch.isinf(scores).sum()) == 20
    assert bool((realism(real, real[:10] + 100) < 1).all())


def test_fd_infinity_removes_the_bias_of_small_sets():
    dim = 8
    truth = Gaussian.of(torch.zeros(dim), torch.eye(dim))
    random = torch.Generator().manual_seed(11)
    plain, extrapolated = [], []
    for _ in range(20):
        fake = torch.randn(400, dim, generator=random, dtype=torch.float64)
        sums = Moments.of(fake)
        plain.append(frechet_distance_to(truth, sums.mean, sums.covariance))
        extrapolated.append(fd_infinity(truth, fake).value)
    bias, left = torch.tensor(plain).mean(), torch.tensor(extrapolated).mean()
    assert float(bias) > 0.03  # same distribution: the truth is 0
    assert abs(float(left)) < 0.2 * float(bias)
