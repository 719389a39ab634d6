"""E4, E5, E6: the laws of low-rank noise in closed form, by sampling within their standard errors.

Member noise E = A B^T / sqrt(r) has fourth moment 3 + 6 / r, is unbiased for the gradient of any
quadratic at any rank, and for a linear fitness has the error
``((1 - 1/r)(mn + 2) + (m + 2)(n + 2)/r - 1) / N`` relative to the squared gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from diffsteer.training.eggroll import (
    NoiseFormat,
    es_gradient,
    find_layers,
    perturbed,
    shape_fitness,
)
from diffsteer.training.eggroll.noise import pair_factors


@dataclass(frozen=True)
class Matrix:
    name: str = "w"
    rows: int = 12
    columns: int = 20


def directions(
    count: int, rank: int, matrix: Matrix, *, kind: str = "gaussian", step: int = 0
) -> Tensor:
    """E of the first ``count`` pairs, (count, m, n), float64."""
    noise = NoiseFormat(seed=42, rank=rank, kind=kind)
    a, b = pair_factors(noise, matrix, range(count), step, dtype=torch.float64)
    return torch.einsum("prm,prn->pmn", a, b) / math.sqrt(rank)


@pytest.mark.parametrize("rank", [1, 2, 4, 16])
def test_the_fourth_moment_is_three_plus_six_over_the_rank(rank: int) -> None:
    entries = directions(60_000, rank, Matrix(rows=2, columns=2))
    fourth = entries.pow(4).mean((1, 2))  # one value a pair: its entries are not independent
    error = float(fourth.std()) / math.sqrt(len(fourth))
    assert abs(float(fourth.mean()) - (3 + 6 / rank)) < 4 * error + 0.003 * (3 + 6 / rank)
    assert error < 0.35
    second = entries.square().mean((1, 2))
    assert abs(float(second.mean()) - 1) < 4 * float(second.std()) / math.sqrt(len(second))


@pytest.mark.parametrize(("kind", "rank"), [("gaussian", 1), ("gaussian", 2), ("gaussian", 8)])
def test_the_error_for_a_linear_fitness_and_its_cosine(kind: str, rank: int) -> None:
    m, n, members, trials = 12, 20, 64, 300
    gradient = torch.randn(m, n, dtype=torch.float64)
    noise = directions(members * trials, rank, Matrix(), kind=kind)
    fitness = (noise * gradient).sum((1, 2))
    estimates = (fitness[:, None, None] * noise).view(trials, members, m, n).mean(1)
    error = (estimates - gradient).square().sum((1, 2)) / gradient.square().sum()
    predicted = ((1 - 1 / rank) * (m * n + 2) + (m + 2) * (n + 2) / rank - 1) / members
    assert abs(float(error.mean()) - predicted) < 4 * float(error.std()) / math.sqrt(trials)
    cosine = torch.cosine_similarity(estimates.flatten(1), gradient.flatten()[None])
    assert abs(float(cosine.mean()) - 1 / math.sqrt(1 + predicted)) < 0.02


def test_signs_have_the_lower_error_that_theory_gives() -> None:
    m, n, members, trials = 12, 20, 64, 300
    gradient = torch.randn(m, n, dtype=torch.float64)
    noise = directions(members * trials, 1, Matrix(), kind="rademacher")
    fitness = (noise * gradient).sum((1, 2))
    estimates = (fitness[:, None, None] * noise).view(trials, members, m, n).mean(1)
    error = (estimates - gradient).square().sum((1, 2)) / gradient.square().sum()
    assert abs(float(error.mean()) - (m * n - 1) / members) < 4 * float(error.std()) / trials**0.5


def test_pairs_have_twice_the_error_of_as_many_single_members() -> None:
    # A linear fitness tells the second of a pair nothing new: half of the evaluations are spent.
    m, n, trials = 12, 20, 300
    gradient = torch.randn(m, n, dtype=torch.float64)
    errors = []
    for directions_used in (64, 32):
        noise = directions(directions_used * trials, 1, Matrix(), step=directions_used)
        fitness = (noise * gradient).sum((1, 2))
        estimates = (fitness[:, None, None] * noise).view(trials, -1, m, n).mean(1)
        errors.append((estimates - gradient).square().sum((1, 2)).mean() / gradient.square().sum())
    assert float(errors[1] / errors[0]) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("rank", [1, 4])
def test_pairs_are_unbiased_for_quadratics_at_any_rank(rank: int) -> None:
    matrix, sigma = Matrix(rows=3, columns=4), 0.7
    curvature = torch.randn(12, 12, dtype=torch.float64)
    curvature, slope = curvature + curvature.T, torch.randn(12, dtype=torch.float64)
    noise = directions(30_000, rank, matrix).flatten(1)

    def fitness(w: Tensor) -> Tensor:
        return w @ slope + 0.5 * torch.einsum("pi,ij,pj->p", w, curvature, w)

    difference = (fitness(sigma * noise) - fitness(-sigma * noise)) / (2 * sigma)
    samples = difference[:, None] * noise
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - slope).abs() < 4 * error).all()
    assert error.max() < 0.2 * slope.norm()


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_the_bias_for_a_cubic_falls_as_one_over_the_rank(rank: int) -> None:
    # f = w_11^3 at w = 0: E[f(sigma E) E_11] / sigma = sigma^2 E[E_11^4]
    sigma = 0.5
    entry = directions(200_000, rank, Matrix(rows=1, columns=1)).flatten()
    samples = sigma**2 * entry.pow(4)
    error = float(samples.std()) / math.sqrt(len(samples))
    predicted = sigma**2 * (3 + 6 / rank)
    assert abs(float(samples.mean()) - predicted) < 4 * error + 0.003 * predicted
    assert error < 0.05 * predicted


def test_the_cosine_with_the_gradient_of_a_network_grows_as_theory_says() -> None:
    """As sqrt(N / d) while N is small, and to 1 in the end: D = (m + 2)(n + 2) / N summed up."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double().eval()
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.randn(32, 4, dtype=torch.float64)
    layers = find_layers(model)
    weights = [layer.module.weight for layer in layers.values()]
    loss = -(model(x) - y).square().mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
    # Each layer sees the noise of its own linear fitness and that of the other layers.
    parts = {name: g for name, g in zip(layers, gradient.split([60, 40]), strict=True)}
    measured = []
    for size in (16, 256, 4096):
        cosines = []
        for seed in range(8):
            noise, options = NoiseFormat(seed), {"sigma": 1e-3, "step": 0, "rows_per_member": 32}
            with perturbed(model, range(size), noise=noise, layers=layers, **options):
                outputs = model(x.repeat(size, 1)).view(size, 32, 4)
            shaped = shape_fitness(-(outputs - y).square().mean((1, 2)))
            found = [es_gradient(noise, layer, 0, 1e-3, shaped) for layer in layers.values()]
            estimate = torch.cat([g.flatten() for one in found for g in one.values()])
            cosines.append(torch.cosine_similarity(estimate, gradient, dim=0))
        pairs, total, error = size // 2, gradient.square().sum(), 0.0
        for name, layer in layers.items():
            own, (m, n) = parts[name].square().sum(), (layer.rows, layer.columns)
            error += float(((m + 2) * (n + 2) - 1) * own + m * n * (total - own)) / pairs
        predicted = 1 / math.sqrt(1 + error / float(total))
        measured.append(float(torch.stack(cosines).mean()))
        assert measured[-1] == pytest.approx(predicted, rel=0.15 if size == 16 else 0.05)
    assert measured[0] < 0.35 and measured[2] > 0.95
