"""Pipelines that carry k, D or EDM's preconditioning: what they sample, save and refuse."""

from __future__ import annotations

import json
import math

import diffusers
import pytest
import torch
from scipy import stats
from tiny_flow import gaussian_pipeline, tiny_dit, tiny_pipeline

from diffsteer import ClassConditionalPipeline, Kind, steer
from diffsteer.core import from_denoised, seeded_generators, seeded_noise
from diffsteer.core.prediction import Level
from diffsteer.core.student import student_noise
from diffsteer.guidance import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffsteer.pipelines import load_pipeline, load_weak
from diffsteer.samplers.pfgmpp_schedulers import PFGMPPEulerScheduler, PFGMPPHeunScheduler

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW),
}
EDM_SCHEDULERS = {
    "stock euler": diffusers.EDMEulerScheduler,
    "stock dpm": diffusers.EDMDPMSolverMultistepScheduler,
    "euler": lambda: PFGMPPEulerScheduler(augment_dim=8.0),
    "heun": lambda: PFGMPPHeunScheduler(augment_dim=8.0),
}


def latents(pipe, labels=(0, 3, 9), seeds=(5, 6, 7), **call):
    call = {"num_inference_steps": 6, "seeds": list(seeds), "output_type": "latent", **call}
    return pipe(list(labels), **call).images


@pytest.mark.parametrize("name", SCHEDULERS)
def test_k11_trajectories_do_not_depend_on_k_through_any_flow_scheduler(name):
    pipes = [gaussian_pipeline(0.2, 0.3, "velocity", SCHEDULERS[name]())]
    pipes += [
        gaussian_pipeline(0.2, 0.3, "kdiff", SCHEDULERS[name](), k=k)
        for k in (0.05, 0.3, 0.5, 0.9, 0.99, 1.0)
    ]
    first, *others = [latents(pipe, guidance_scale=1.5) for pipe in pipes]
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=2e-4)


def test_minus_noise_predictions_stay_finite_from_pure_noise_on():
    """k = 0 knows nothing at sigma 1; the clamp of the method keeps the first step finite."""
    result = latents(gaussian_pipeline(0.2, 0.3, "kdiff", k=0.0), num_inference_steps=60)
    assert result.isfinite().all()
    assert result.abs().max() < 3


@pytest.mark.parametrize("k", [0.3, 0.9])
def test_steering_a_k_diff_model_is_steering_its_velocity(k):
    rules = (ClassifierFreeGuidance(3.0), AdaptiveProjectedGuidance(3.0, latent_std=0.5))
    for rule in rules:
        found = []
        for said in ({"prediction": "velocity"}, {"prediction": "kdiff", "k": k}):
            pipe = gaussian_pipeline(0.2, 0.3, **said)
            with steer(pipe, rule):
                found.append(latents(pipe, guidance_scale=2.0))
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-4)


def test_steering_with_plain_guidance_is_bit_exact_at_any_k():
    network = tiny_dit()
    pipe = tiny_pipeline("kdiff", network, k=0.7)
    plain = latents(pipe, guidance_scale=2.5)
    with steer(pipe, ClassifierFreeGuidance(2.5)):
        assert torch.equal(latents(pipe, guidance_scale=2.5), plain)


# -- saving and refusing ---------------------------------------------------------------------------


def test_k_and_d_are_saved_and_cannot_be_overridden(tmp_path):
    pipe = tiny_pipeline("kdiff", k=0.7, augment_dim=64.0)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["prediction"], index["k"], index["augment_dim"]) == ("kdiff", 0.7, 64.0)
    again = load_pipeline(tmp_path)
    assert again.prediction_kind == Kind.kdiff(0.7) and again.config.augment_dim == 64.0
    torch.testing.assert_close(latents(again), latents(pipe), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"k: the network was trained with k=0.7 .*0.5"):
        ClassConditionalPipeline.from_pretrained(tmp_path, k=0.5)
    with pytest.raises(ValueError, match="augment_dim: the network was trained with"):
        ClassConditionalPipeline.from_pretrained(tmp_path, augment_dim=128.0)
    with pytest.raises(ValueError, match="prediction: the network was trained with"):
        ClassConditionalPipeline.from_pretrained(tmp_path, prediction="velocity", k=None)
    assert ClassConditionalPipeline.from_pretrained(tmp_path, k=0.7).config.k == 0.7


