"""Solvers against the closed form: for one Gaussian the probability-flow equation is solved."""

from __future__ import annotations

import functools
import math
import sys

import pytest
import torch
from torch import Tensor

from diffsteer.core import GaussianMixture, GuidedDenoiser, Level
from diffsteer.samplers import (
    AncestralStep,
    ChurnStep,
    check_sigmas,
    dpmpp_2m_step,
    euler_step,
    flow_sigmas,
    heun_step,
    integrate,
    karras_sigmas,
    linear_sigmas,
    log_likelihood,
)

MEAN, STD = 0.7, 0.4


def ve_denoise(x: Tensor, sigma: Tensor) -> Tensor:
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def flow_denoise(x: Tensor, sigma: Tensor) -> Tensor:
    alpha = 1 - sigma
    return (STD**2 * alpha * x + sigma**2 * MEAN) / (STD**2 * alpha**2 + sigma**2)


def ve_exact(x: Tensor, start: float, end: float) -> Tensor:
    return MEAN + (x - MEAN) * math.sqrt((STD**2 + end**2) / (STD**2 + start**2))


def flow_exact(x: Tensor, start: float, end: float) -> Tensor:
    def spread(s: float) -> float:
        return math.sqrt(STD**2 * (1 - s) ** 2 + s**2)

    return (1 - end) * MEAN + (x - (1 - start) * MEAN) * spread(end) / spread(start)


dpmpp_2m_flow = functools.partial(dpmpp_2m_step, level=Level.flow)
SOLVERS = [
    (euler_step, ve_denoise, ve_exact, 1),
    (heun_step, ve_denoise, ve_exact, 2),
    (dpmpp_2m_step, ve_denoise, ve_exact, 2),
    (euler_step, flow_denoise, flow_exact, 1),
    (heun_step, flow_denoise, flow_exact, 2),
    (dpmpp_2m_flow, flow_denoise, flow_exact, 2),
]


@pytest.mark.parametrize("step, denoise, exact, order", SOLVERS)
def test_order_of_convergence(step, denoise, exact, order):
    start, end = 0.95, 0.05
    x = torch.randn(5, 3, dtype=torch.float64)
    errors = []
    for n in (64, 128):
        grid = torch.linspace(math.log(start), math.log(end), n + 1, dtype=torch.float64).exp()
        errors.append((integrate(denoise, x, grid, step) - exact(x, start, end)).norm())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.12)


@pytest.mark.parametrize("step, denoise, exact, order", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2])
def test_one_and_two_steps_arrive_at_the_denoised_sample(step, denoise, exact, order, steps):
    x = torch.randn(4, 2, dtype=torch.float64)
    seen = []

    def spy(at, sigma):
        seen.append((at, sigma))
        return denoise(at, sigma)

    out = integrate(spy, x, linear_sigmas(steps, 0.9), step)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, denoise(*seen[-1]))


def test_flow_solvers_start_from_pure_noise():
    x = torch.randn(4, 2, dtype=torch.float64)
    for step in (euler_step, heun_step, dpmpp_2m_flow):
        assert torch.isfinite(integrate(flow_denoise, x, flow_sigmas(5, shift=3.0), step)).all()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("level", [Level.ve, Level.flow])
def test_ancestral_steps_keep_the_marginal(eta, level):
    denoise = ve_denoise if level == Level.ve else flow_denoise

    def draw(x):
        return torch.randn(x.shape, dtype=torch.float64, generator=generator)

    generator = torch.Generator().manual_seed(3)
    start, end = 0.9, 0.3
    many = torch.empty(20_000, 1)
    x = level(torch.tensor(start)).mix(MEAN + STD * draw(many), draw(many))
    grid = torch.linspace(math.log(start), math.log(end), 101, dtype=torch.float64).exp()
    out = integrate(denoise, x, grid, AncestralStep(draw, eta=eta, level=level))
    at = level(torch.tensor(end, dtype=torch.float64))
    spread = (at.alpha**2 * STD**2 + at.sigma**2).sqrt()
    # Standard errors at n = 20,000: 0.7 % of the mean's spread, 0.5 % of the spread itself.
    assert out.mean() == pytest.approx(float(at.alpha) * MEAN, abs=0.03 * float(spread))
    assert out.std() == pytest.approx(float(spread), rel=0.02)


def test_eta_zero_is_the_deterministic_exponential_euler_step():
    x = torch.randn(6, 3, dtype=torch.float64)

    def no_noise(_):
        raise RuntimeError("eta = 0 draws no noise")

    for level, denoise in ((Level.ve, ve_denoise), (Level.flow, flow_denoise)):
        ours = integrate(denoise, x, [0.9, 0.4], AncestralStep(no_noise, eta=0.0, level=level))
        first_order = dpmpp_2m_step(
            denoise, x, torch.tensor(0.9).double(), torch.tensor(0.4).double(), level=level
        )
        torch.testing.assert_close(ours, first_order)


