"""k-Diff networks in stock pipelines: the schedulers that turn u into a velocity."""

from __future__ import annotations

import inspect
import json
import math

import diffusers
import pytest
import torch
from tiny_flow import gaussian_pipeline, tiny_pipeline
from tiny_pipelines import build

from diffsteer import AdaptiveProjectedGuidance, ClassifierFreeGuidance, Kind, Level, steer
from diffsteer.core import from_denoised, to_denoised
from diffsteer.samplers.kdiff_schedulers import (
    KDiffDPMSolverMultistepScheduler,
    KDiffFlowMatchEulerScheduler,
    KDiffFlowMatchHeunScheduler,
    KDiffFlowMatchLCMScheduler,
    KDiffUniPCMultistepScheduler,
)

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
PAIRS = {
    "euler": (diffusers.FlowMatchEulerDiscreteScheduler, KDiffFlowMatchEulerScheduler, {}),
    "shifted": (
        diffusers.FlowMatchEulerDiscreteScheduler, KDiffFlowMatchEulerScheduler, {"shift": 3.0}
    ),
    "heun": (diffusers.FlowMatchHeunDiscreteScheduler, KDiffFlowMatchHeunScheduler, {}),
    "lcm": (diffusers.FlowMatchLCMScheduler, KDiffFlowMatchLCMScheduler, {}),
    "dpm": (diffusers.DPMSolverMultistepScheduler, KDiffDPMSolverMultistepScheduler, FLOW),
    "sde": (
        diffusers.DPMSolverMultistepScheduler, KDiffDPMSolverMultistepScheduler,
        {**FLOW, "algorithm_type": "sde-dpmsolver++"},
    ),
    "unipc": (diffusers.UniPCMultistepScheduler, KDiffUniPCMultistepScheduler, FLOW),
}  # fmt: skip


