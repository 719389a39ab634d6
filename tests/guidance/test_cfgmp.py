"""CFG-MP: the operator, its acceleration and the loop, on toys whose answers are known."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffsteer.core import GaussianMixture, GuidedDenoiser, Level, MissingPrediction, Step
from diffsteer.guidance import AutoGuidance, ClassifierFreeGuidance, ManifoldProjectedGuidance
from diffsteer.guidance.anderson import Anderson, anderson_mix
from diffsteer.guidance.cfgmp import flow_sigma, manifold_operator
from diffsteer.samplers import euler_step, flow_sigmas, integrate

DOUBLE = torch.float64
CFG = ClassifierFreeGuidance(2.0)


def gaussian_velocity(mean: float, std: float, t: float):
    """Towards the data, for one Gaussian: an affine field."""
    spread = t**2 * std**2 + (1 - t) ** 2
    slope = (t * std**2 - (1 - t)) / spread
    return lambda x: slope * (x - t * mean) + mean


def mixture() -> GaussianMixture:
    means = torch.tensor([[-1.5], [1.5]], dtype=DOUBLE)
    return GaussianMixture(means, torch.tensor([0.4, 0.4], dtype=DOUBLE))


def field(data: GaussianMixture, labels: Tensor | None, t: float):
    level = Level.flow(torch.tensor(1 - t, dtype=DOUBLE))
    return lambda x: (data.denoise(x, level, labels) - x) / (1 - t)


def guided(rule, data: GaussianMixture, labels: Tensor) -> GuidedDenoiser:
    return GuidedDenoiser(
        rule,
        lambda x, s: data.denoise(x, Level.flow(s), labels),
        lambda x, s: data.denoise(x, Level.flow(s), None),
        level=Level.flow,
    )


def starts(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, generator=generator, dtype=DOUBLE), torch.ones(n, dtype=torch.long)


@pytest.mark.parametrize("off", [{"iterations": 0}, {"above": 1.0}])
def test_p1_off_is_the_inner_rule_bit_for_bit(off):
    data, (x, labels) = mixture(), starts(16)
    plain = integrate(guided(CFG, data, labels), x, flow_sigmas(6), euler_step)
    rule = ManifoldProjectedGuidance(CFG, **off)
    assert torch.equal(integrate(guided(rule, data, labels), x, flow_sigmas(6), euler_step), plain)


def test_p2_both_orders_are_one_chain():
    """On a uniform grid they differ in the correction of the first sample alone."""
    data, (x, labels) = mixture(), starts(16)
    grid = flow_sigmas(8)
    paper = ManifoldProjectedGuidance(CFG, iterations=2, above=0.0, order="paper")
    code = ManifoldProjectedGuidance(CFG, iterations=2, above=0.0)

    class SkipFirst:
        commutes, moves = False, True

        def __call__(self, step: Step) -> Tensor:
            return CFG(step) if step.index == 0 else code(step)

    out = [
        integrate(guided(rule, data, labels), x, grid, euler_step) for rule in (paper, SkipFirst())
    ]
    torch.testing.assert_close(out[0], out[1], rtol=1e-9, atol=1e-9)
    whole = integrate(guided(code, data, labels), x, grid, euler_step)
    assert not torch.allclose(out[0], whole, rtol=1e-3)


def test_p3_the_gap_is_the_scaled_gradient_of_the_implicit_classifier():
    data, t = mixture(), 0.35
    x = torch.randn(50, 1, dtype=DOUBLE).requires_grad_()
    level = Level.flow(torch.tensor(1 - t, dtype=DOUBLE))
    one = torch.ones(50, dtype=torch.long)
    (slope,) = torch.autograd.grad(data.class_posterior(x, level)[:, 1].log().sum(), x)
    gap = field(data, one, t)(x) - field(data, None, t)(x)
    torch.testing.assert_close(gap, (1 - t) / t * slope)
    (score,) = torch.autograd.grad(data.log_density(x, level).sum(), x)
    torch.testing.assert_close(field(data, None, t)(x), x / t + (1 - t) / t * score)


def test_p4_gaps_of_two_gaussians():
    uncond, cond = gaussian_velocity(0, 1, 0.3), gaussian_velocity(1, 0.3, 0.3)
    x, gaps = torch.tensor([[-0.5]], dtype=DOUBLE), []
    jacobian = torch.autograd.functional.jacobian(
        lambda y: manifold_operator(uncond, cond, y, 0.05), x
    )
    assert float(jacobian) == pytest.approx(0.9646, abs=1e-4)
    for _ in range(400):
        gaps.append(float(cond(x) - uncond(x)))
        x = manifold_operator(uncond, cond, x, 0.05)
    assert gaps[:4] == pytest.approx([1.7361, 1.6779, 1.6218, 1.5676], abs=1e-4)
    assert all(after < before for before, after in pairwise(gaps[:200]))
    # At the fixed point v_uncond(x) = v_cond(z): what is left of the gap is a * slope * v_uncond.
    slope = (cond(x + 1) - cond(x)).item()
    assert gaps[-1] == pytest.approx(0.05 * abs(slope * uncond(x).item()), rel=1e-3)
    same = gaussian_velocity(1, 1, 0.3)
    moved = manifold_operator(uncond, same, x, 0.05)
    assert float(same(moved) - uncond(moved)) == pytest.approx(
        float(same(x) - uncond(x)), abs=1e-12
    )


@pytest.mark.parametrize("t", [0.05, 0.1, 0.3, 0.5, 0.6, 0.8])
def test_p5_each_iteration_raises_the_class_posterior(t):
    data, labels = mixture(), torch.ones(400, dtype=torch.long)  # half start in the other class
    clean, _ = data.sample(400, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(400, 1, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    level = Level.flow(torch.tensor(1 - t, dtype=DOUBLE))
    x = level.mix(clean, noise)
    uncond, cond = field(data, None, t), field(data, labels, t)

    def state(at):
        chosen = data.class_posterior(at, level).gather(1, labels[:, None])
        return (cond(at) - uncond(at)).abs(), chosen.log()

    for _ in range(3):
        gap, log_posterior = state(x)
        x = manifold_operator(uncond, cond, x, 0.05)
        gap_after, log_after = state(x)
        assert gap_after.mean() < gap.mean() and log_after.mean() > log_posterior.mean()
        assert (log_after >= log_posterior).double().mean() >= 0.99


def test_p5_the_gap_shrinks_as_fast_as_was_measured_independently():
    """There 2.130, 1.989, 1.850, 1.714 for 400 samples of the mixture at t = 0.3."""
    data, labels = mixture(), torch.ones(4000, dtype=torch.long)
    clean, _ = data.sample(4000, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    x = Level.flow(torch.tensor(0.7, dtype=DOUBLE)).mix(clean, noise)
    uncond, cond, gaps = field(data, None, 0.3), field(data, labels, 0.3), []
    for _ in range(4):
        gaps.append(float((cond(x) - uncond(x)).abs().mean()))
        x = manifold_operator(uncond, cond, x, 0.05)
    shrinks = [after / before for before, after in pairwise(gaps)]
    assert shrinks == pytest.approx([1.989 / 2.130, 1.850 / 1.989, 1.714 / 1.850], rel=0.005)
    assert gaps[0] == pytest.approx(2.130, rel=0.05)  # 400 samples say it to a few percent


def test_p6_acceleration_is_exact_on_an_affine_line():
    def image(x):
        return 0.7 * x + 2

    xs = [torch.zeros(3, 1, dtype=DOUBLE)]
    xs.append(image(xs[0]))
    x = anderson_mix(xs, [image(x) for x in xs], ridge=0.0, clamp=math.inf)
    torch.testing.assert_close(x, torch.full_like(x, 2 / 0.3))
    # The clamp on gamma (which is -7/3 here) holds the jump back, and still helps.
    held = anderson_mix(xs, [image(x) for x in xs])
    assert ((held - 2 / 0.3).abs() < (image(xs[1]) - 2 / 0.3).abs()).all()


def test_p6_residual_of_the_mix_is_never_longer_in_many_dimensions():
    matrix = 0.3 * torch.randn(6, 6, dtype=DOUBLE)
    offset = torch.randn(6, dtype=DOUBLE)

    def image(x):
        return x @ matrix.T + offset

    xs = [torch.randn(20, 6, dtype=DOUBLE)]
    xs.append(image(xs[0]))
    gs = [image(x) for x in xs]
    mixed = anderson_mix(xs, gs, ridge=0.0, clamp=math.inf, growth=math.inf)
    f0, f1 = gs[0] - xs[0], gs[1] - xs[1]
    step = f1 - f0
    gamma = (f1 * step).sum(1, keepdim=True) / step.square().sum(1, keepdim=True)
    torch.testing.assert_close(image(mixed) - mixed, (f1 - gamma * step) @ matrix.T)
    assert ((f1 - gamma * step).norm(dim=1) <= f1.norm(dim=1) + 1e-12).all()


def test_p7_constrained_form_ridge_and_degenerate_residuals():
    xs = list(torch.randn(2, 5, 4, dtype=DOUBLE))
    gs = list(torch.randn(2, 5, 4, dtype=DOUBLE))
    loose = {"ridge": 0.0, "clamp": math.inf, "growth": math.inf}
    residuals = torch.stack([g - x for x, g in zip(xs, gs, strict=True)], 1)
    ones = torch.ones(5, 2, 1, dtype=DOUBLE)
    alpha = torch.linalg.solve(residuals @ residuals.mT, ones)
    alpha = alpha / alpha.sum(1, keepdim=True)
    want = (alpha * torch.stack(gs, 1)).sum(1)
    torch.testing.assert_close(anderson_mix(xs, gs, **loose), want)
    torch.testing.assert_close(anderson_mix(xs, gs, ridge=1e12), gs[1])
    still = anderson_mix([xs[0], xs[0]], [gs[0], gs[0]])  # equal residuals: the plain step
    torch.testing.assert_close(still, gs[0])
    wild = anderson_mix(xs, [gs[0], 1e3 * gs[1]])  # a residual that explodes: the plain step
    torch.testing.assert_close(wild, 1e3 * gs[1])


def test_p7_damping_goes_between_the_mix_of_points_and_that_of_images():
    xs, gs = list(torch.randn(2, 5, 4, dtype=DOUBLE)), list(torch.randn(2, 5, 4, dtype=DOUBLE))
    loose = {"growth": math.inf}
    points, images = anderson_mix(xs, gs, damping=0.0, **loose), anderson_mix(xs, gs, **loose)
    assert not torch.allclose(points, xs[1])
    found = anderson_mix(xs, gs, damping=0.25, **loose)
    torch.testing.assert_close(found, 0.75 * points + 0.25 * images)
    gamma = (images - gs[1]) / (gs[0] - gs[1])  # images = g - gamma (g - g before), so points are
    torch.testing.assert_close(points, xs[1] + gamma * (xs[0] - xs[1]))


def test_p7_two_points_of_history_solve_a_plane():
    matrix = torch.tensor([[0.4, 0.2], [-0.1, 0.3]], dtype=DOUBLE)

    def image(x):
        return x @ matrix.T + 1

    advance = Anderson(window=2, ridge=0.0)
    x = torch.randn(4, 2, dtype=DOUBLE)
    for _ in range(4):
        x = advance(x, image(x))
    torch.testing.assert_close(image(x), x, rtol=1e-5, atol=1e-5)


def test_p8_flow_sigma_puts_every_schedule_on_the_straight_path():
    cumprod = torch.linspace(0.05, 0.95, 7, dtype=DOUBLE)
    level = Level.vp(cumprod)
    clean, noise = torch.randn(2, 7, 3, dtype=DOUBLE)
    total = (level.alpha + level.sigma)[:, None]
    s = flow_sigma(level)
    torch.testing.assert_close(level.mix(clean, noise) / total, Level.flow(s).mix(clean, noise))
    torch.testing.assert_close(flow_sigma(Level.flow(s)), s)
    # The gap in noise predictions: v_cond - v_uncond = -(eps_cond - eps_uncond) / t.
    t = 1 - s[3]
    x = level.mix(clean, noise)[3]
    eps = torch.randn(2, 3, dtype=DOUBLE)
    denoised = [(x - level.sigma[3] * e) / level.alpha[3] for e in eps]
    y = x / total[3]
    gap = (denoised[0] - y) / s[3] - (denoised[1] - y) / s[3]
    torch.testing.assert_close(gap, -(eps[0] - eps[1]) / t)


def test_p8_euler_on_the_straight_path_is_ddim():
    now, then = Level.vp(torch.tensor(0.3, dtype=DOUBLE)), Level.vp(torch.tensor(0.6, dtype=DOUBLE))
    x, denoised = torch.randn(2, 5, dtype=DOUBLE)
    noise = (x - now.alpha * denoised) / now.sigma
    ddim = then.alpha * denoised + then.sigma * noise
    y = x / (now.alpha + now.sigma)
    y = y + (flow_sigma(then) - flow_sigma(now)) * (y - denoised) / flow_sigma(now)
    torch.testing.assert_close(y * (then.alpha + then.sigma), ddim, rtol=1e-12, atol=1e-12)


def test_p9_twin_operators_and_radial_fields():
    data, t = mixture(), 0.4
    uncond, cond = field(data, None, t), field(data, torch.ones(9, dtype=torch.long), t)
    x, a = torch.randn(9, 1, dtype=DOUBLE), 0.05
    back = x - a * uncond(x)
    through = manifold_operator(uncond, cond, x, a)
    torch.testing.assert_close(
        through - a * uncond(through), manifold_operator(uncond, cond, back, a, twin=True)
    )

    def radial(y):
        return 0.8 * y

    torch.testing.assert_close(manifold_operator(radial, radial, x, a), (1 - 0.04**2) * x)

    def normal(y):
        return -y / (1 - 0.7)

    factor = manifold_operator(normal, normal, x, a) / x
    torch.testing.assert_close(factor, torch.full_like(x, 1 - (0.05 / 0.3) ** 2))


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("anderson", [0, 1])
def test_p10_evaluations_are_what_the_docstring_says(iterations, anderson):
    data, (x, labels) = mixture(), starts(4)
    rule = ManifoldProjectedGuidance(CFG, iterations=iterations, anderson=anderson, above=0.45)
    denoiser = guided(rule, data, labels)
    grid = flow_sigmas(10)
    gated = int((grid[:-1] > 0.45).sum())
    integrate(denoiser, x, grid, euler_step)
    assert gated == 6
    assert denoiser.evaluations == 2 * 10 + gated * (2 * iterations + 1)


@pytest.mark.parametrize(
    "steps, gated, counts",
    [(10, 7, (34, 48, 62)), (20, 14, (68, 96, 124)), (30, 20, (100, 140, 180))],
)
def test_p10_the_released_sd35_grid_costs_what_the_authors_count(steps, gated, counts):
    """And one evaluation more at each gated step: what a pipeline has made before it asks."""
    fine = torch.linspace(1, 1e-4, 2 * steps, dtype=DOUBLE)
    grid = torch.cat([(3 * fine / (1 + 2 * fine))[::2], torch.zeros(1, dtype=DOUBLE)])
    data, (x, labels) = mixture(), starts(2)
    for iterations, count in enumerate(counts, 1):
        rule = replace(ManifoldProjectedGuidance.sd3(CFG), iterations=iterations)
        denoiser = guided(rule, data, labels)
        integrate(denoiser, x, grid, euler_step)
        assert count == 2 * steps + 2 * iterations * gated
        assert denoiser.evaluations == count + gated


def test_p11_iterations_make_the_result_less_sensitive_to_the_scale():
    data, (x, labels) = mixture(), starts(4096)

    def spread(iterations):
        ends = [
            integrate(
                guided(
                    ManifoldProjectedGuidance(
                        ClassifierFreeGuidance(scale), iterations=iterations, anderson=0
                    ),
                    data,
                    labels,
                ),
                x,
                flow_sigmas(10),
                euler_step,
            )
            for scale in (1.5, 2.5)
        ]
        return float((ends[0] - ends[1]).abs().mean())

    values = [spread(k) for k in range(4)]
    assert values == sorted(values, reverse=True)
    # Measured independently with 4,096 other starts; the class here is always the second.
    assert values == pytest.approx([0.2016, 0.1689, 0.1471, 0.1313], rel=0.06)


def test_p12_the_operator_is_a_step_along_the_gap():
    data, t = mixture(), 0.3
    uncond, cond = field(data, None, t), field(data, torch.ones(6, dtype=torch.long), t)
    x = torch.randn(6, 1, dtype=DOUBLE)
    assert torch.equal(manifold_operator(uncond, cond, x, 0.0), x)
    gap = cond(x) - uncond(x)
    errors = [(manifold_operator(uncond, cond, x, a) - x - a * gap).norm() for a in (2e-3, 1e-3)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


def test_the_rule_runs_in_any_schedule_and_no_sample_looks_at_another():
    data, (x, labels) = mixture(), starts(6)
    rule = ManifoldProjectedGuidance(CFG, iterations=3, above=0.1)

    def denoiser(pick):
        return GuidedDenoiser(
            rule,
            lambda y, s: data.denoise(y, Level.ve(s), labels[pick]),
            lambda y, s: data.denoise(y, Level.ve(s), None),
        )

    grid = [8.0, 3.0, 1.0, 0.4, 0.0]
    whole = integrate(denoiser(slice(None)), 8 * x, grid, euler_step)
    rows = [
        integrate(denoiser(slice(i, i + 1)), 8 * x[i : i + 1], grid, euler_step) for i in range(6)
    ]
    torch.testing.assert_close(torch.cat(rows), whole)
    # The same chain in flow coordinates is the same chain.
    flow = [s / (1 + s) for s in grid]
    same = integrate(guided(rule, data, labels), 8 * x / 9, flow, euler_step)
    torch.testing.assert_close(same, whole, rtol=1e-6, atol=1e-6)


def test_a_weak_model_inside_is_asked_at_the_moved_sample():
    data, (x, labels) = mixture(), starts(4)
    rule = ManifoldProjectedGuidance(AutoGuidance(2.0), iterations=1, above=0.0)
    plain = guided(rule, data, labels)
    asked = []

    def weak(y, sigma):
        asked.append(y)
        return y / 2

    denoiser = GuidedDenoiser(rule, plain.cond, plain.uncond, level=Level.flow, weak=weak)
    denoiser.begin_step(next_sigma=torch.tensor(0.6, dtype=DOUBLE))
    out = denoiser(x, torch.tensor(0.8, dtype=DOUBLE))
    moved = denoiser.moved
    assert not torch.equal(moved, x) and len(asked) == 1
    torch.testing.assert_close(asked[0], moved)
    cond = data.denoise(moved, Level.flow(torch.tensor(0.8, dtype=DOUBLE)), labels)
    torch.testing.assert_close(out, 2 * cond - moved / 2)


def step_at(level: Level, **more) -> Step:
    x = torch.randn(2, 3)
    return Step(x=x, level=level, index=0, count=4, timestep=0.0, cond=x, uncond=x / 2, **more)


def moved_at(sigma: float, rule: ManifoldProjectedGuidance, **more) -> Tensor | None:
    """What the rule makes of the sample of a step whose models are affine."""
    x = torch.linspace(-1, 1, 6, dtype=DOUBLE).reshape(2, 3)

    def evaluate(at, branch="cond", **_):
        return 0.3 * at + 0.2 if branch == "cond" else 0.1 * at

    level = Level.flow(torch.tensor(sigma, dtype=DOUBLE))
    following = Level.flow(torch.tensor(sigma - 0.2, dtype=DOUBLE))
    more = {"index": 1, "count": 4, "timestep": 0.0, "next_level": following, **more}
    cond, uncond = evaluate(x), evaluate(x, "uncond")
    step = Step(x=x, level=level, cond=cond, uncond=uncond, evaluate=evaluate, **more)
    rule(step)
    return step.moved


def test_the_twin_operator_begins_at_its_level():
    at, always, not_yet = (
        moved_at(0.75, ManifoldProjectedGuidance(CFG, twin_above=edge)) for edge in (0.75, 0.1, 0.8)
    )
    assert torch.equal(at, always) and not torch.allclose(at, not_yet)


def test_one_iteration_has_nothing_to_accelerate_and_runs_where_noise_is_added():
    rule = ManifoldProjectedGuidance(CFG, iterations=1, anderson=1)
    assert moved_at(0.8, rule, stochastic=True) is not None
    with pytest.raises(ValueError, match="adds noise"):
        moved_at(0.8, replace(rule, iterations=2), stochastic=True)


def test_the_papers_order_counts_from_the_start_of_the_last_step():
    """A later stage of a multi-stage solver is no step: it neither moves nor is remembered."""
    rule, found = ManifoldProjectedGuidance(CFG, order="paper"), []
    for stages in ((0,), (0, 1)):
        memory: dict = {}
        for stage in stages:
            assert moved_at(0.8 - 0.1 * stage, rule, stage=stage, memory=memory) is None
        found.append(moved_at(0.6, rule, memory=memory))
    assert found[0] is not None and torch.equal(*found)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ManifoldProjectedGuidance("cfg"), TypeError, "rule"),
        (lambda: ManifoldProjectedGuidance(ManifoldProjectedGuidance(CFG)), ValueError, "moves"),
        (lambda: ManifoldProjectedGuidance(CFG, iterations=-1), ValueError, "iterations"),
        (lambda: ManifoldProjectedGuidance(CFG, iterations=1.5), ValueError, "whole"),
        (lambda: ManifoldProjectedGuidance(CFG, above=3.0), ValueError, "above"),
        (lambda: ManifoldProjectedGuidance(CFG, above=600), ValueError, "give 1 - t for a flow"),
        (lambda: ManifoldProjectedGuidance(CFG, step_share=0.0), ValueError, "step_share"),
        (lambda: ManifoldProjectedGuidance(CFG, order="later"), ValueError, "order"),
        (
            lambda: ManifoldProjectedGuidance(CFG)(step_at(Level.flow(torch.tensor(0.8)))),
            ValueError,
            "order='paper'",
        ),
        (
            lambda: ManifoldProjectedGuidance(CFG)(step_at(Level.flow(torch.tensor([0.8, 0.7])))),
            ValueError,
            "one noise level",
        ),
        (
            lambda: ManifoldProjectedGuidance(CFG)(
                Step(
                    x=torch.zeros(1, 2),
                    level=Level.flow(0.8),
                    index=0,
                    count=2,
                    timestep=0,
                    cond=torch.zeros(1, 2),
                )
            ),
            MissingPrediction,
            "unconditional",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_presets_are_the_released_scripts():
    dit, sd3 = ManifoldProjectedGuidance.dit(CFG), ManifoldProjectedGuidance.sd3(CFG)
    assert (dit.iterations, dit.above, dit.anderson, dit.twin_above) == (2, 0.4, 1, 1.0)
    assert (sd3.iterations, sd3.above, sd3.anderson, sd3.twin_above) == (3, 0.6, 1, 0.95)
