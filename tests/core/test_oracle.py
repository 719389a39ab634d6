"""The Gaussian-mixture oracle, checked against identities it was not written from."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from diffsteer.core import GaussianMixture, Level

LEVELS = {
    "ve": Level.ve(torch.tensor([0.1, 0.7, 2.0, 9.0], dtype=torch.float64)),
    "vp": Level.vp(torch.tensor([0.95, 0.6, 0.3, 0.02], dtype=torch.float64)),
    "flow": Level.flow(torch.tensor([0.05, 0.4, 0.7, 0.95], dtype=torch.float64)),
    "any": Level(1.7, 0.4),
}
EVERY_LEVEL = pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
LABELS = torch.tensor([0, 2, 1, 2])


@pytest.fixture
def mixture() -> GaussianMixture:
    return GaussianMixture.random(3, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 5, dtype=torch.float64)


def gradient(value: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), x)[0]


@EVERY_LEVEL
@pytest.mark.parametrize("labels", [None, 1, LABELS], ids=["all", "one class", "a class each"])
def test_tweedie(mixture: GaussianMixture, x: Tensor, level: Level, labels: object) -> None:
    x.requires_grad_()
    score = gradient(mixture.log_density(x, level, labels), x)
    alpha, sigma = level.over(x)
    torch.testing.assert_close(mixture.score(x, level, labels), score)
    torch.testing.assert_close(
        mixture.denoise(x, level, labels), (x + sigma**2 * score).detach() / alpha
    )


@EVERY_LEVEL
def test_the_density_is_that_of_scipy(mixture: GaussianMixture, x: Tensor, level: Level) -> None:
    alpha, sigma = level.over(x)
    variance = (
        (alpha[..., None] * mixture.std) ** 2 + sigma[..., None] ** 2
        if alpha.ndim
        else ((alpha * mixture.std) ** 2 + sigma**2).expand(4, -1, -1)
    )
    for i in range(4):
        scale = alpha[i] if alpha.ndim else alpha
        densities = [
            float(w) * stats.multivariate_normal((scale * m).numpy(), v.numpy()).pdf(x[i].numpy())
            for w, m, v in zip(mixture.weights, mixture.means, variance[i], strict=True)
        ]
        found = float(mixture.log_density(x, level)[i])
        assert found == pytest.approx(math.log(sum(densities)), rel=1e-9)


@EVERY_LEVEL
def test_classes_and_the_whole_obey_bayes(
    mixture: GaussianMixture, x: Tensor, level: Level
) -> None:
    posterior = mixture.class_posterior(x, level)
    torch.testing.assert_close(posterior.sum(1), torch.ones(4, dtype=torch.float64))
    prior = torch.stack([mixture.weights[mixture.classes == k].sum() for k in range(3)])
    for k in range(3):
        joint = mixture.log_density(x, level, k) + prior[k].log()
        torch.testing.assert_close(posterior[:, k], (joint - mixture.log_density(x, level)).exp())


@EVERY_LEVEL
def test_i1_the_whole_is_the_posterior_mean_of_the_classes(
    mixture: GaussianMixture, x: Tensor, level: Level
) -> None:
    posterior = mixture.class_posterior(x, level)
    mean = sum(posterior[:, k, None] * mixture.denoise(x, level, k) for k in range(3))
    torch.testing.assert_close(mixture.denoise(x, level), mean)


@EVERY_LEVEL
def test_i2_two_classes_differ_by_the_gradient_of_their_log_odds(
    mixture: GaussianMixture, x: Tensor, level: Level
) -> None:
    x.requires_grad_()
    log_p = mixture.log_class_posterior(x, level)
    odds = gradient(log_p[:, 0] - log_p[:, 2], x)
    alpha, sigma = level.over(x)
    difference = mixture.denoise(x, level, 0) - mixture.denoise(x, level, 2)
    torch.testing.assert_close(difference.detach(), sigma**2 / alpha * odds)


@EVERY_LEVEL
def test_i3_guidance_is_the_gradient_of_the_classifier(
    mixture: GaussianMixture, x: Tensor, level: Level
) -> None:
    x.requires_grad_()
    log_p = mixture.log_class_posterior(x, level)
    push = gradient(log_p.gather(1, LABELS[:, None]), x)
    alpha, sigma = level.over(x)
    guidance = mixture.denoise(x, level, LABELS) - mixture.denoise(x, level)
    torch.testing.assert_close(guidance.detach(), sigma**2 / alpha * push)


@EVERY_LEVEL
def test_i4_two_classes_among_themselves(mixture: GaussianMixture, x: Tensor, level: Level) -> None:
    x.requires_grad_()
    p = mixture.class_posterior(x, level)
    alone = p[:, 0] / (p[:, 0] + p[:, 1])
    alpha, sigma = level.over(x)
    push = sigma**2 / alpha * gradient(alone.log(), x)
    difference = mixture.denoise(x, level, 0) - mixture.denoise(x, level, 1)
    torch.testing.assert_close((1 - alone[:, None]).detach() * difference.detach(), push)


@pytest.mark.parametrize("labels", [None, 1])
def test_samples_have_the_exact_moments(mixture: GaussianMixture, labels: int | None) -> None:
    count = 40_000
    clean, classes = mixture.sample(count, labels, generator=torch.Generator().manual_seed(0))
    mean, covariance = mixture.moments(labels)
    error = (covariance.diag() / count).sqrt()
    assert ((clean.mean(0) - mean).abs() < 4.5 * error).all()
    spread = torch.outer(covariance.diag(), covariance.diag()).sqrt()
    assert ((clean.T.cov() - covariance).abs() < 0.05 * spread).all()
    shares = torch.bincount(classes, minlength=3) / count
    prior = torch.stack([mixture.weights[mixture.classes == k].sum() for k in range(3)])
    expected = prior if labels is None else torch.eye(3)[labels]
    assert ((shares - expected).abs() < 0.012).all()


def test_samples_are_of_the_class_asked_for(mixture: GaussianMixture) -> None:
    clean, classes = mixture.sample(4, LABELS)
    assert torch.equal(classes, LABELS) and clean.shape == (4, 5)


def test_denoising_is_the_best_guess() -> None:
    """No other guess has a smaller mean squared error: not even one shifted a little."""
    mixture, level = GaussianMixture.ring(), Level.flow(0.5)
    generator = torch.Generator().manual_seed(0)
    clean, labels = mixture.sample(20_000, generator=generator)
    x = level.mix(clean, torch.randn(clean.shape, generator=generator, dtype=clean.dtype))

    def loss(guess: Tensor) -> float:
        return float((guess - clean).square().mean())

    best = loss(mixture.denoise(x, level, labels))
    assert best < loss(mixture.denoise(x, level)) < loss(x)
    assert all(best < loss(s * mixture.denoise(x, level, labels)) for s in (0.9, 1.1))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_images_in_any_dtype(dtype: torch.dtype, tolerance: float) -> None:
    mixture = GaussianMixture.random(2, shape=(3, 4, 4))
    x, level = torch.randn(5, 3, 4, 4, dtype=torch.float64), Level.flow(0.5)
    exact = mixture.denoise(x, level, 1)
    found = mixture.denoise(x.to(dtype), level, 1)
    assert found.shape == x.shape and found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mixture.denoise(x.flatten(1), level, 1), exact.flatten(1))


def test_no_noise_and_much_noise(mixture: GaussianMixture, x: Tensor) -> None:
    torch.testing.assert_close(mixture.denoise(x, Level.ve(1e-6)), x)
    mean, _ = mixture.moments(1)
    torch.testing.assert_close(
        mixture.denoise(x, Level.flow(1.0), 1), mean.expand_as(x), rtol=1e-4, atol=1e-4
    )


def test_as_a_denoise_function(mixture: GaussianMixture, x: Tensor) -> None:
    denoise = mixture.denoiser(LABELS, level=Level.flow)
    sigma = torch.tensor(0.4)
    expected = mixture.denoise(x, Level.flow(sigma), LABELS)
    assert torch.equal(denoise(x, sigma), expected)
    assert torch.equal(denoise(x, sigma, labels=1), mixture.denoise(x, Level.flow(sigma), 1))


MEANS, ONES = torch.zeros(2, 3), torch.ones(2)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"means": torch.zeros(3)}, r"means must have shape \(K, D\), got \(3,\)"),
        ({"std": torch.ones(3)}, "std must be positive"),
        ({"std": torch.tensor([1.0, 0.0])}, "std must be positive"),
        ({"weights": torch.tensor([1.0, -1.0])}, "weights must be positive"),
        ({"classes": torch.tensor([0, 2])}, r"classes must cover 0 \.\.\. C - 1"),
        ({"shape": (2, 2)}, r"shape must have 3 elements, got \(2, 2\)"),
    ],
)
def test_bad_mixtures_are_refused(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        GaussianMixture(**{"means": MEANS, "std": ONES, **arguments})  # type: ignore[arg-type]


def test_bad_labels_and_shapes_are_refused(mixture: GaussianMixture, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\], got 3"):
        mixture.denoise(x, Level.ve(1.0), 3)
    with pytest.raises(ValueError, match=r"x must have shape \(B, \(5,\)\), got \(4, 4\)"):
        mixture.denoise(x[:, :4], Level.ve(1.0))
