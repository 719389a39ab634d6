"""Solvers and schedulers on a device that refuses what CUDA would; the same bits as on the CPU."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import EDMEulerScheduler
from fake_cuda import FakeCuda
from torch import Tensor

from diffsteer.core import GaussianMixture, GuidedDenoiser, Level, seeded_generators, seeded_noise
from diffsteer.core.student import student_noise
from diffsteer.guidance import AdaptiveProjectedGuidance
from diffsteer.samplers import (
    AncestralStep,
    ChurnStep,
    StudentChurnStep,
    dpmpp_2m_step,
    euler_step,
    flow_sigmas,
    heun_step,
    integrate,
    karras_sigmas,
    log_likelihood,
    pfgmpp_prior,
)
from diffsteer.samplers.kdiff_schedulers import (
    KDiffDPMSolverMultistepScheduler,
    KDiffFlowMatchEulerScheduler,
    KDiffFlowMatchHeunScheduler,
    KDiffUniPCMultistepScheduler,
)
from diffsteer.samplers.pfgmpp_schedulers import PFGMPPEulerScheduler, PFGMPPHeunScheduler

SHAPE = (2, 4, 4)
SEEDS = [1, 2, 3]


def draw(x: Tensor) -> Tensor:
    """Noise of one generator a sample, on the CPU: copied to the device without waiting for it."""
    return torch.stack([torch.randn(SHAPE, generator=g) for g in seeded_generators(SEEDS)])


FLOW = {
    "euler": lambda: euler_step,
    "heun": lambda: heun_step,
    "dpmpp_2m": lambda: functools.partial(dpmpp_2m_step, level=Level.flow),
    "ancestral": lambda: AncestralStep(draw, level=Level.flow),
}
VE = {
    "dpmpp_2m": lambda: dpmpp_2m_step,
    "ancestral": lambda: AncestralStep(draw, eta=0.5),
    "churn": lambda: ChurnStep(draw, gamma=0.2),
    "student": lambda: StudentChurnStep(generators=seeded_generators(SEEDS), augment_dim=16.0),
}
CASES = [
    *[pytest.param(Level.flow, make, flow_sigmas(4), id=f"flow-{n}") for n, make in FLOW.items()],
    *[pytest.param(Level.ve, make, karras_sigmas(4), id=f"ve-{n}") for n, make in VE.items()],
]


@pytest.fixture
def mixture() -> GaussianMixture:
    generator = torch.Generator().manual_seed(1)
    return GaussianMixture.random(3, shape=SHAPE, generator=generator, dtype=torch.float32)


def sample(mixture: GaussianMixture, level, step, grid: Tensor, x: Tensor, labels: Tensor):
    model, rule = mixture.denoiser(level=level), AdaptiveProjectedGuidance(3.0)
    denoise = GuidedDenoiser(rule, model, model, level=level, arguments={"labels": labels})
    return integrate(denoise, x, grid, step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level, make, grid", CASES)
def test_solvers(mixture: GaussianMixture, level, make, grid: Tensor, dtype: torch.dtype) -> None:
    labels = torch.tensor([0, 1, 2])
    x = (seeded_noise(SEEDS, SHAPE) * grid[0]).to(dtype)
    expected = sample(mixture.to("cpu"), level, make(), grid, x, labels)
    # In float64 one number a sample, where the law of PFGM++ asks for it.
    with FakeCuda(doubles=make is VE["student"]) as gpu:
        with gpu.allow():
            there = mixture.to("cuda")
        result = sample(there, level, make(), grid, gpu.put(x), gpu.put(labels))
        assert torch.equal(gpu.fetch(result), expected)


def test_likelihood(mixture: GaussianMixture) -> None:
    x, grid = seeded_noise(SEEDS, SHAPE), karras_sigmas(3)[:-1]
    probes = seeded_noise([4, 5], (3, *SHAPE)).sign()
    expected = log_likelihood(mixture.to("cpu").denoiser(level=Level.ve), x, grid, probes=probes)
    with FakeCuda() as gpu:
        with gpu.allow():
            denoise = mixture.to("cuda").denoiser(level=Level.ve)
        result = log_likelihood(denoise, gpu.put(x), grid, probes=gpu.put(probes))
        assert torch.equal(gpu.fetch(result), expected)


def test_noise_of_seeds_goes_to_the_device_unwaited_for() -> None:
    want = student_noise(seeded_generators(SEEDS), SHAPE, 4.0)
    prior = pfgmpp_prior(seeded_generators(SEEDS), SHAPE, 4.0)
    with FakeCuda() as gpu:
        assert torch.equal(
            gpu.fetch(seeded_noise(SEEDS, SHAPE, device="cuda")), seeded_noise(SEEDS, SHAPE)
        )
        there = student_noise(seeded_generators(SEEDS), SHAPE, 4.0, device="cuda")
        assert torch.equal(gpu.fetch(there), want)
        there = pfgmpp_prior(seeded_generators(SEEDS), SHAPE, 4.0, device="cuda")
        assert torch.equal(gpu.fetch(there), prior)


def test_generators_of_the_device_stay_there() -> None:
    with FakeCuda(doubles=True) as gpu:  # the factor is drawn in float64, one number a sample
        there = student_noise(seeded_generators(SEEDS, "cuda"), SHAPE, 4.0, device="cuda")
        assert gpu.fetch(there).isfinite().all()
        assert student_noise(torch.Generator("cuda"), (3, *SHAPE), 4.0).is_cuda
        assert pfgmpp_prior(seeded_generators(SEEDS, "cuda"), SHAPE, 4.0, device="cuda").is_cuda
        x = gpu.put(torch.zeros(3, *SHAPE))
        step = StudentChurnStep(generators=seeded_generators(SEEDS, "cuda"), augment_dim=16.0)
        raised = step.lift(lambda x, sigma: 0 * x, x, torch.tensor(1.0), torch.tensor(2.0))
        assert gpu.fetch(raised).isfinite().all()


FLOW_STOCK = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "k": 0.7}
SCHEDULERS = [
    lambda: PFGMPPEulerScheduler(augment_dim=128.0),
    lambda: PFGMPPEulerScheduler(augment_dim=2.0),
    lambda: PFGMPPHeunScheduler(augment_dim=None),
    lambda: EDMEulerScheduler(),
    lambda: KDiffFlowMatchEulerScheduler(k=0.7),
    lambda: KDiffFlowMatchHeunScheduler(k=0.02),
    lambda: KDiffDPMSolverMultistepScheduler(**FLOW_STOCK),
    lambda: KDiffUniPCMultistepScheduler(**FLOW_STOCK),
]


def denoised_by(scheduler, x: Tensor, device: str) -> Tensor:
    """A loop as pipelines write it, over a "network" that shrinks its input."""
    scheduler.set_timesteps(4, device=device)
    for t in scheduler.timesteps:
        x = scheduler.step(0.3 * scheduler_input(scheduler, x, t), t, x, return_dict=False)[0]
    return x


def scheduler_input(scheduler, x: Tensor, t: Tensor) -> Tensor:
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


@pytest.mark.parametrize("make", SCHEDULERS)
def test_schedulers(make) -> None:
    """They wait no longer than the stock schedulers that they extend."""
    x = seeded_noise(SEEDS, SHAPE)
    expected = denoised_by(make(), x, "cpu")
    with FakeCuda(waits=True) as gpu:
        result = denoised_by(make(), gpu.put(x), "cuda")
        assert torch.equal(gpu.fetch(result), expected)
        ours = [event for event in gpu.events if event.where.startswith("src/diffsteer")]
        assert not ours, ours
