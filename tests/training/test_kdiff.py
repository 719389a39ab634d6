"""k-Diff: the algebra, the theorems of the optimal k, sampling through stock schedulers."""

from __future__ import annotations

import math

import pytest
import torch

from diffsteer.core import Kind, Level, from_denoised, to_denoised
from diffsteer.samplers import euler_step, heun_step, integrate, linear_sigmas
from diffsteer.training.dimension import (
    maximum_likelihood_dimension,
    participation_ratio,
    patches,
    suggest_k,
    trace_dimension,
)
from diffsteer.training.kdiff import (
    KDiffObjective,
    LearnedK,
    kdiff_loss,
    kdiff_q,
    kdiff_target,
    kdiff_velocity,
)

KS = (0.0, 0.1, 0.5, 0.9, 1.0)
LABELS = torch.zeros(6, dtype=torch.long)


def draw(n=6, dims=5):
    clean, noise = torch.randn(2, n, dims, dtype=torch.float64)
    return clean, noise, Level.flow(torch.rand(n, dtype=torch.float64) * 0.8 + 0.1)


@pytest.mark.parametrize("k", KS)
def test_k1_round_trip_and_the_kind_of_core(k):
    """For any alpha and sigma; where q is at least 0.05 to twelve digits."""
    clean, noise, flow = draw(60)
    angle = torch.rand(60, dtype=torch.float64) * 1.2 + 0.2
    for level in (
        flow,
        Level(angle.cos(), angle.sin()),
        Level.ve(3 * angle),
        Level(2 * angle, angle),
    ):
        x, u = level.mix(clean, noise), kdiff_target(clean, noise, k)
        assert float(kdiff_q(level, x, k).min()) >= 0.05
        pairs = [
            (kdiff_velocity(u, x, level, k, q_floor=0), noise - clean),
            (to_denoised(u, Kind.kdiff(k), x, level), clean),
            (from_denoised(clean, Kind.kdiff(k), x, level), u),
        ]
        for found, want in pairs:
            assert (found - want).norm() < 1e-12 * want.norm()


def test_k1_float32_and_bfloat16_outputs_keep_the_numerator_wide():
    clean, noise, level = draw(64)
    level = Level.flow(torch.linspace(0.06, 0.98, 64, dtype=torch.float64))
    x, u = level.mix(clean, noise), kdiff_target(clean, noise, 0.99)
    wide = kdiff_velocity(u, x, level, 0.99)
    single = kdiff_velocity(u.float(), x.float(), level, 0.99)
    assert ((single - wide).norm() / wide.norm()) < 1e-4
    assert kdiff_velocity(u.bfloat16(), x.bfloat16(), level, 0.99).dtype == torch.bfloat16


def test_k2_special_cases():
    clean, noise, _ = draw()
    assert torch.equal(kdiff_target(clean, noise, 1.0), clean)
    assert torch.equal(kdiff_target(clean, noise, 0.0), -noise)
    torch.testing.assert_close(kdiff_target(clean, noise, 0.5), (clean - noise) / 2)


@pytest.mark.parametrize("k", KS)
def test_k3_velocity_error_is_target_error_over_q(k):
    clean, noise, level = draw()
    x, u = level.mix(clean, noise), kdiff_target(clean, noise, k)
    wrong = u + 0.1 * torch.randn_like(u)
    velocity = kdiff_velocity(wrong, x, level, k, q_floor=0)
    torch.testing.assert_close(
        (noise - clean) - velocity, (wrong - u) / kdiff_q(level, x, k), rtol=1e-9, atol=1e-9
    )
    loss = kdiff_loss(lambda *_: wrong, clean, noise, level, LABELS, k=k, q_floor=0)
    torch.testing.assert_close(
        loss, (velocity - (noise - clean)).square().mean(1), rtol=1e-5, atol=1e-5
    )