def test_pipelines_of_before_there_was_a_k_load_as_they_were(tmp_path):
    tiny_pipeline("denoised").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["k"], index["augment_dim"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    again = load_pipeline(tmp_path)
    assert again.prediction_kind == Kind.DENOISED and again.config.augment_dim is None


def with_config(scheduler, **config):
    scheduler.register_to_config(**config)
    return scheduler


def edm_pipe(scheduler, **said):
    return tiny_pipeline("edm", scheduler=scheduler, **said)


EULER = diffusers.FlowMatchEulerDiscreteScheduler
BAD = {
    "no k": (lambda: tiny_pipeline("kdiff"), "needs the k it was trained at"),
    "stray k": (lambda: tiny_pipeline("denoised", k=0.5), "no other has one"),
    "k outside": (lambda: tiny_pipeline("kdiff", k=1.2), r"\[0, 1\], got 1.2"),
    "k NaN": (lambda: tiny_pipeline("kdiff", k=math.nan), r"\[0, 1\], got nan"),
    "D zero": (lambda: tiny_pipeline(augment_dim=0.0), "must be positive"),
    "D negative": (lambda: tiny_pipeline(augment_dim=-3.0), "must be positive"),
    "D infinite": (lambda: tiny_pipeline(augment_dim=math.inf), "as None"),
    "another k": (
        lambda: latents(tiny_pipeline("kdiff", k=0.7, scheduler=with_config(EULER(), k=0.5))),
        "its k is 0.5, but the network was trained with k=0.7",
    ),
    "another D": (
        lambda: latents(edm_pipe(PFGMPPEulerScheduler(augment_dim=64.0), augment_dim=128.0)),
        "its augment_dim is 64.0, but the network was trained with augment_dim=128.0",
    ),
    "D of none": (lambda: latents(edm_pipe(PFGMPPEulerScheduler(augment_dim=64.0))), "is 64.0"),
    "random flow": (
        lambda: latents(tiny_pipeline(augment_dim=9.0, scheduler=EULER(stochastic_sampling=True))),
        "adds Gaussian noise",
    ),
    "solver with noise by default": (
        lambda: latents(tiny_pipeline(augment_dim=9.0, scheduler=diffusers.SASolverScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction"))),
        "adds Gaussian noise",
    ),
    "sde solver": (
        lambda: latents(edm_pipe(diffusers.EDMDPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++"), augment_dim=9.0)),
        "adds Gaussian noise",
    ),
    "flow scheduler for EDM": (lambda: latents(edm_pipe(EULER())), "does not precondition"),
    "EDM scheduler for flow": (
        lambda: latents(tiny_pipeline(scheduler=diffusers.EDMEulerScheduler())),
        "no flow sigmas",
    ),
    "EDM v": (
        lambda: latents(edm_pipe(diffusers.EDMEulerScheduler(prediction_type="v_prediction"))),
        "call 'epsilon'",
    ),
    "small D, stock scheduler": (
        lambda: latents(edm_pipe(diffusers.EDMEulerScheduler(), augment_dim=1.5)),
        "input explode",
    ),
    "own sigmas": (
        lambda: latents(edm_pipe(diffusers.EDMEulerScheduler()), sigmas=[80.0, 1.0]),
        "takes no sigmas",
    ),
    "N of the prior": (
        lambda: tiny_pipeline(augment_dim=8.0)([1, 2], num_inference_steps=2, latents=student_noise(
            seeded_generators([0, 1]), (3, 4, 4), 8.0)),
        r"expected shape \(2, 3, 8, 8\), got \(2, 3, 4, 4\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_belong_together_is_refused(name):
    call, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        call()


def test_a_weak_model_of_another_k_is_refused(tmp_path):
    tiny_pipeline("kdiff", k=0.7).save_pretrained(tmp_path / "strong")
    tiny_pipeline("kdiff", k=0.4).save_pretrained(tmp_path / "early")
    pipe = load_pipeline(tmp_path / "strong")
    load_weak(tmp_path / "strong", pipe)
    with pytest.raises(ValueError, match=r"k=0\.4, the one that it would guide with k=0\.7"):
        load_weak(tmp_path / "early", pipe)
    weak = tmp_path / "weak"  # as the trainer writes it: a denoiser and a note
    tiny_dit().save_pretrained(weak)
    load_weak(weak, pipe)
    (weak / "target.json").write_text('{"prediction": "kdiff", "k": 0.6, "augment_dim": null}')
    with pytest.raises(ValueError, match=r"k=0\.6"):
        load_weak(weak, pipe)


# -- the prior -------------------------------------------------------------------------------------


def first_inputs(pipe, count, **call):
    seen = []
    pipe.transformer.register_forward_hook(lambda _, a, o: seen.append(a[0]))
    pipe([0], seeds=list(range(count)), num_inference_steps=1, output_type="latent", **call)
    return seen[0].double()


def test_the_prior_of_a_finite_d_is_student_t_and_belongs_to_the_seed():
    x = first_inputs(tiny_pipeline(augment_dim=6.0), 1000)
    law = stats.f(192, 6.0).cdf
    assert stats.kstest((x.square().flatten(1).mean(1)).numpy(), law).pvalue > 1e-3
    alone = student_noise(seeded_generators([417]), (3, 8, 8), 6.0)
    assert torch.equal(x[417].float(), alone[0])
    gauss = first_inputs(tiny_pipeline(), 1000)
    assert stats.kstest((gauss.square().flatten(1).mean(1)).numpy(), law).pvalue < 1e-6
    assert torch.equal(gauss[:3].float(), seeded_noise(range(3), (3, 8, 8)))


def test_inputs_of_a_flow_network_do_not_explode_below_two_dimensions():
    x = first_inputs(tiny_pipeline(augment_dim=0.5), 300)
    size = x.square().flatten(1).mean(1).sqrt()
    assert size.max() < 2.001 and (size > 1.999).any() and size.min() < 1


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", EDM_SCHEDULERS)
def test_an_edm_network_reaches_its_one_point_at_a_finite_d(name, scale):
    """On one-point data the exact denoiser is that point; the class moves it."""
    network, scheduler = tiny_dit(), EDM_SCHEDULERS[name]()
    seen = []

    def forward(x, timestep, class_labels, **_):
        sigma = (timestep / 250).exp()
        noisy = x * (sigma**2 + 0.25).sqrt().reshape(-1, 1, 1, 1)
        shift = torch.where(class_labels == 10, 0, class_labels / 10).reshape(-1, 1, 1, 1)
        seen.append(sigma[0])
        point = (0.1 + shift).expand_as(noisy)
        return (from_denoised(point, Kind.edm(0.5), noisy, Level.ve(sigma)),)

    network.forward = forward
    pipe = tiny_pipeline("edm", network, scheduler=scheduler, augment_dim=8.0)
    result = latents(pipe, num_inference_steps=9, guidance_scale=scale)
    expected = 0.1 + scale * torch.tensor([0.0, 0.3, 0.9]).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(result, expected.expand_as(result), rtol=0, atol=2e-3)
    assert float(seen[0]) == pytest.approx(80, rel=1e-4) and len(seen) == pipe.num_timesteps


def test_an_edm_pipeline_is_saved_with_its_scheduler_and_can_be_steered(tmp_path):
    pipe = tiny_pipeline("edm", scheduler=PFGMPPHeunScheduler(augment_dim=16.0), augment_dim=16.0)
    pipe.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    assert isinstance(again.scheduler, PFGMPPHeunScheduler)
    plain = latents(again, guidance_scale=2.0)
    torch.testing.assert_close(plain, latents(pipe, guidance_scale=2.0), rtol=1e-3, atol=1e-3)
    with steer(again, ClassifierFreeGuidance(2.0)):
        torch.testing.assert_close(latents(again, guidance_scale=3.0), plain, rtol=0, atol=1e-5)
