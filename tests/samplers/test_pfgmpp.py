"""PFGM++: the noise against its law, the field and the solvers against exact denoisers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from diffsteer.core import seeded_generators
from diffsteer.core.student import (
    check_augment_dim,
    student_denoise,
    student_factor,
    student_log_weights,
    student_noise,
)
from diffsteer.samplers import (
    AncestralStep,
    ChurnStep,
    dpmpp_2m_step,
    euler_step,
    heun_step,
    integrate,
    karras_sigmas,
)
from diffsteer.samplers.pfgmpp import (
    StudentChurnStep,
    input_scale,
    pfgmpp_prior,
    radius_of,
    student_raise,
)
from diffsteer.samplers.pfgmpp_schedulers import PFGMPPEulerScheduler, PFGMPPHeunScheduler

INF = math.inf
QUIET_ANCESTRAL = AncestralStep(torch.randn_like, eta=0.0)
ATOMS = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [-0.4, -0.9]], dtype=torch.float64)


def draw(n, dims, augment_dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return student_noise(generator, (n, dims), augment_dim)


@pytest.mark.parametrize("dims, augment_dim", [(3072, 1), (3072, 128), (3072, 3e6), (2, 3.5)])
def test_p1_radius_follows_the_f_distribution(dims, augment_dim):
    noise = draw(2000, dims, augment_dim).double()
    ratio = noise.square().sum(1).numpy() / dims
    assert stats.kstest(ratio, stats.f(dims, augment_dim).cdf).pvalue > 1e-3


@pytest.mark.parametrize("augment_dim", [3.0, 64.0])
def test_p2_projections_are_student_t(augment_dim):
    direction = torch.nn.functional.normalize(torch.randn(50), dim=0)
    projected = draw(5000, 50, augment_dim) @ direction
    assert stats.kstest(projected.numpy(), stats.t(augment_dim).cdf).pvalue > 1e-3


def test_p3_mean_square_radius():
    dims, augment_dim, n = 100, 12.0, 40_000
    square = draw(n, dims, augment_dim).double().square().sum(1)
    want = dims * augment_dim / (augment_dim - 2)
    assert abs(square.mean() - want) < 5 * square.std() / math.sqrt(n)


def test_p4_direction_is_uniform_and_independent_of_the_radius():
    noise = draw(20_000, 3, 4.0)
    radius = noise.norm(dim=1)
    direction = noise / radius[:, None]
    assert (direction.mean(0).abs() < 4 / math.sqrt(20_000)).all()
    ranks = radius.argsort().argsort().double()
    assert abs(np.corrcoef(ranks.numpy(), direction[:, 0].numpy())[0, 1]) < 0.03


def test_p5_infinite_dimension_is_gaussian_bit_for_bit():
    want = torch.randn((4, 3, 2), generator=torch.Generator().manual_seed(1))
    assert torch.equal(student_noise(torch.Generator().manual_seed(1), (4, 3, 2), INF), want)
    huge = student_noise(torch.Generator().manual_seed(1), (4, 3, 2), 1e9)
    assert ((huge - want) / want).abs().max() < 2e-4
    rows = student_noise(seeded_generators([3, 5]), (3, 2), INF)
    alone = torch.randn((3, 2), generator=torch.Generator().manual_seed(5))
    assert torch.equal(rows[1], alone)


def test_p6_the_published_beta_route_has_the_same_law():
    dims, augment_dim = 48, 10.0
    rng = np.random.default_rng(0)
    beta = rng.beta(dims / 2, augment_dim / 2, size=20_000)
    published = np.sqrt(augment_dim) * np.sqrt(beta / (1 - beta))
    ours = draw(20_000, dims, augment_dim).double().norm(dim=1).numpy()
    assert stats.ks_2samp(published, ours).pvalue > 1e-3


def test_p7_finite_set_denoiser_gaussian_limit_and_field_identity():
    x, sigma = torch.randn(6, 2, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    gauss = (-(x[:, None] - ATOMS).square().sum(-1) / (2 * sigma**2)).softmax(1) @ ATOMS
    torch.testing.assert_close(student_denoise(x, ATOMS, sigma, INF), gauss)
    assert (student_denoise(x, ATOMS, sigma, 1e9) - gauss).abs().max() < 1e-6
    augment_dim = 5.0
    r = radius_of(float(sigma), augment_dim)
    # The electric field of the atoms in N + D dimensions: E = sum (x - y, r) / distance^(N + D).
    away = x[:, None] - ATOMS
    charge = (away.square().sum(-1) + r**2) ** (-(2 + augment_dim) / 2)
    field_x, field_r = (charge[..., None] * away).sum(1), (charge * r).sum(1)
    slope = (x - student_denoise(x, ATOMS, sigma, augment_dim)) / sigma
    torch.testing.assert_close(slope, math.sqrt(augment_dim) * field_x / field_r[:, None])


@pytest.mark.parametrize("augment_dim", [1.0, 16.0, INF])
@pytest.mark.parametrize("step", [euler_step, heun_step, dpmpp_2m_step, QUIET_ANCESTRAL])
def test_p8_one_atom_is_reached_exactly(augment_dim, step):
    atom = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64)
    x = atom + 80 * draw(5, 3, augment_dim).double()
    samples = integrate(
        lambda at, s: student_denoise(at, atom, s, augment_dim),
        x,
        karras_sigmas(6),
        step,
        trajectory=True,
    )
    for sample, sigma in zip(samples, karras_sigmas(6), strict=True):
        torch.testing.assert_close(sample - atom, (x - atom) * sigma / 80)


@pytest.mark.parametrize("augment_dim", [2.0, 4.0, 64.0, INF])
def test_p9_weights_of_three_atoms(augment_dim):
    points = ATOMS[[0] * 5 + [1] * 3 + [2] * 2]
    prior = 80 * draw(20_000, 2, augment_dim, seed=2).double()
    out = integrate(
        lambda at, s: student_denoise(at, points, s, augment_dim),
        prior,
        karras_sigmas(18),
        heun_step,
    )
    near = torch.cdist(out, ATOMS).argmin(1)
    share = near.bincount(minlength=3) / len(near)
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.015)


@pytest.mark.parametrize("augment_dim", [3.0, 32.0])
def test_p10_marginals_are_transported(augment_dim):
    def noisy(sigma, seed):
        pick = torch.randint(0, 3, (4000,), generator=torch.Generator().manual_seed(seed))
        return ATOMS[pick] + sigma * draw(4000, 2, augment_dim, seed + 1).double()

    grid = torch.linspace(math.log(2.0), math.log(0.4), 41, dtype=torch.float64).exp()
    carried = integrate(
        lambda at, s: student_denoise(at, ATOMS, s, augment_dim), noisy(2.0, 10), grid, heun_step
    )
    fresh = noisy(0.4, 20)
    for axis in (0, 1):
        assert stats.ks_2samp(carried[:, axis].numpy(), fresh[:, axis].numpy()).pvalue > 1e-3
    stale = noisy(2.0, 30)
    assert stats.ks_2samp(stale[:, 0].numpy(), fresh[:, 0].numpy()).pvalue < 1e-9


def test_p11_ddim_in_vp_is_euler_in_ve():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((5, 2), generator=generator, dtype=torch.float64)
    now, then = (torch.tensor(a, dtype=torch.float64) for a in (0.3, 0.6))
    sigma, sigma_next = ((1 - a).sqrt() / a.sqrt() for a in (now, then))

    def denoise(at, s):
        return student_denoise(at, ATOMS, s, 6.0)

    ve = euler_step(denoise, x, sigma, sigma_next)
    vp = now.sqrt() * x
    clean = denoise(vp / now.sqrt(), sigma)
    noise = (vp - now.sqrt() * clean) / (1 - now).sqrt()
    ddim = then.sqrt() * clean + (1 - then).sqrt() * noise
    torch.testing.assert_close(ddim / then.sqrt(), ve, rtol=1e-12, atol=1e-12)


def test_p12_scale_covariance():
    prior = [pfgmpp_prior(seeded_generators([1, 2]), (3,), 7.0, s) for s in (1.0, 5.0)]
    torch.testing.assert_close(prior[1], 5 * prior[0])
    x, sigma = torch.randn(4, 2).double(), torch.tensor(0.5).double()
    torch.testing.assert_close(
        student_log_weights(3 * x, 3 * ATOMS, 3 * sigma, 7.0),
        student_log_weights(x, ATOMS, sigma, 7.0),
    )


def test_p13_one_factor_a_sample():
    generators = seeded_generators([4, 9])
    noise = student_noise(generators, (3, 8, 8), 2.0)
    gauss = torch.stack([torch.randn((3, 8, 8), generator=g) for g in seeded_generators([4, 9])])
    ratio = noise / gauss
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio))
    assert abs(ratio[0, 0, 0, 0] - ratio[1, 0, 0, 0]) > 1e-3
    alone = student_noise(seeded_generators([9]), (3, 8, 8), 2.0)
    assert torch.equal(alone[0], noise[1])


@pytest.mark.parametrize("augment_dim", [16.0, 128.0])
def test_p14_churn_keeps_the_radius_law_and_gaussian_churn_does_not(augment_dim):
    n, dims = 3000, 256
    x = draw(n, dims, augment_dim, seed=5).double()
    one, up = torch.tensor(1.0).double(), torch.tensor(1.414).double()
    zero = torch.zeros_like(x)
    raised = student_raise(x, zero, one, up, augment_dim, seeded_generators(range(n)))
    law = stats.f(dims, augment_dim).cdf

    def p_value(sample):
        return stats.kstest((sample.square().sum(1) / (dims * up**2)).numpy(), law).pvalue

    assert p_value(raised) > 1e-3
    gauss = x + (up**2 - 1).sqrt() * torch.randn(n, dims, dtype=torch.float64)
    assert p_value(gauss) < 1e-6


def test_p15_spread_of_the_log_radius():
    for augment_dim in (64.0, 2048.0):
        radius = draw(20_000, 48, augment_dim).double().norm(dim=1)
        want = 0.5 * math.sqrt(special.polygamma(1, 48 / 2) + special.polygamma(1, augment_dim / 2))
        assert float(radius.log().std()) == pytest.approx(want, rel=0.03)


def test_churn_step_runs_and_arrives():
    atom = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    step = StudentChurnStep(seeded_generators(range(4)), augment_dim=8.0, gamma=0.2)
    x = 5 * draw(4, 2, 8.0).double()
    out = integrate(
        lambda at, s: student_denoise(at, atom, s, 8.0), x, karras_sigmas(5, 0.01, 5.0), step
    )
    torch.testing.assert_close(out, atom.expand(4, 2))


def test_churn_raises_the_sample_that_a_rule_has_moved():
    """A rule that replaces the sample (manifold projection) is heard before noise is added."""
    atom, there = torch.tensor([[0.3, -0.2]]).double(), torch.tensor([[2.0, 1.0]]).double()

    class Moving:
        moved = None

        def __call__(self, x, sigma):
            self.moved = None if sigma > 1 else there.expand_as(x)
            return atom.expand_as(x)

    step = StudentChurnStep(seeded_generators([1]), augment_dim=8.0, gamma=0.5)
    one, two = torch.tensor(1.0).double(), torch.tensor(1.5).double()
    found = step.lift(Moving(), torch.zeros(1, 2).double(), one, two)
    want = student_raise(there, atom, one, two, 8.0, seeded_generators([1]))
    torch.testing.assert_close(found, want)


def test_both_churning_steps_have_one_gate():
    """No churn at or below ``low`` and above ``high``: there both are Heun's step."""
    atom = torch.tensor([[0.3, -0.2]]).double()
    x = 2 * draw(3, 2, 8.0).double()

    def denoise(at, sigma):
        return student_denoise(at, atom, sigma, 8.0) + 0.1 * at

    def steps(**gate):
        gaussian = ChurnStep(torch.randn_like, gamma=0.3, **gate)
        return gaussian, StudentChurnStep(seeded_generators(range(3)), 8.0, gamma=0.3, **gate)

    for sigma, churns in ((0.5, False), (1.0, True), (2.0, True), (3.0, False)):
        now, then = (torch.tensor(s).double() for s in (sigma, sigma / 2))
        for step in steps(low=0.5, high=2.0):
            same = torch.equal(step(denoise, x, now, then), heun_step(denoise, x, now, then))
            assert same is not churns


