"""Numbers that ship elsewhere: scipy, torchmetrics, prdc, scikit-learn; and a 60-digit truth."""

from __future__ import annotations

import contextlib
import io
import warnings

import mpmath
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import sklearn.metrics
import torch

from diffsteer.eval import (
    Gaussian,
    Moments,
    class_accuracy,
    colour_stats,
    fd_infinity,
    frechet_distance,
    frechet_distance_from_features,
    prdc,
)
from diffsteer.eval.neighbours import nearest, pair_up


@pytest.fixture
def pair():
    random = torch.Generator().manual_seed(5)
    mix = torch.randn(24, 24, generator=random)
    real = torch.randn(300, 24, generator=random) @ mix
    return real, 0.9 * torch.randn(260, 24, generator=random) @ mix + 0.3


def test_frechet_distance_of_scipy(pair):
    a, b = (Moments.of(x) for x in pair)
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    expected = float((a.mean - b.mean).square().sum()) + np.trace(
        (a.covariance + b.covariance).numpy() - 2 * root
    )
    found = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert found == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_torchmetrics_on_identity_features(pair):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Identity(torch.nn.Module):
        num_features = 24

        def forward(self, x):
            return x.flatten(1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = FrechetInceptionDistance(feature=Identity(), input_img_size=(1, 1, 24))
        metric.set_dtype(torch.float64)
        for rows, real in zip(pair, (True, False), strict=True):
            metric.update(rows.double()[:, None, None], real=real)
        expected = float(metric.compute())
    assert frechet_distance_from_features(*pair) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_below_full_rank_to_forty_digits():
    random = torch.Generator().manual_seed(6)
    a = torch.randn(6, 12, generator=random, dtype=torch.float64)
    b = torch.randn(8, 12, generator=random, dtype=torch.float64) + 0.5
    with mpmath.workdps(60):
        x, y = (mpmath.matrix(rows.tolist()) for rows in (a, b))
        mean_x, x = _centred(x)
        mean_y, y = _centred(y)
        cross = x * y.T
        values, _ = mpmath.eigsy(cross * cross.T)
        roots = sum(mpmath.sqrt(max(v, mpmath.mpf(0))) for v in values if v > mpmath.mpf(10) ** -40)
        traces = sum((x.T * x)[i, i] + (y.T * y)[i, i] for i in range(12))
        gap = sum((p - q) ** 2 for p, q in zip(mean_x, mean_y, strict=True))
        truth = float(gap + traces - 2 * roots)
    assert frechet_distance_from_features(a, b) == pytest.approx(truth, rel=1e-12)
    sums = Moments.of(a), Moments.of(b)
    found = frechet_distance(sums[0].mean, sums[0].covariance, sums[1].mean, sums[1].covariance)
    assert found == pytest.approx(truth, rel=1e-9)


def _centred(rows):
    count, dim = rows.rows, rows.cols
    mean = [sum(rows[i, j] for i in range(count)) / count for j in range(dim)]
    scale = mpmath.sqrt(count - 1)
    return mean, mpmath.matrix(count, dim) + mpmath.matrix(
        [[(rows[i, j] - mean[j]) / scale for j in range(dim)] for i in range(count)]
    )


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_prdc_package(pair, k):
    import prdc as package

    real, fake = pair
    with contextlib.redirect_stdout(io.StringIO()):
        expected = package.compute_prdc(real.numpy(), fake.numpy(), nearest_k=k)
    found = prdc(real, fake, k, strict=True, chunk=64)
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_neighbours_are_those_of_exact_distances(pair, offset, dtype):
    real, fake = ((rows + offset).to(dtype) for rows in pair)
    distance, index = nearest(*pair_up(real, fake), 4, chunk=50)
    exact = (real.double()[:, None] - fake.double()).square().sum(2)
    torch.testing.assert_close(distance, exact.sort(1).values[:, :4], rtol=1e-12, atol=0)
    torch.testing.assert_close(exact.gather(1, index), distance, rtol=1e-12, atol=0)


@pytest.fixture
def rough_products():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def test_prdc_counts_do_not_depend_on_the_precision_of_products(pair, rough_products):
    rough = prdc(*pair, 3)  # rough where the processor has such products, and warier anyway
    torch.set_float32_matmul_precision("highest")
    assert rough == prdc(*pair, 3)


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e3])
def test_prdc_counts_are_those_of_exact_distances_also_far_from_the_origin(pair, offset):
    real, fake = ((rows + offset) for rows in pair)
    within = [torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
              for x in (real, fake)]  # fmt: skip
    radius = [d.sort(1).values[:, 3] for d in within]
    cross = torch.cdist(fake.double(), real.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = prdc(real, fake, 3)
    assert found.precision == pytest.approx(float((cross <= radius[0]).any(1).double().mean()))
    assert found.recall == pytest.approx(
        float((cross <= radius[1][:, None]).any(0).double().mean())
    )


def test_accuracy_of_scikit_learn():
    random = torch.Generator().manual_seed(8)
    labels = torch.randint(0, 10, (400,), generator=random)
    logits = torch.randn(400, 10, generator=random)
    logits[torch.arange(400), labels] += 1.5
    logits[:, 7] = -9  # a class that is never predicted counts zero
    guess, found = logits.argmax(1).numpy(), class_accuracy(logits, labels)
    assert found.top1 == pytest.approx(sklearn.metrics.accuracy_score(labels, guess))
    top5 = sklearn.metrics.top_k_accuracy_score(labels, logits.numpy(), k=5)
    assert found.top5 == pytest.approx(top5)
    precision = sklearn.metrics.precision_score(labels, guess, average="macro", zero_division=0)
    assert found.macro_precision == pytest.approx(precision)
    recall = sklearn.metrics.recall_score(labels, guess, average=None)
    assert found.per_class.tolist() == pytest.approx(recall.tolist())
    assert found.never_predicted == 1


def test_colours_of_pillow():
    from PIL import Image

    random = np.random.default_rng(9)
    pixels = random.integers(0, 256, (4, 8, 9, 3), dtype=np.uint8)
    pixels[0], pixels[1] = 0, 255
    found = colour_stats(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
    for i, picture in enumerate(pixels):
        image = Image.fromarray(picture)
        saturation = np.array(image.convert("HSV"))[..., 1].mean() / 255
        contrast = np.array(image.convert("L")).std() / 255
        assert float(found.saturation[i]) == pytest.approx(saturation, abs=0.004)  # HSV is 8 bits
        assert float(found.contrast[i]) == pytest.approx(contrast, abs=0.002)
        clipped = ((picture == 0) | (picture == 255)).any(2).mean()
        assert float(found.clipped[i]) == pytest.approx(clipped)


def test_fd_infinity_is_scipys_line_and_so_is_its_error():
    random = torch.Generator().manual_seed(11)
    truth = Gaussian.of(torch.zeros(8), torch.eye(8))
    found = fd_infinity(truth, torch.randn(400, 8, generator=random, dtype=torch.float64))
    line = scipy.stats.linregress(1 / found.counts.numpy(), found.distances.numpy())
    assert (found.value, found.slope, found.stderr) == pytest.approx(
        (line.intercept, line.slope, line.intercept_stderr), rel=1e-9
    )
