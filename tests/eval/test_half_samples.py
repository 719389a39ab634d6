"""Errors by half-sampling: right for means, right for the Fréchet distance, smaller for pairs."""

from __future__ import annotations

import math

import pytest
import torch

from diffsteer.eval.features import FeatureSet
from diffsteer.eval.frechet import Gaussian, frechet_distance_to
from diffsteer.eval.half_samples import Estimate, HalfSampling, mean_of
from diffsteer.eval.moments import Moments
from diffsteer.eval.prdc import prdc

DIM = 3
REFERENCE = Gaussian.of(torch.zeros(DIM), torch.eye(DIM))


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def samples(features: torch.Tensor, labels: torch.Tensor | None = None) -> FeatureSet:
    count = len(features)
    logits = torch.nn.functional.pad(features, (0, 1))
    return FeatureSet(
        {"cifar/features": features, "cifar/logits": logits},
        torch.arange(count),
        torch.zeros(count, dtype=torch.int64) if labels is None else labels,
        torch.arange(count),
        features.abs(),
    )


def test_values_are_those_of_the_metrics():
    real, fake = draw(60, DIM, seed=1), draw(40, DIM, seed=2) + 0.5
    found = HalfSampling(REFERENCE, real, halves=3)(samples(fake))
    exact = prdc(real, fake, 3)
    assert found["precision"].value == exact.precision
    assert found["recall"].value == exact.recall
    moments = Moments.of(fake)
    fd = frechet_distance_to(REFERENCE, moments.mean, moments.covariance)
    assert found["fd"].value == pytest.approx(fd, rel=1e-10)
    right = (torch.nn.functional.pad(fake, (0, 1)).argmax(1) == 0).double().mean()
    assert found["accuracy"].value == pytest.approx(float(right))


def test_a_half_is_a_set_of_its_own_for_recall():
    real, fake = draw(60, DIM, seed=1), draw(40, DIM, seed=2)
    sampling = HalfSampling(REFERENCE, real, halves=2, seed=7)
    found = sampling(samples(fake))["recall"]
    generator = torch.Generator().manual_seed(7)
    for half in found.halves.tolist():
        rows = torch.randperm(40, generator=generator)[:20]
        assert half == prdc(real, fake[rows], 3).recall


def test_the_error_of_a_mean_is_s_over_root_n():
    features = draw(500, DIM, seed=3)
    found = HalfSampling(REFERENCE, halves=800)(samples(features))["saturation"]
    expected = float(features[:, 0].abs().std()) / math.sqrt(500)
    assert found.stderr == pytest.approx(expected, rel=0.1)  # 2.5 % of noise in 800 halves


def test_the_error_of_the_frechet_distance_is_its_spread_over_repetitions():
    values, errors = [], []
    for seed in range(80):
        features = draw(100, DIM, seed=seed) + 0.5
        found = HalfSampling(REFERENCE, halves=60, seed=seed)(samples(features))["fd"]
        values.append(found.value)
        errors.append(found.stderr)
    spread = float(torch.tensor(values).std())  # known to 8 %
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.25)


def test_pairs_are_compared_seed_by_seed():
    features, labels = draw(200, DIM, seed=4), torch.arange(200) % 4
    sampling = HalfSampling(REFERENCE, halves=60)
    one, same = sampling(samples(features, labels)), sampling(samples(features, labels))
    for name in one:
        assert (one[name] - same[name]).value == 0 and (one[name] - same[name]).stderr == 0
    near = sampling(samples(features + 0.05 * draw(200, DIM, seed=5), labels))
    other = sampling(samples(draw(200, DIM, seed=6), labels))
    assert (one["fd"] - near["fd"]).stderr < 0.3 * (one["fd"] - other["fd"]).stderr
    assert not (one["fd"] - other["fd"]).differs()
    moved = sampling(samples(features + 1, labels))
    assert (moved["fd"] - one["fd"]).differs() and (moved["fd"] - one["fd"]).value > 0


def test_independent_sets_of_seeds_average_their_errors():
    sampling = HalfSampling(REFERENCE, halves=400)
    parts = [sampling(samples(draw(100, DIM, seed=s)))["contrast"] for s in range(4)]
    whole = mean_of(parts)
    assert whole.value == pytest.approx(sum(p.value for p in parts) / 4)
    alone = sum(p.stderr for p in parts) / 4
    assert whole.stderr == pytest.approx(alone / 2, rel=0.15)


def test_bad_input():
    with pytest.raises(ValueError, match="at least 12 samples, got 11"):
        HalfSampling(REFERENCE)(samples(draw(11, DIM, seed=0)))
    with pytest.raises(ValueError, match="halves must be at least 2"):
        HalfSampling(REFERENCE, halves=1)
    with pytest.raises(ValueError, match="at least one estimate"):
        mean_of([])
    assert math.isnan(Estimate(1.0, torch.zeros(1)).stderr)
