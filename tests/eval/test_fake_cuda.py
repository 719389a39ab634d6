"""Evaluation on a device that refuses what CUDA would; where the host waits is said here."""

from __future__ import annotations

import pytest
import torch
from eval_samples import tensors, tiny_extractor
from fake_cuda import FakeCuda

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

METRICS = {
    "prdc": lambda x, y: prdc(x, y, chunk=64),
    "authentic": lambda x, y: authentic(x, y).float().mean(),
    "frechet": frechet_distance_from_features,
    "frechet, few": lambda x, y: frechet_distance_from_features(x[:20], y[:30]),
    "kernel": lambda x, y: kernel_distance(x, y).value,
    "kernel, subsets": lambda x, y: kernel_distance_subsets(x, y, subsets=2, subset_size=50).value,
    "cmmd": cmmd,
    "vendi": lambda x, y: vendi(y),
    "cosine": lambda x, y: mean_cosine_distance(y, torch.arange(len(y)) % 5),
    "inception": lambda x, y: inception_score(y).value,
    "realism": lambda x, y: realism(x, y).mean(),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_those_of_the_cpu(name: str) -> None:
    """In float64, and free to read: each decides by its own numbers, and ends in some."""
    random = torch.Generator().manual_seed(4)
    x, y = (torch.randn(count, 24, generator=random) for count in (140, 120))
    expected = METRICS[name](x, y)
    with FakeCuda(waits=True, doubles=True) as gpu:
        found = METRICS[name](gpu.put(x), gpu.put(y))
        found = float(found) if isinstance(found, torch.Tensor) else found
    assert found == (expected if name == "prdc" else pytest.approx(float(expected), rel=1e-9))


def test_extractors_wait_once_a_batch() -> None:
    images, results = tensors(20), []
    with FakeCuda(waits=True) as gpu:
        for extractor in (tiny_extractor(), tiny_extractor(device="cuda")):
            gpu.events.clear()
            results.append(extractor(images))
        assert len(gpu.events) == 2, gpu.events  # features and logits, of three micro-batches
        gpu.events.clear()
        extractor(gpu.put(images))
        assert len(gpu.events) == 2, gpu.events
    torch.testing.assert_close(results[0].features, results[1].features)


def test_a_suite_computes_there_what_it_computes_here() -> None:
    def scores(device: str) -> dict[str, float]:
        suite = EvalSuite(extractors=tiny_extractor(device=device))
        suite.update(tensors(60, 1), real=True)
        suite.update(tensors(60, 2), labels=[i % 4 for i in range(60)])
        return suite.compute().values

    expected = scores("cpu")
    with FakeCuda(waits=True, doubles=True):
        assert scores("cuda") == pytest.approx(expected, rel=1e-4)