def test_churn_keeps_the_marginal_and_gamma_zero_is_heun():
    def draw(x):
        return torch.randn(x.shape, dtype=torch.float64, generator=generator)

    generator = torch.Generator().manual_seed(3)
    x = MEAN + STD * draw(torch.empty(20_000, 1)) + 5.0 * draw(torch.empty(20_000, 1))
    grid = karras_sigmas(40, 0.1, 5.0)[:-1]
    out = integrate(ve_denoise, x, grid, ChurnStep(draw, gamma=0.2))
    assert out.std() == pytest.approx(math.hypot(STD, 0.1), rel=0.02)
    quiet = integrate(ve_denoise, x, grid, ChurnStep(draw, gamma=0.0))
    torch.testing.assert_close(quiet, integrate(ve_denoise, x, grid, heun_step), rtol=0, atol=0)


def test_churn_raises_the_noise_by_what_is_missing_times_a_factor():
    x, now, raised = torch.zeros(2, 3), torch.tensor(3.0), torch.tensor(5.0)
    lifted = ChurnStep(torch.ones_like, noise_scale=1.5).lift(ve_denoise, x, now, raised)
    torch.testing.assert_close(lifted, torch.full_like(x, 1.5 * 4.0))  # 3, 4, 5


def test_multistep_solver_takes_any_level():
    """Variance preserving samples are those of EDM times alpha, step for step."""

    def vp(s):
        return Level((1 + s**2).rsqrt(), s * (1 + s**2).rsqrt())

    def denoise(x, s):
        return ve_denoise(x / vp(s).alpha, s)

    x, grid = torch.randn(5, 3, dtype=torch.float64), karras_sigmas(6, 0.05, 4.0)[:-1]
    step = functools.partial(dpmpp_2m_step, level=vp)
    found = integrate(denoise, x * vp(grid[0]).alpha, grid, step)
    want = integrate(ve_denoise, x, grid, dpmpp_2m_step) * vp(grid[-1]).alpha
    torch.testing.assert_close(found, want)
    start = (x * vp(grid[0]).alpha).float()
    narrow = integrate(lambda *a: denoise(*a).bfloat16(), start, grid, step)
    assert narrow.dtype == torch.float32 and (narrow - found).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_euler_in_one_pass_is_the_formula(dtype):
    x, denoised = torch.randn(2, 64, 5, dtype=dtype)
    for sigma, sigma_next in ((3.0, 2.9), (3.0, 0.1), (0.7, 0.0)):
        now, then = (torch.tensor(s, dtype=dtype) for s in (sigma, sigma_next))
        want = denoised + (then / now) * (x - denoised)
        torch.testing.assert_close(euler_step(lambda *_: denoised, x, now, then), want)
    low = euler_step(lambda *_: denoised.bfloat16(), x, now, then)  # a narrow network
    assert low.dtype == dtype


def test_trajectory_holds_every_level_and_progress_is_silent(capsys):
    x = torch.randn(2, 3)
    samples = integrate(ve_denoise, x, karras_sigmas(7), heun_step, trajectory=True, progress=True)
    assert len(samples) == 8 and samples[0] is x
    assert capsys.readouterr().err == ""
    torch.testing.assert_close(
        samples[-1], integrate(ve_denoise, x, karras_sigmas(7), heun_step), rtol=0, atol=0
    )


def test_progress_is_shown_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    integrate(ve_denoise, torch.randn(2, 3), karras_sigmas(7), euler_step, progress=True)
    assert "sampling: 100%" in (shown := capsys.readouterr().err) and "7/7" in shown


def test_guidance_composes_and_knows_steps_and_stages():
    class Spy:
        commutes = True

        def __init__(self):
            self.seen = []

        def __call__(self, step):
            self.seen.append((step.index, step.stage, step.count, id(step.memory)))
            return step.uncond + 3.0 * (step.cond - step.uncond)

    rule = Spy()
    guided = GuidedDenoiser(rule, ve_denoise, lambda x, s: x / (1 + s**2))
    x = torch.randn(2, 3)
    integrate(guided, x, [3.0, 1.0, 0.0], heun_step)
    assert [s[:3] for s in rule.seen] == [(0, 0, 2), (0, 1, 2), (1, 0, 2)]
    integrate(guided, x, [3.0, 1.0, 0.0], euler_step)
    assert len({s[3] for s in rule.seen[:3]}) == 1 and rule.seen[3][3] != rule.seen[0][3]

    def by_hand(at, sigma):
        low = at / (1 + sigma**2)
        return low + 3.0 * (ve_denoise(at, sigma) - low)

    torch.testing.assert_close(
        integrate(guided, x, [3.0, 1.0, 0.0], heun_step),
        integrate(by_hand, x, [3.0, 1.0, 0.0], heun_step),
    )


