"""The straight-path grid of DiT: released indices, DDIM on them, CFG-MP's price on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline
from tiny_pipelines import build

from diffsteer import steer
from diffsteer.core import Level
from diffsteer.guidance import ClassifierFreeGuidance, ManifoldProjectedGuidance
from diffsteer.guidance.cfgmp import flow_sigma
from diffsteer.pipelines import D2FScheduler, d2f_timesteps

CUMPROD = DDIMScheduler().alphas_cumprod  # linear betas 1e-4 to 0.02
CFG = ClassifierFreeGuidance(2.0)


def test_the_released_indices() -> None:
    linear = D2FScheduler(beta_schedule="linear").alphas_cumprod
    assert torch.equal(linear, CUMPROD)
    want = [999, 658, 527, 426, 338, 258, 187, 125, 73, 30]
    assert d2f_timesteps(linear, 10) == want
    many = d2f_timesteps(linear, 300)
    assert len(many) == len(set(many)) < 300 and many == sorted(many, reverse=True)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_step_is_eulers_on_the_straight_path(kind: str) -> None:
    scheduler = D2FScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(5)
    x, output = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    now, after = scheduler.timesteps[1], scheduler.timesteps[2]
    stepped = scheduler.step(output, now, x)
    levels = [Level.vp(scheduler.alphas_cumprod[int(t)].double()) for t in (now, after)]
    sigmas, totals = zip(*((flow_sigma(v), v.alpha + v.sigma) for v in levels), strict=True)
    y = x / totals[0]
    velocity = (y - stepped.pred_original_sample) / sigmas[0]
    want = (y + (sigmas[1] - sigmas[0]) * velocity) * totals[1]
    torch.testing.assert_close(stepped.prev_sample, want, rtol=1e-5, atol=1e-5)
    reference = DDIMScheduler(prediction_type=kind, clip_sample=False)
    reference.set_timesteps(5)
    clean = reference.step(output, now, x).pred_original_sample
    torch.testing.assert_close(stepped.pred_original_sample, clean, rtol=1e-5, atol=1e-5)


def test_the_last_step_lands_on_the_clean_sample() -> None:
    scheduler = D2FScheduler(clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(3)
    x, output = torch.randn(2, 1, 3, 4, 4)
    last = scheduler.step(output, scheduler.timesteps[-1], x)
    assert torch.equal(last.prev_sample, last.pred_original_sample)


@pytest.mark.parametrize("steps, gated", [(10, 7), (12, 8), (20, 13)])
def test_the_released_gate_opens_at_as_many_steps(steps: int, gated: int) -> None:
    level = Level.vp(CUMPROD[d2f_timesteps(CUMPROD, steps)])
    assert int((flow_sigma(level) > 0.4).sum()) == gated


def test_dit_under_the_released_preset() -> None:
    tiny = build("dit")
    tiny.pipe.scheduler = D2FScheduler.from_config(tiny.pipe.scheduler.config)
    with steer(tiny.pipe, ManifoldProjectedGuidance.dit(CFG)) as run:
        latents = tiny.call(num_inference_steps=5)
    # Doubled batches: a call is both branches; 2 K - 1 for the iterations, 1 at the moved sample.
    gated = [1 / (1 + 1 / record.ratio) > 0.4 for record in run.steps]
    assert [record.evaluations for record in run.steps] == [5 if inside else 1 for inside in gated]
    assert sum(gated) == 4
    with steer(tiny.pipe, CFG):
        plain = tiny.call(num_inference_steps=5)
    assert torch.isfinite(latents).all() and not torch.allclose(latents, plain, rtol=1e-2)
    assert run.steps[-1].sigma is not None


def test_is_saved_with_its_pipeline(tmp_path: Path) -> None:
    tiny = build("dit")
    tiny.pipe.scheduler = D2FScheduler.from_config(tiny.pipe.scheduler.config)
    tiny.pipe.save_pretrained(tmp_path)
    again = DiTPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is D2FScheduler


def test_bad_input_is_named() -> None:
    scheduler = D2FScheduler()
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, 5, x)
    with pytest.raises(ValueError, match="num_inference_steps"):
        scheduler.set_timesteps(2000)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="eta must be 0"):
        scheduler.step(x, scheduler.timesteps[0], x, eta=1.0)