def test_the_loss_is_clamped_on_both_sides():
    """Below the floor a perfect network still has loss 0, and an error counts over the floor."""
    clean, noise, _ = draw(2)
    level = Level.flow(torch.tensor([0.01, 0.5], dtype=torch.float64))  # q at k = 1
    perfect = kdiff_loss(lambda *_: clean, clean, noise, level, LABELS, k=1.0, q_floor=0.1)
    torch.testing.assert_close(perfect.double(), torch.zeros(2).double(), rtol=0, atol=1e-9)
    off = kdiff_loss(lambda *_: clean + 0.3, clean, noise, level, LABELS, k=1.0, q_floor=0.1)
    want = torch.tensor([(0.3 / 0.1) ** 2, (0.3 / 0.5) ** 2])
    torch.testing.assert_close(off.float(), want, rtol=1e-4, atol=1e-5)


def subspace(dims, intrinsic):
    basis = torch.linalg.qr(torch.randn(dims, dims, dtype=torch.float64)).Q[:, :intrinsic]
    return basis @ basis.T


def exact_denoised(x, level, projector):
    """E[clean | x] for clean ~ N(0, projector)."""
    alpha, sigma = level.over(x)
    return (alpha / (alpha**2 + sigma**2)) * (x @ projector)


def test_k4_the_bayes_predictor_gives_one_velocity_and_no_gradient_for_k():
    n = 20_000
    projector = subspace(8, 3)
    clean = torch.randn(n, 8, dtype=torch.float64) @ projector
    noise = torch.randn(n, 8, dtype=torch.float64)
    level = Level.flow(torch.rand(n, dtype=torch.float64) * 0.8 + 0.1)
    x = level.mix(clean, noise)
    best = exact_denoised(x, level, projector)
    velocities = [
        kdiff_velocity(from_denoised(best, Kind.kdiff(k), x, level), x, level, k)
        for k in (0.1, 0.5, 0.9)
    ]
    for velocity in velocities[1:]:
        torch.testing.assert_close(velocity, velocities[0])
    for start in (0.3, 0.8):
        k = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        u = from_denoised(best, Kind.kdiff(start), x, level)
        error = (kdiff_velocity(u, x, level, k) - (noise - clean)).square().mean(1)
        (slope,) = torch.autograd.grad(error.mean(), k)
        # What it would be for a predictor that is off, to see that the test can fail.
        off = (kdiff_velocity(0.7 * u, x, level, k) - (noise - clean)).square().mean()
        (away,) = torch.autograd.grad(off, k)
        assert abs(slope) < 0.1 * abs(away)


@pytest.mark.parametrize("dims, intrinsic", [(64, 64), (64, 16), (64, 4), (768, 16)])
def test_k5_best_linear_predictor_is_best_at_the_rule(dims, intrinsic):
    """T2: one matrix for all levels, symmetric levels, error in u."""
    k = torch.linspace(0.4, 0.999, 59_901, dtype=torch.float64)
    t = torch.linspace(0.005, 0.995, 2001, dtype=torch.float64)
    s = 1 - t

    def least(xx, xu, uu):
        return uu - xu**2 / xx  # scalar regression of u on x in one direction

    inside = least(
        (t**2 + s**2).mean(),
        k * t.mean() - (1 - k) * s.mean(),
        k**2 + (1 - k) ** 2,
    )
    outside = least((s**2).mean(), -(1 - k) * s.mean(), (1 - k) ** 2)
    loss = intrinsic * inside + (dims - intrinsic) * outside
    assert float(k[loss.argmin()]) == pytest.approx(dims / (dims + intrinsic), abs=1e-4)
    energy = k**2 * intrinsic + (1 - k) ** 2 * dims
    assert float(k[energy.argmin()]) == pytest.approx(dims / (dims + intrinsic), abs=1e-4)