def test_input_scale_is_edms_above_two_and_realised_below():
    x = 3 * torch.randn(5, 400)
    torch.testing.assert_close(
        input_scale(x, torch.tensor(1.2), 0.5, 128.0).flatten(), torch.tensor([1 / 1.3])
    )
    scaled = x * input_scale(x, torch.tensor(1.2), 0.5, 1.5)
    torch.testing.assert_close(scaled.square().mean(1), torch.ones(5))


def raw_output(scheduler, x, sigma, denoised):
    data = scheduler.config.sigma_data
    skip = data**2 / (sigma**2 + data**2)
    return (denoised - skip * x) / (sigma * data / (sigma**2 + data**2).sqrt())


def run(scheduler, steps, x, augment_dim, sigmas=None):
    if sigmas is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(sigmas=sigmas)
    path = []
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        sigma = scheduler.sigmas[scheduler.step_index]
        denoised = student_denoise(x, ATOMS.float(), sigma, augment_dim)
        x = scheduler.step(raw_output(scheduler, x, sigma, denoised), t, x).prev_sample
        path.append(x)
    return x, path


BOTH = pytest.mark.parametrize(
    "cls, step", [(PFGMPPEulerScheduler, euler_step), (PFGMPPHeunScheduler, heun_step)]
)


@pytest.mark.parametrize("sigmas", [[50.0], (60.0, 2.0), torch.tensor([70.0, 9.0, 1.0, 0.1, 0.0])])
@BOTH
def test_schedulers_take_levels_of_ones_own(cls, step, sigmas):
    scheduler = cls(augment_dim=4.0)
    scheduler.set_timesteps(sigmas=sigmas)
    assert scheduler.init_noise_sigma == float(sigmas[0])
    x = scheduler.init_noise_sigma * scheduler.prior_latents(seeded_generators(range(8)), (2,))
    out, path = run(scheduler, None, x, 4.0, sigmas)
    grid = [float(s) for s in sigmas if s > 0] + [0.0]
    assert len(path) == (len(grid) - 1 if step is euler_step else 2 * len(grid) - 3)
    want = integrate(lambda at, s: student_denoise(at, ATOMS.float(), s, 4.0), x, grid, step)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    scheduler.set_timesteps(3)
    assert scheduler.init_noise_sigma == 80.0


