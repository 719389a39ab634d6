"""On a GPU: the same counts as on the CPU, distances to rounding."""

from __future__ import annotations

import pytest
import torch
from eval_samples import tensors, tiny_extractor

from diffsteer.eval import (
    EvalSuite,
    authentic,
    cmmd,
    frechet_distance_from_features,
    inception_score,
    kernel_distance,
    kernel_distance_subsets,
    mean_cosine_distance,
    prdc,
    realism,
    vendi,
)

pytestmark = pytest.mark.gpu


@pytest.fixture
def pair():
    random = torch.Generator().manual_seed(4)
    return torch.randn(900, 40, generator=random), torch.randn(800, 40, generator=random) + 0.2


@pytest.mark.parametrize("tf32", [False, True])
def test_counts_are_the_same(pair, tf32):
    expected = prdc(*pair), authentic(*pair)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        on_gpu = [rows.cuda() for rows in pair]
        assert prdc(*on_gpu, chunk=256) == expected[0]
        assert torch.equal(authentic(*on_gpu).cpu(), expected[1])
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "metric",
    [
        frechet_distance_from_features,
        lambda x, y: frechet_distance_from_features(x[:20], y[:30]),
        lambda x, y: kernel_distance(x, y).value,
        lambda x, y: kernel_distance_subsets(x, y, subsets=3, subset_size=99).value,
        cmmd,
        lambda x, y: vendi(y),
        lambda x, y: mean_cosine_distance(y, torch.arange(len(y)) % 5),
        lambda x, y: inception_score(y).value,
        lambda x, y: float(realism(x, y).mean()),
    ],
)
def test_distances_agree_to_rounding(pair, metric):
    assert metric(*(x.cuda() for x in pair)) == pytest.approx(metric(*pair), rel=1e-8)


def test_a_suite_computes_beside_its_network(monkeypatch):
    # In TF32 features are right to three digits, and a count of neighbours may be another.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    results = []
    for device in ("cpu", "cuda"):
        suite = EvalSuite(extractors=tiny_extractor(device=device))
        suite.update(tensors(60, 1), real=True)
        suite.update(tensors(60, 2), labels=[i % 4 for i in range(60)])
        results.append(suite.compute())
    assert results[1].values == pytest.approx(results[0].values, rel=1e-3)
