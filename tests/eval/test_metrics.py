"""The torchmetrics classes hold the functions' numbers for any split, merge and rank."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from eval_samples import tensors, tiny_extractor
from torchmetrics import MetricCollection

from diffsteer.eval import (
    class_accuracy,
    cmmd,
    frechet_distance_from_features,
    kernel_distance,
    prdc,
    vendi,
)
from diffsteer.eval.metrics import (
    CMMD,
    ClassAccuracy,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
    Vendi,
)


@pytest.fixture
def pair():
    random = torch.Generator().manual_seed(4)
    return torch.randn(50, 6, generator=random), torch.randn(40, 6, generator=random) + 0.4


CASES = [
    (lambda: FrechetDistance(6), frechet_distance_from_features),
    (lambda: KernelDistance(6), lambda x, y: kernel_distance(x, y).value),
    (lambda: PrecisionRecall(6, k=4), lambda x, y: prdc(x, y, 4).precision),
    (lambda: CMMD(6), cmmd),
    (lambda: Vendi(6), lambda x, y: vendi(y)),
]


def value_of(found):
    found = next(iter(found.values())) if isinstance(found, dict) else found
    return float(found[0] if isinstance(found, tuple) else found)


def feed(metric, real, fake):
    for rows, is_real in ((real, True), (fake, False)):
        for part in rows.split(17):
            metric.update(part, real=is_real)
    return metric


@pytest.mark.parametrize("make, function", CASES)
def test_values_merge_and_reset(make, function, pair):
    real, fake = pair
    expected = pytest.approx(function(real, fake), rel=1e-9)
    metric = feed(make(), real, fake)
    assert value_of(metric.compute()) == expected
    first, second = feed(make(), real[:20], fake[:7]), feed(make(), real[20:], fake[7:])
    first.merge_state(second)
    assert value_of(first.compute()) == expected
    metric.reset()
    assert value_of(feed(metric, real, fake).compute()) == expected
    with pytest.raises(ValueError, match="6 features"):
        metric.update(torch.zeros(3, 5), real=False)


@pytest.mark.parametrize("make", [case[0] for case in CASES[:-1]])
def test_which_side_samples_are_on_must_be_said(make):
    with pytest.raises(TypeError, match="real"):
        make().update(torch.zeros(3, 6))


def test_a_collection_keeps_real_samples_out_of_what_scores_generated_ones(pair):
    real, fake = pair
    metrics = MetricCollection({"cmmd": CMMD(6), "vendi": Vendi(6)}, compute_groups=False)
    feed(metrics, real, fake)
    found = metrics.compute()
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"cmmd": cmmd(real, fake), "vendi": vendi(fake)}, rel=1e-12
    )


def test_images_go_through_the_extractor():
    extractor = tiny_extractor()
    metric = FrechetDistance(6, extractor)
    metric.update(tensors(20, 1), real=True)
    metric.update(tensors(20, 2), real=False)
    rows = [extractor(tensors(20, seed)).features for seed in (1, 2)]
    assert float(metric.compute()) == pytest.approx(frechet_distance_from_features(*rows), rel=1e-9)
    with pytest.raises(ValueError, match="extractor"):
        FrechetDistance(6).update(tensors(4), real=True)


def test_scores_of_logits():
    random = torch.Generator().manual_seed(5)
    logits, labels = torch.randn(60, 7, generator=random), torch.arange(60) % 7
    accuracy, score = ClassAccuracy(7), InceptionScore(7, splits=3)
    for part in range(0, 60, 13):
        accuracy.update(logits[part : part + 13], labels[part : part + 13])
        score.update(logits[part : part + 13])
    assert float(accuracy.compute()["top5"]) == pytest.approx(class_accuracy(logits, labels).top5)
    whole = InceptionScore(7, splits=3)
    whole.update(logits.flip(0))
    assert [float(v) for v in whole.compute()] == [float(v) for v in score.compute()]


WORKER = """
import sys, torch
import torch.distributed as dist, torch.multiprocessing as mp
from diffsteer.eval.metrics import FrechetDistance, PrecisionRecall

def main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    random = torch.Generator().manual_seed(4)
    real, fake = torch.randn(50, 6, generator=random), torch.randn(40, 6, generator=random) + 0.4
    metrics = [FrechetDistance(6), PrecisionRecall(6, k=4)]
    if rank < 2:                                    # rank 2 has nothing
        for metric in metrics:
            metric.update(real[rank * 20:20 + rank * 30], real=True)
            metric.update(fake[rank * 7:7 + rank * 33], real=False)
    found = [float(metrics[0].compute()), *(float(v) for v in metrics[1].compute().values())]
    with open(f"{folder}/{rank}.txt", "w") as file:
        file.write(" ".join(repr(v) for v in found))
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(main, (sys.argv[1],), nprocs=3)
"""


@pytest.mark.slow
def test_uneven_and_empty_ranks(pair, tmp_path):
    program = tmp_path / "worker.py"
    program.write_text(WORKER)
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=900,
        check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [(tmp_path / f"{rank}.txt").read_text().split() for rank in range(3)]
    scores = prdc(*pair, 4)
    expected = [frechet_distance_from_features(*pair), scores.precision, scores.recall,
                scores.density, scores.coverage]  # fmt: skip
    for line in lines:
        assert [float(v) for v in line] == pytest.approx(expected, rel=1e-6)
        assert float(line[0]) == pytest.approx(expected[0], rel=1e-12)