@pytest.mark.parametrize("steps", [1, 2])
@BOTH
def test_schedulers_run_in_one_and_two_steps(cls, step, steps):
    x = 80 * draw(8, 2, 4.0)
    out, _ = run(cls(augment_dim=4.0), steps, x, 4.0)
    want = integrate(
        lambda at, s: student_denoise(at, ATOMS.float(), s, 4.0), x, karras_sigmas(steps), step
    )
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-3)  # rounding, of values about 80


@pytest.mark.parametrize("augment_dim", [4.0, None])
@BOTH
def test_schedulers_take_the_steps_of_the_samplers(augment_dim, cls, step):
    scheduler = cls(augment_dim=augment_dim)
    x = scheduler.init_noise_sigma * scheduler.prior_latents(seeded_generators(range(8)), (2,))
    out, path = run(scheduler, 18, x, scheduler.augment_dim)
    assert len(path) == (35 if step is heun_step else 18)
    want = integrate(
        lambda at, s: student_denoise(at, ATOMS.float(), s, scheduler.augment_dim),
        x,
        karras_sigmas(18),
        step,
    )
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    again, _ = run(scheduler, 18, x, scheduler.augment_dim)
    assert torch.equal(out, again)


def test_gaussian_limit_is_diffusers_edm_euler():
    from diffusers import EDMEulerScheduler

    x = 80 * torch.randn(6, 2)
    _, ours = run(PFGMPPEulerScheduler(), 12, x, INF)
    _, theirs = run(EDMEulerScheduler(), 12, x, INF)
    assert all(map(torch.equal, ours, theirs)) and len(ours) == len(theirs) == 12
    sampled = integrate(
        lambda at, s: student_denoise(at, ATOMS.float(), s, INF), x, karras_sigmas(12), euler_step,
        trajectory=True,
    )  # fmt: skip
    for here, there in zip(sampled[1:], theirs, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [8, 20])