def run(scheduler, kind, dtype=torch.float32):
    """From noise to pixels of N(0.3, 0.4^2) with their perfect denoiser."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    scheduler.set_timesteps(8)
    random = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": torch.Generator().manual_seed(1)} if random else {}
    for t in scheduler.timesteps:
        scheduler._init_step_index(t) if scheduler.step_index is None else None
        sigma = scheduler.sigmas[scheduler.step_index].clamp(max=0.9999)
        gain = (1 - sigma) * 0.16 / ((1 - sigma) ** 2 * 0.16 + sigma**2)
        denoised = 0.3 + gain * (x.float() - (1 - sigma) * 0.3)
        output = from_denoised(denoised, kind, x.float(), Level.flow(sigma)).to(dtype)
        x = scheduler.step(output, t, x, **extra, return_dict=False)[0]
    return x


@pytest.mark.parametrize("k", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", PAIRS)
def test_every_stock_flow_scheduler_takes_the_same_path(name, k):
    stock, ours, options = PAIRS[name]
    want = run(stock(**options), Kind.VELOCITY)
    found = run(ours(k=k, **options), Kind.kdiff(k))
    torch.testing.assert_close(found, want, rtol=0, atol=2e-4)
    assert want.std() > 0.2


def test_outputs_in_half_precision_are_read_in_float32():
    wide = run(KDiffFlowMatchEulerScheduler(k=0.9), Kind.kdiff(0.9))
    found = run(KDiffFlowMatchEulerScheduler(k=0.9), Kind.kdiff(0.9), torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wide, rtol=0, atol=0.04)


def as_kdiff(pipe, k):
    """Let a network that predicts velocities predict u; the latents of SD3 are its first input."""

    def hook(module, args, kwargs, output):
        x, sigma = kwargs["hidden_states"], kwargs["timestep"] / 1000
        level = Level.flow(sigma)
        denoised = to_denoised(output[0], Kind.VELOCITY, x, level)
        return (from_denoised(denoised, Kind.kdiff(k), x, level),)

    pipe.transformer.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize(
    "rule", [None, ClassifierFreeGuidance(4.0), AdaptiveProjectedGuidance(4.0)]
)
def test_a_stock_pipeline_samples_and_steers_a_k_diff_network(tmp_path, rule):
    stock, tiny = build("sd3"), build("sd3")
    as_kdiff(tiny.pipe, 0.8)
    tiny.pipe.scheduler = KDiffFlowMatchEulerScheduler.from_config(
        tiny.pipe.scheduler.config, k=0.8
    )
    found = []
    for one in (stock, tiny):
        if rule is None:
            found.append(one.call())
        else:
            with steer(one.pipe, rule):
                found.append(one.call())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)
    assert found[0].std() > 0.1


def test_k_is_saved_and_a_pipeline_brings_its_scheduler_along(tmp_path):
    pipe = tiny_pipeline("kdiff", k=0.7, scheduler=KDiffFlowMatchHeunScheduler(k=0.7, shift=2.0))
    pipe.save_pretrained(tmp_path)
    text = (tmp_path / "scheduler" / "scheduler_config.json").read_text()
    assert json.loads(text)["k"] == 0.7 and json.loads(text)["shift"] == 2.0
    again = type(pipe).from_pretrained(tmp_path)
    assert type(again.scheduler) is KDiffFlowMatchHeunScheduler and again.scheduler.config.k == 0.7


def test_our_own_pipeline_leaves_the_conversion_to_such_a_scheduler():
    call = {"seeds": [1, 2], "num_inference_steps": 5, "output_type": "latent"}
    own = gaussian_pipeline(0.2, 0.3, "kdiff", k=0.9)([3, 4], **call).images
    scheduler = KDiffFlowMatchEulerScheduler(k=0.9)
    found = gaussian_pipeline(0.2, 0.3, "kdiff", scheduler, k=0.9)([3, 4], **call).images
    torch.testing.assert_close(found, own, rtol=0, atol=1e-4)


def sample(**said):
    pipe = tiny_pipeline(**said)
    return pipe([1], seeds=[0], num_inference_steps=2, output_type="latent")


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: KDiffFlowMatchEulerScheduler(), "k must be the k the network was trained at"),
        (lambda: KDiffFlowMatchEulerScheduler(k=1.5), r"\[0, 1\], got 1.5"),
        (lambda: KDiffFlowMatchHeunScheduler(k=math.nan), "got nan"),
        (lambda: KDiffFlowMatchEulerScheduler(k="0.5"), "got '0.5'"),
        (lambda: KDiffFlowMatchEulerScheduler(k=0.5, invert_sigmas=True), "invert_sigmas"),
        (lambda: KDiffDPMSolverMultistepScheduler(k=0.5), "use_flow_sigmas=True"),
        (
            lambda: KDiffUniPCMultistepScheduler(k=0.5, use_flow_sigmas=True),
            "prediction_type='flow_prediction'",
        ),
        (
            lambda: sample(
                prediction="kdiff", k=0.7, scheduler=KDiffFlowMatchEulerScheduler(k=0.5)
            ),
            "its k is 0.5, but the network was trained with k=0.7",
        ),
        (
            lambda: sample(prediction="denoised", scheduler=KDiffFlowMatchEulerScheduler(k=1.0)),
            "its k is 1.0, but the network was trained with k=None",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_levels_of_ones_own_may_end_at_zero():
    """A velocity at sigma = 0 is divided by nothing; the step there goes nowhere."""
    scheduler, x = KDiffFlowMatchEulerScheduler(k=0.9), torch.randn(2, 4)
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.0])
    for t in scheduler.timesteps[:2]:
        x = scheduler.step(torch.randn(2, 4), t, x, return_dict=False)[0]
    last = scheduler.step(torch.randn(2, 4), scheduler.timesteps[2], x, return_dict=False)[0]
    assert torch.equal(last, x)


def test_a_level_for_each_token_is_refused():
    scheduler = KDiffFlowMatchEulerScheduler(k=0.5)
    scheduler.set_timesteps(2)
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="per_token_timesteps"):
        scheduler.step(x, scheduler.timesteps[0], x, per_token_timesteps=torch.ones(1, 2))