def test_k6_a_zero_network_moves_k_to_the_root_rule():
    dims, intrinsic, n = 64, 4, 8000
    clean = torch.randn(n, dims, dtype=torch.float64) @ subspace(dims, intrinsic)
    noise = torch.randn(n, dims, dtype=torch.float64)
    # Every sample has the energy that it has on average, and comes with the opposite noise too:
    # what is left of the estimate's own noise is far below the tolerance.
    clean *= math.sqrt(intrinsic) / clean.norm(dim=1, keepdim=True)
    noise *= math.sqrt(dims) / noise.norm(dim=1, keepdim=True)
    noise[n // 2 :], clean[n // 2 :] = -noise[: n // 2], clean[: n // 2].clone()
    levels = (torch.arange(n // 2, dtype=torch.float64) + 0.5) / (n // 2)
    level = Level.flow(levels.repeat(2))
    grid = torch.linspace(0.79, 0.81, 41, dtype=torch.float64)

    def loss(k):
        zero = lambda x, *_: torch.zeros_like(x)  # noqa: E731
        return kdiff_loss(zero, clean, noise, level, LABELS, k=k, q_floor=0).mean()

    losses = torch.stack([loss(k) for k in grid])
    want = math.sqrt(dims) / (math.sqrt(dims) + math.sqrt(intrinsic))
    assert 0 < losses.argmin() < 40
    assert float(grid[losses.argmin()]) == pytest.approx(want, abs=2e-3)


def test_k7_gradient_of_k_is_the_formula():
    clean, noise, level = draw()
    x = level.mix(clean, noise)
    u = torch.randn_like(x)
    k = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: kdiff_velocity(u, x, level, w), k)
    towards_data = -kdiff_velocity(u, x, level, k)
    (got,) = torch.autograd.grad((towards_data - (clean - noise)).square().mean(), k)
    t = level.over(x)[0]
    q = kdiff_q(level, x, 0.7)
    rate = (-2 * x * q - ((1 - 1.4) * x + u) * (1 - 2 * t)) / q**2
    want = (2 * (towards_data.detach() - (clean - noise)) * rate).mean()
    torch.testing.assert_close(got, want)
    # The loss that is trained, written in u: through its target and through q it is the same.
    loss = kdiff_loss(lambda *_: u, clean, noise, level, LABELS, k=k, q_floor=0).mean()
    (trained,) = torch.autograd.grad(loss, k)
    torch.testing.assert_close(trained.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [0.2, 0.8])
def test_k8_guidance_commutes(k):
    clean, noise, level = draw()
    x = level.mix(clean, noise)
    cond, uncond = torch.randn(2, *x.shape, dtype=torch.float64)
    velocities = [kdiff_velocity(u, x, level, k) for u in (cond, uncond)]
    in_velocity = velocities[1] + 3.0 * (velocities[0] - velocities[1])
    in_target = kdiff_velocity(uncond + 3.0 * (cond - uncond), x, level, k)
    torch.testing.assert_close(in_target, in_velocity)


@pytest.mark.parametrize("k", [*KS, 0.05, 0.95])
def test_k9_no_singularity_inside_and_finite_everywhere(k):
    sigma = torch.linspace(0, 1, 101, dtype=torch.float64)
    x = torch.randn(101, 3, dtype=torch.float64)
    q = kdiff_q(Level.flow(sigma), x, k).flatten()
    assert float(q.min()) == pytest.approx(min(k, 1 - k), abs=1e-12)
    clamped, plain = (
        kdiff_velocity(x.flip(0), x, Level.flow(sigma), k, q_floor=floor) for floor in (0.05, 1e-9)
    )
    assert torch.isfinite(clamped).all()
    assert torch.allclose(clamped, plain) == (0.05 <= k <= 0.95)


@pytest.mark.parametrize("k", [0.1, 0.5, 0.9, 1.0])  # k = 0 knows nothing at pure noise
def test_k10_one_point_is_reached_and_k11_trajectories_do_not_depend_on_k(k):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(12)
    point = torch.tensor([0.4, -1.0, 0.2])
    x = start = torch.randn(7, 3, generator=torch.Generator().manual_seed(2))
    for i, t in enumerate(scheduler.timesteps):
        level = Level.flow(scheduler.sigmas[i])
        u = from_denoised(point.expand_as(x), Kind.kdiff(k), x, level)
        velocity = kdiff_velocity(u, x, level, k, q_floor=1e-6)
        x = scheduler.step(velocity, t, x).prev_sample
        on_the_line = point + scheduler.sigmas[i + 1] * (start - point)
        torch.testing.assert_close(x, on_the_line, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("step", [euler_step, heun_step])
def test_k10_our_solvers_reach_one_point_from_any_noise(k, step):
    point = torch.tensor([0.4, -1.0, 0.2], dtype=torch.float64)

    def denoise(x, sigma):
        level = Level.flow(sigma)
        u = kdiff_target(point, (x - (1 - sigma) * point) / sigma, k)
        return x + sigma * -kdiff_velocity(u, x, level, k, q_floor=0)

    start = torch.randn(7, 3, dtype=torch.float64)
    out = integrate(denoise, start, linear_sigmas(9), step)
    assert (out - point).abs().max() < 1e-6


def test_learned_k_starts_where_told_and_learns_in_its_own_group():
    module = LearnedK(0.8)
    assert module().item() == pytest.approx(0.8)
    group = module.group(1e-2)
    assert group["weight_decay"] == 0.0 and module.logit.dtype == torch.float32
    objective = KDiffObjective(k=module)
    noise, level = objective.draw((32, 6), torch.Generator().manual_seed(0))
    clean = torch.randn(32, 6) @ subspace(6, 1).float()
    loss = objective(lambda x, *_: torch.zeros_like(x), clean, noise, level, torch.zeros(32))
    loss.mean().backward()
    assert loss.shape == (32,) and module.logit.grad.abs() > 1e-4


def test_fixed_k_under_the_target_loss_is_the_plain_error():
    clean, noise, level = draw()
    objective = KDiffObjective(k=0.7, loss="target")
    loss = objective(lambda x, *_: torch.zeros_like(x), clean, noise, level, LABELS)
    want = kdiff_target(clean, noise, 0.7).square().mean(1)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("neighbours", [3, 5, 10])
def test_the_neighbour_estimate_has_no_bias_where_the_data_has_no_edge(neighbours):
    angles = torch.rand(3000, 2, dtype=torch.float64) * math.tau  # a torus is flat
    torus = torch.cat([angles.cos(), angles.sin()], 1)
    assert maximum_likelihood_dimension(torus, neighbours) == pytest.approx(2, rel=0.04)


def test_dimension_estimators_on_a_subspace():
    rows = (
        torch.randn(3000, 5, dtype=torch.float64)
        @ torch.linalg.qr(torch.randn(40, 5, dtype=torch.float64)).Q.T
    )
    assert participation_ratio(rows) == pytest.approx(5, rel=0.02)
    assert maximum_likelihood_dimension(rows) == pytest.approx(5, rel=0.12)
    assert trace_dimension(rows) == pytest.approx(5, rel=0.05)
    for method in ("trace", "participation", "neighbours"):
        assert suggest_k(rows, method) == pytest.approx(40 / 45, abs=0.02)
    wide = rows[:30]  # fewer samples than dimensions take the other Gram matrix
    covariance = torch.cov(wide.T)
    want = covariance.trace() ** 2 / covariance.square().sum()
    assert participation_ratio(wide) == pytest.approx(float(want))


def test_patches_are_what_the_transformer_cuts():
    images = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).float()
    cut = patches(images, 2)
    assert cut.shape == (8, 12)
    torch.testing.assert_close(cut[1], images[0, :, :2, 2:].flatten())


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: KDiffObjective(k=1.2), "k must be"),
        (lambda: KDiffObjective(k=math.nan), "k must be"),
        (lambda: KDiffObjective(k=LearnedK(), loss="target"), "learned k"),
        (lambda: KDiffObjective(loss="l1"), "loss"),
        (lambda: LearnedK(1.0), "strictly"),
        (lambda: Kind.kdiff(-0.1), "kdiff"),
        (lambda: suggest_k(torch.zeros(5, 3), "guess"), "method"),
        (lambda: suggest_k(torch.zeros(5, 3, 8, 8), patch_size=3), "patch_size"),
        (lambda: participation_ratio(torch.ones(5, 3)), "vary"),
        (lambda: trace_dimension(torch.ones(1, 3)), "three samples"),
        (lambda: maximum_likelihood_dimension(torch.randn(8, 3), neighbours=10), "neighbours"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