def test_multistep_solver_is_diffusers_edm_dpm(steps):
    """The same trajectory at D = infinity, to float32 rounding."""
    from diffusers import EDMDPMSolverMultistepScheduler

    # Our solver keeps its order until the last step, which arrives at 0.
    scheduler = EDMDPMSolverMultistepScheduler(lower_order_final=False)
    x = 80 * torch.randn(6, 2)
    _, theirs = run(scheduler, steps, x, INF)
    _, *ours = integrate(
        lambda at, s: student_denoise(at, ATOMS.float(), s, INF), x, karras_sigmas(steps),
        dpmpp_2m_step, trajectory=True,
    )  # fmt: skip
    for here, there in zip(ours, theirs, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize("name", ["flow", "flow-dpm", "ddim", "edm-dpm"])
def test_stock_schedulers_need_the_right_prior_and_nothing_else(name):
    """Each carries the same Student-t samples to where a fine Heun grid carries them."""
    import diffusers

    augment_dim, steps = 4.0, 200
    scheduler = {
        "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
        "flow-dpm": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW),
        "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
        "edm-dpm": lambda: diffusers.EDMDPMSolverMultistepScheduler(sigma_max=50.0),
    }[name]()
    scheduler.set_timesteps(steps)
    unit = draw(300, 2, augment_dim, seed=3).double()
    if name == "ddim":
        kept = scheduler.alphas_cumprod.double()
        alphas = kept[scheduler.timesteps].sqrt()
        sigmas, x = (1 - alphas**2).sqrt(), (1 - kept[scheduler.timesteps[0]]).sqrt() * unit
        start = float(sigmas[0] / alphas[0])
    elif name == "edm-dpm":
        sigmas, alphas, start = scheduler.sigmas.double(), torch.ones(steps).double(), 50.0
        x = 50 * unit
    else:
        sigmas = scheduler.sigmas[:steps].double().clamp_max(0.999)
        alphas, x = 1 - sigmas, sigmas[0] * unit
        start = float(sigmas[0] / alphas[0])
    ends = x.float()
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = alphas[i], sigmas[i]
        denoised = student_denoise(ends.double() / alpha, ATOMS, sigma / alpha, augment_dim)
        noise = (ends.double() - alpha * denoised) / sigma
        if name == "edm-dpm":
            scheduler.scale_model_input(ends, t)
            output = raw_output(scheduler, ends.double(), sigma, denoised)
        else:
            output = noise if name == "ddim" else noise - denoised
        ends = scheduler.step(output.float(), t, ends).prev_sample
    want = integrate(
        lambda at, s: student_denoise(at, ATOMS, s, augment_dim),
        start * unit,
        karras_sigmas(200, 0.002, start),
        heun_step,
    )
    near, known = (torch.cdist(e.double(), ATOMS).argmin(1) for e in (ends, want))
    assert (near == known).float().mean() > 0.97
    assert torch.cdist(ends.double(), ATOMS).min(1).values.median() < 0.05


