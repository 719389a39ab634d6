"""PFGM++ objectives, stable targets and warm starts against formulas and exact denoisers."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from tiny_flow import tiny_dit, tiny_pipeline
from torch import Tensor

from diffsteer.core import Kind, Level, from_denoised, to_denoised
from diffsteer.core.student import student_denoise, student_noise
from diffsteer.samplers import radius_of
from diffsteer.samplers.pfgmpp import input_scale, limited
from diffsteer.training import (
    FlowMatching,
    KDiffObjective,
    LearnedK,
    PFGMPPObjective,
    TrainConfig,
    edm_loss,
    suggest_k,
    velocity_loss,
    warm_start,
)
from diffsteer.training.noise import stable_pair
from diffsteer.training.objectives import k_frozen_from, make_objective
from diffsteer.training.warm_start import initial_kind, start_of_k

LABELS = torch.zeros(5, dtype=torch.long)


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(objective, shape, seed=0):
    noise, level = objective.draw(shape, seeded(seed))
    return noise, level


# -- PFGM++ ----------------------------------------------------------------------------------------


def test_the_loss_is_edms_weighted_error_of_the_denoised_image():
    objective = PFGMPPObjective(augment_dim=16.0)
    clean = 0.5 * torch.randn(5, 3, 4, 4, generator=seeded(1))
    noise, level = draw(objective, (5, 3, 4, 4))
    raw, seen = torch.randn(5, 3, 4, 4, generator=seeded(2)), []

    def network(x, timestep, labels):
        seen.append((x, timestep))
        return raw

    loss = objective(network, clean, noise, level, LABELS)
    sigma = level.sigma.reshape(-1, 1, 1, 1)
    x = clean + sigma * noise
    skip, out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / (sigma**2 + 0.25).sqrt()
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    want = (weight * (skip * x + out * raw - clean) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(loss, want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(seen[0][0], x / (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(seen[0][1], 250 * level.sigma.log())


def test_the_network_is_told_what_the_scheduler_will_tell_it():
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(5)
    level = Level(torch.ones(5), scheduler.sigmas[:5])
    clean = torch.randn(5, 7, generator=seeded())
    seen = []

    def network(x, timestep, labels):
        seen.append((x, timestep))
        return x

    edm_loss(network, clean, torch.zeros(5, 7), level, LABELS)
    torch.testing.assert_close(seen[0][1], 1000 * scheduler.timesteps)
    for row, t in enumerate(scheduler.timesteps):
        scheduler._step_index = None
        torch.testing.assert_close(scheduler.scale_model_input(clean[row], t), seen[0][0][row])


@pytest.mark.parametrize(
    "make",
    [
        lambda dim: PFGMPPObjective(augment_dim=dim),
        lambda dim: FlowMatching("velocity", augment_dim=dim),
        lambda dim: KDiffObjective(0.9, augment_dim=dim),
    ],
)
def test_every_objective_takes_the_noise_and_its_gaussian_limit_is_the_same_stream(make):
    gauss, levels = draw(make(math.inf), (400, 3, 4, 4))
    noise, same = draw(make(6.0), (400, 3, 4, 4))
    assert torch.equal(levels.sigma, same.sigma)
    ratio = noise / gauss  # one factor a sample, of the right law
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio), rtol=1e-4, atol=1e-4)
    law = stats.f(48, 6.0).cdf
    radius = noise.double().square().flatten(1).mean(1)
    assert stats.kstest(radius.numpy(), law).pvalue > 1e-3
    generator = seeded()
    torch.randn(400, generator=generator)
    assert torch.equal(gauss, torch.randn((400, 3, 4, 4), generator=generator))


@pytest.mark.parametrize("augment_dim", [2.0, 16.0, math.inf])
def test_the_exact_pfgmpp_denoiser_has_the_least_loss(augment_dim):
    """On three points; the denoiser of a far smaller or larger D does worse."""
    atoms = torch.tensor([[0.6, 0.0], [-0.4, 0.5], [-0.2, -0.6]])
    clean = atoms[torch.randint(0, 3, (4000,), generator=seeded(1))]
    noise, level = draw(PFGMPPObjective(augment_dim=augment_dim), (4000, 2), 2)
    # Far out the error is divided by sigma^2; at D = 2 those few would drown the others.
    keep = noise.norm(dim=1) < 20
    clean, noise, level = clean[keep], noise[keep], Level(level.alpha[keep], level.sigma[keep])

    def loss(dim: float) -> Tensor:
        def network(x, timestep, labels):
            sigma = (timestep / 250).exp()
            noisy = clean + sigma[:, None] * noise
            best = student_denoise(noisy, atoms, sigma, dim)
            return from_denoised(best, Kind.edm(0.5), noisy, level)

        return edm_loss(network, clean, noise, level, LABELS, augment_dim=augment_dim).mean()

    assert loss(augment_dim) < loss(math.inf if augment_dim == 2 else 0.3)


def test_every_sigma_keeps_its_meaning_at_any_d():
    """The transfer rule: levels do not depend on D, radii are sigma * sqrt(D)."""
    levels = [PFGMPPObjective(augment_dim=d).draw((9, 2), seeded())[1] for d in (1.0, 128.0)]
    assert torch.equal(levels[0].sigma, levels[1].sigma)
    assert levels[0].sigma.log().std() > 0.5
    assert radius_of(80.0, 128.0) == pytest.approx(80 * math.sqrt(128))
    with pytest.raises(ValueError, match="augment_dim"):
        radius_of(1.0, -2.0)


def test_small_dimensions_feed_the_network_inputs_of_unit_size():
    noise, level = draw(PFGMPPObjective(augment_dim=1.0), (300, 3, 8, 8))
    assert noise.abs().max() > 100  # the tail is there
    clean, seen = 0.5 * torch.randn(300, 3, 8, 8, generator=seeded(1)), []

    def network(x, *_):
        seen.append(x)
        return x

    edm_loss(network, clean, noise, level, LABELS, augment_dim=1.0)
    torch.testing.assert_close(seen[0].square().mean((1, 2, 3)), torch.ones(300))
    velocity_loss(network, clean, noise, level, LABELS, augment_dim=1.0)
    assert seen[1].square().mean((1, 2, 3)).sqrt().max() < 2.001
    x = torch.randn(4, 9)
    assert limited(x, 2.5) is x
    assert float(input_scale(x, torch.tensor(0.0), 0.5, 3.0).flatten()[0]) == pytest.approx(2)


# -- stable targets --------------------------------------------------------------------------------


def stable(labels, classes, augment_dim=8.0, level=None):
    clean = torch.randn(6, 4, generator=seeded(1))
    noise = student_noise(seeded(2), (6, 4), augment_dim)
    level = level or Level.flow(torch.linspace(0.3, 0.8, 6))
    return clean, noise, level, stable_pair(
        clean, noise, level, labels, classes, null=9, augment_dim=augment_dim
    )  # fmt: skip


@pytest.mark.parametrize("augment_dim", [2.0, 64.0, math.inf])
def test_stable_targets_are_the_posterior_mean_at_the_same_x(augment_dim):
    everyone = torch.full((6,), 9)
    clean, noise, level, (mean, rest) = stable(everyone, torch.arange(6), augment_dim)
    x = level.mix(clean, noise)
    torch.testing.assert_close(level.mix(mean, rest), x)
    alpha, _ = level.over(x)
    torch.testing.assert_close(mean, student_denoise(x / alpha, clean, level.ratio, augment_dim))
    ve = Level(torch.ones(6), torch.linspace(0.3, 2.0, 6))
    _, _, _, (mean, _) = stable(everyone, torch.arange(6), augment_dim, ve)
    want = student_denoise(ve.mix(clean, noise), clean, ve.sigma, augment_dim)
    torch.testing.assert_close(mean, want)


def test_stable_targets_look_at_images_of_the_told_class_only():
    classes = torch.tensor([0, 0, 0, 1, 1, 2])
    labels = torch.tensor([0, 9, 0, 1, 1, 2])
    clean, noise, _, (mean, rest) = stable(labels, classes)
    torch.testing.assert_close(mean[5], clean[5])  # alone in its class
    torch.testing.assert_close(rest[5], noise[5])
    weights = torch.linalg.lstsq(clean[3:5].T, mean[3:4].T).solution
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))  # between the two of class 1
    assert not torch.allclose(mean[1], clean[1])


# -- settings --------------------------------------------------------------------------------------


def test_settings_become_objectives():
    made = make_objective(TrainConfig(objective="kdiff", k="learned", k_start=0.7))
    assert isinstance(made.learned, LearnedK)
    assert made.kind.name == "kdiff" and made.kind.parameter == pytest.approx(0.7)
    fixed = make_objective(TrainConfig(objective="kdiff", k=0.25, augment_dim=64))
    assert (fixed.k, fixed.augment_dim, fixed.learned) == (0.25, 64.0, None)
    edm = make_objective(TrainConfig(objective="pfgmpp", augment_dim="128", sigma_data=0.4))
    assert edm == PFGMPPObjective(sigma_data=0.4, augment_dim=128.0)
    assert make_objective(TrainConfig()) == FlowMatching("denoised")
    with pytest.raises(ValueError, match="needs the data"):
        make_objective(TrainConfig(objective="kdiff", k="auto"))


def test_one_setting_is_written_one_way():
    same = [TrainConfig(k=0.5, augment_dim=64), TrainConfig(k="0.50", augment_dim="64.0")]
    assert same[0] == same[1] and same[0].augment_dim == "64.0"
    assert TrainConfig().augment_dim == "inf" and TrainConfig(augment_dim=math.inf) == TrainConfig()
    saved = {"steps": 5000, "seed": 3}  # a run of before there were more settings
    assert TrainConfig().changes(saved) == {"seed": (3, 0)}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"k": 1.2}, r"k must be learned, auto or a number in \[0, 1\], got 1.2"),
        ({"k": "nan"}, "got 'nan'"),
        ({"k": "half"}, "got 'half'"),
        ({"augment_dim": 0}, "positive number, or inf"),
        ({"augment_dim": "-4"}, "got '-4'"),
        ({"augment_dim": "nan"}, "got 'nan'"),
        ({"augment_dim": "many"}, "got 'many'"),
        ({"k_start": 1.0}, "strictly between"),
        ({"k_freeze": 6000}, "at most steps"),
        ({"objective": "edm"}, "flow, kdiff, pfgmpp"),
    ],
)
def test_settings_out_of_range_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**change)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PFGMPPObjective(augment_dim=0.0),
        lambda: FlowMatching(augment_dim=-1.0),
        lambda: KDiffObjective(augment_dim=math.nan),
        lambda: PFGMPPObjective(std=0.0),
    ],
)
def test_objectives_refuse_what_they_cannot_learn(make):
    with pytest.raises(ValueError, match="must be positive"):
        make()


def test_k_is_frozen_for_ten_half_lives_or_half_the_run():
    assert k_frozen_from(TrainConfig(steps=100_000, ema=0.999)) == 100_000 - 6931
    assert k_frozen_from(TrainConfig(steps=5000, ema=0.999)) == 2500
    assert k_frozen_from(TrainConfig(steps=5000, k_freeze=700)) == 4300


def test_heavier_noise_counts_as_more_ambient_dimensions():
    rows = torch.randn(3000, 10, generator=seeded())
    gauss, heavy = suggest_k(rows), suggest_k(rows, augment_dim=4.0)
    assert gauss == pytest.approx(0.5, abs=0.02)
    assert heavy == pytest.approx(2 / 3, abs=0.02)  # noise of twice the energy
    assert suggest_k(rows, augment_dim=2.0) == 1.0


# -- warm starts -----------------------------------------------------------------------------------


def saved(tmp_path, prediction, **said):
    pipe = tiny_pipeline(prediction, **said)
    pipe.save_pretrained(tmp_path)
    return pipe


@pytest.mark.parametrize(
    "source, target",
    [
        (("velocity", None), Kind.VELOCITY),
        (("velocity", None), Kind.kdiff(0.5)),
        (("denoised", None), Kind.kdiff(1.0)),
        (("kdiff", 0.5), Kind.VELOCITY),
        (("kdiff", 1.0), Kind.DENOISED),
        (("kdiff", 0.8), Kind.kdiff(0.8)),
    ],
)
def test_a_warm_start_predicts_what_the_saved_model_predicts(tmp_path, source, target):
    prediction, k = source
    pipe = saved(tmp_path, prediction, k=k)
    assert initial_kind(str(tmp_path)) == pipe.prediction_kind
    fresh = tiny_pipeline().transformer
    for parameter in fresh.parameters():
        torch.nn.init.normal_(parameter)
    warm_start(fresh, str(tmp_path), target)
    level = Level.flow(torch.tensor([0.3, 0.9]))
    x = torch.randn(2, 3, 8, 8, generator=seeded())
    inputs = {"timestep": 1000 * level.sigma, "class_labels": torch.tensor([1, 10])}
    with torch.no_grad():
        old = to_denoised(pipe.transformer(x, **inputs).sample, pipe.prediction_kind, x, level)
        new = to_denoised(fresh(x, **inputs).sample, target, x, level)
    torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-3)


def test_where_a_learned_k_starts():
    assert start_of_k(Kind.VELOCITY) == 0.5 and start_of_k(Kind.kdiff(0.7)) == 0.7
    assert 0.997 < start_of_k(Kind.DENOISED) < 1
    assert LearnedK(start_of_k(Kind.kdiff(1.0)))().item() == pytest.approx(0.9975)
    with pytest.raises(ValueError, match="edm weights cannot start"):
        start_of_k(Kind.edm(0.5))


@pytest.mark.parametrize(
    "target, words",
    [
        (Kind.kdiff(0.8), r"predicts velocity, which no factor turns into kdiff k=0.8"),
        (Kind.edm(0.5), "no factor turns into edm"),
    ],
)
def test_targets_that_are_no_multiples_are_refused(tmp_path, target, words):
    saved(tmp_path, "velocity")
    with pytest.raises(ValueError, match=words):
        warm_start(tiny_pipeline().transformer, str(tmp_path), target)


def test_a_start_of_another_shape_or_none_is_refused(tmp_path):
    saved(tmp_path, "velocity")
    with pytest.raises(ValueError, match=r"another shape \(first difference: transformer_blocks"):
        warm_start(tiny_dit(num_layers=3), str(tmp_path), Kind.VELOCITY)
    with pytest.raises(FileNotFoundError, match="no pipeline in"):
        initial_kind(str(tmp_path / "nothing"))