def test_grids_against_their_formulas():
    grid = karras_sigmas(18)
    assert all(karras_sigmas(4, sigma_max=s)[0] == s for s in (10.0, 14.6, 80.0, 157.4, 500.0))
    assert grid[0] == 80 and grid[-1] == 0
    assert float(grid[-2]) == pytest.approx(0.002)
    roots = grid[:-1] ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff()[0].expand(17))
    assert karras_sigmas(1).tolist() == [80.0, 0.0]
    torch.testing.assert_close(flow_sigmas(4), torch.linspace(1, 0, 5, dtype=torch.float64))
    assert float(flow_sigmas(2, shift=3.0)[1]) == pytest.approx(0.75)


def test_karras_grid_is_the_one_of_diffusers():
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(18)
    torch.testing.assert_close(karras_sigmas(18).float(), scheduler.sigmas.float())


def test_flow_grid_and_euler_are_those_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.1, 10).numpy())
    grid = flow_sigmas(10, shift=3.0)
    torch.testing.assert_close(scheduler.sigmas, grid.float())
    x = torch.randn(3, 4)
    theirs = x
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        velocity = (theirs - flow_denoise(theirs, sigma)) / sigma
        theirs = scheduler.step(velocity, t, theirs).prev_sample
    torch.testing.assert_close(integrate(flow_denoise, x, grid, euler_step), theirs)


def test_log_likelihood_converges_to_a_gaussians_with_order_two():
    x = MEAN + STD * torch.randn(8, 3, dtype=torch.float64)
    truth = torch.distributions.Normal(
        torch.tensor(MEAN, dtype=torch.float64), math.hypot(STD, 0.01)
    )
    want = truth.log_prob(x).sum(1)
    grids = [karras_sigmas(n, 0.01, 1e5)[:-1] for n in (200, 400)]
    errors = [(log_likelihood(ve_denoise, x, grid) - want).norm() for grid in grids]
    assert errors[1] < 0.1
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)
    # Here the Jacobian is a multiple of the identity, so that one probe of signs is exact.
    probes = torch.randint(0, 2, (1, 8, 3)).double() * 2 - 1
    torch.testing.assert_close(
        log_likelihood(ve_denoise, x, grids[0], probes=probes),
        log_likelihood(ve_denoise, x, grids[0]),
    )


def test_log_likelihood_of_a_mixture_is_its_log_density():
    """Exactly in two dimensions, and on average by Hutchinson's estimate."""
    data = GaussianMixture(
        torch.tensor([[-1.0, 0.2], [0.8, -0.5], [0.3, 1.0]]).double(),
        torch.tensor([0.3, 0.5, 0.2]).double(),
        torch.tensor([0.5, 0.3, 0.2]).double(),
    )
    x = torch.tensor([[-1.0, 0.0], [0.5, 0.5], [1.5, -1.0]], dtype=torch.float64)
    want = data.log_density(x, Level.ve(0.01))
    grid = karras_sigmas(250, 0.01, 1e3)[:-1]

    def denoise(at, sigma):
        return data.denoise(at, Level.ve(sigma))

    torch.testing.assert_close(log_likelihood(denoise, x, grid), want, rtol=0, atol=8e-3)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randint(0, 2, (1, 600, 2), generator=generator).double() * 2 - 1
    many = log_likelihood(denoise, x.repeat(200, 1), grid, probes=probes).view(200, 3)
    error = many.std(0) / math.sqrt(200)
    assert ((many.mean(0) - want).abs() < 4 * error + 8e-3).all()
    assert (error > 1e-4).any()  # an estimate it is


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: karras_sigmas(0), "steps"),
        (lambda: karras_sigmas(4, 1.0, 0.5), "sigma_min"),
        (lambda: flow_sigmas(4, shift=-1.0), "shift"),
        (lambda: linear_sigmas(3, math.nan), "sigma_max"),
        (lambda: check_sigmas([1.0]), "at least two"),
        (lambda: check_sigmas([1.0, 1.0, 0.0]), r"sigmas\[1\]"),
        (lambda: check_sigmas([math.inf, 0.0]), "finite"),
        (lambda: AncestralStep(torch.randn_like, eta=1.5), "eta"),
        (lambda: ChurnStep(torch.randn_like, gamma=-1.0), "gamma"),
        (lambda: ChurnStep(torch.randn_like, low=2.0, high=1.0), "low"),
        (lambda: log_likelihood(ve_denoise, torch.zeros(1, 1), [1.0, 0.0]), "above 0"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