def test_add_noise_has_the_law_and_takes_noise_that_has_it_already():
    scheduler = PFGMPPEulerScheduler(augment_dim=3.0)
    scheduler.set_timesteps(10)
    clean = torch.zeros(3000, 64)
    t = scheduler.timesteps[3].expand(3000)
    generator = torch.Generator().manual_seed(0)
    noisy = scheduler.add_noise(clean, torch.randn_like(clean), t, generator=generator)
    ratio = (noisy.double() / scheduler.sigmas[3]).square().mean(1).numpy()
    assert stats.kstest(ratio, stats.f(64, 3.0).cdf).pvalue > 1e-3
    noise = draw(3000, 64, 3.0)
    kept = scheduler.add_noise(clean, noise, t, student=True)
    torch.testing.assert_close(kept, scheduler.sigmas[3] * noise)


def test_schedulers_are_saved_with_their_dimension(tmp_path):
    PFGMPPHeunScheduler(augment_dim=128.0, sigma_max=40.0).save_pretrained(tmp_path)
    assert '"augment_dim": 128.0' in (tmp_path / "scheduler_config.json").read_text()
    loaded = PFGMPPHeunScheduler.from_pretrained(tmp_path)
    assert loaded.augment_dim == 128.0 and loaded.init_noise_sigma == 40.0


@pytest.mark.parametrize("cls", [PFGMPPEulerScheduler, PFGMPPHeunScheduler])
def test_churn_is_refused_at_finite_dimension(cls):
    scheduler = cls(augment_dim=128.0)
    scheduler.set_timesteps(4)
    x = torch.randn(1, 2)
    t = scheduler.timesteps[0]
    scheduler.scale_model_input(x, t)
    with pytest.raises(ValueError, match=r"s_churn=1.0.*Student-t"):
        scheduler.step(x, t, x, s_churn=1.0)


def test_heun_owes_no_stage_at_the_end_of_a_grid_that_ends_above_zero():
    scheduler = PFGMPPHeunScheduler(augment_dim=64.0, final_sigmas_type="sigma_min")
    x = scheduler.prior_latents(seeded_generators([0]), (2,)) * scheduler.init_noise_sigma
    run(scheduler, 3, x, 64.0)
    assert scheduler.sigmas[-1] > 0 and scheduler.state_in_first_order


def test_gaussian_churn_at_infinity_is_the_stock_one_and_heun_has_none():
    from diffusers import EDMEulerScheduler

    found = []
    for scheduler in (PFGMPPEulerScheduler(), EDMEulerScheduler()):
        scheduler.set_timesteps(4)
        x, t = torch.ones(1, 2), scheduler.timesteps[0]
        scheduler.scale_model_input(x, t)
        generator = torch.Generator().manual_seed(0)
        found.append(scheduler.step(x, t, x, s_churn=1.0, generator=generator, return_dict=False))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    heun = PFGMPPHeunScheduler()
    heun.set_timesteps(4)
    heun.scale_model_input(x, heun.timesteps[0])
    with pytest.raises(ValueError, match="deterministic"):
        heun.step(x, heun.timesteps[0], x, s_churn=1.0)


def test_noise_of_a_generator_on_another_device_goes_where_it_is_wanted():
    """No generator has to live beside the sample; the same on a GPU below."""
    generators = seeded_generators([3, 4])
    assert student_noise(generators, (5,), 4.0, device="meta").device.type == "meta"
    assert pfgmpp_prior(generators, (5,), 4.0, device="meta").device.type == "meta"
    one = torch.Generator().manual_seed(3)
    assert student_noise(one, (2, 5), 4.0, device="meta").device.type == "meta"
    assert student_raise(
        torch.zeros(2, 5, device="meta"), torch.zeros(2, 5, device="meta"), torch.tensor(1.0),
        torch.tensor(2.0), 4.0, generators,
    ).device.type == "meta"  # fmt: skip


@pytest.mark.gpu
def test_noise_is_drawn_where_the_generator_lives_and_goes_where_it_is_wanted():
    want = student_noise(seeded_generators([3]), (5,), 4.0)
    assert torch.equal(student_noise(seeded_generators([3]), (5,), 4.0, device="cuda").cpu(), want)
    there = student_noise(torch.Generator("cuda").manual_seed(3), (2, 5), 4.0)
    assert there.is_cuda and there.isfinite().all()
    x = torch.zeros(1, 5, device="cuda")
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    raised = student_raise(x, x, one, two, 4.0, seeded_generators([1]))
    assert raised.is_cuda and raised.isfinite().all()


RAISED = (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor(1.0), torch.tensor(2.0))


def half_prior(make, *dim):
    return make(seeded_generators(range(200)), (2,), *dim, dtype=torch.float16)


def half_noise(scheduler):
    scheduler.set_timesteps(3)
    noise = torch.randn(2000, 2).half()
    return scheduler.add_noise(noise, noise, scheduler.timesteps[:1].expand(2000))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: check_augment_dim(0), ValueError, "augment_dim"),
        (lambda: check_augment_dim(-3.0), ValueError, "augment_dim"),
        (lambda: check_augment_dim(math.nan), ValueError, "augment_dim"),
        (lambda: check_augment_dim("128"), TypeError, "augment_dim"),
        (lambda: student_factor(2, 0.0), ValueError, "augment_dim"),
        (lambda: student_noise(None, (3, 0), 4.0), ValueError, "empty"),
        (lambda: PFGMPPEulerScheduler(augment_dim=INF), ValueError, "None"),
        (lambda: StudentChurnStep([], augment_dim=INF), ValueError, "ChurnStep"),
        (lambda: StudentChurnStep([], 8.0, low=2.0, high=1.0), ValueError, "low < high"),
        (lambda: StudentChurnStep([], 8.0, gamma=-0.1), ValueError, "gamma"),
        (lambda: radius_of(1.0, 0.0), ValueError, "augment_dim"),
        (lambda: student_noise(None, (), 4.0), ValueError, "empty"),
        (lambda: student_raise(*RAISED, 4.0, seeded_generators([1])), ValueError, "2 generators"),
        (lambda: PFGMPPEulerScheduler().set_timesteps(sigmas=[1.0, 2.0]), ValueError, "decrease"),
        (lambda: PFGMPPHeunScheduler().set_timesteps(sigmas=[]), ValueError, "at least two"),
        (lambda: half_prior(student_noise, 0.2), ValueError, "overflows float16"),
        (lambda: half_prior(pfgmpp_prior, 1.0), ValueError, "overflows float16"),
        (lambda: half_prior(PFGMPPEulerScheduler(1.0).prior_latents), ValueError, "float16"),
        (lambda: half_noise(PFGMPPEulerScheduler(1.0)), ValueError, "float16"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
