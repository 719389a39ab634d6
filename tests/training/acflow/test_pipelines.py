"""The same code for every family: what was observed of a pipeline repeats its own predictions."""

from __future__ import annotations

import pytest
import torch
from tiny_flow import tiny_pipeline
from tiny_pipelines import build

from diffsteer.pipelines import load_pipeline
from diffsteer.training.acflow import ACFlowConfig
from diffsteer.training.acflow.conditioning import Conditioning, autocasting
from diffsteer.training.acflow.flow_model import fit_timestep
from diffsteer.training.acflow.observer import Observer
from diffsteer.training.prompts import Prompt

FLOWS = (
    "sd3", "flux", "sana", "aura-flow", "chroma", "hidream", "lumina2", "ltx", "qwen", "wan",
    "z-image",
)  # fmt: skip


def watch(tiny, **call):
    """Every (state, level, what the scheduler was given), and what was observed."""
    steps = []

    def note(sample, velocity, sigma, following):
        steps.append((sample.clone(), sigma, velocity.clone()))
        return sample + (following - sigma) * velocity.to(sample.dtype)

    with Observer(tiny.pipe, replace=note) as seen:
        tiny.call(**call)
    return steps, seen


def levels_of(model, seen):
    """The levels that the denoiser was told: some solvers round them to whole timesteps."""
    size = len(seen.observed.clean)
    times = [torch.as_tensor(time).flatten()[:1].expand(size) for time in seen.observed.times]
    return [(time.float() - model.offset) / model.slope for time in times]


@pytest.mark.parametrize("name", FLOWS)
def test_the_model_repeats_the_velocities_of_the_pipeline(name):
    tiny = build(name)
    off = 0.0 if name in ("z-image",) else 1.0
    steps, seen = watch(tiny, **{tiny.guidance_argument: off})
    model, cond = seen.learnt(), seen.observed.cond
    assert seen.observed.uncond is None and seen.observed.evaluations == len(steps)
    levels = levels_of(model, seen)
    for (x, sigma, velocity), level in zip(steps, levels, strict=True):
        torch.testing.assert_close(level, torch.full((len(x),), sigma), rtol=2e-3, atol=2e-3)
        with torch.no_grad():
            found = model.velocity(cond.module, x, level, cond)
        torch.testing.assert_close(found, velocity.float(), rtol=2e-3, atol=2e-4)
    # samples can be taken apart, put together and evaluated at levels of their own
    x = torch.cat([steps[0][0][:1], steps[1][0][1:]])
    both = Conditioning.join([cond.take([0]), cond.take([1])])
    with torch.no_grad():
        found = model.velocity(cond.module, x, torch.stack([levels[0][0], levels[1][1]]), both)
    expected = torch.cat([steps[0][2][:1], steps[1][2][1:]]).float()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["sd3", "flux", "sana", "z-image"])
def test_guided_velocities_are_those_of_the_pipeline(name):
    tiny = build(name)
    scale = 3.0
    steps, seen = watch(tiny, **{tiny.guidance_argument: scale})
    scale = scale + 1 if name == "z-image" else scale  # its scale counts from the condition
    model, run = seen.learnt(), seen.observed
    assert run.uncond is not None and run.evaluations == 2 * len(steps)
    x, _, velocity = steps[1]
    level = levels_of(model, seen)[1]
    found = model.guided(run.cond.module, x, level, run.cond, run.uncond, scale).detach()
    torch.testing.assert_close(found, velocity.float(), rtol=2e-3, atol=5e-4)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_text_to_image_model_trains_and_its_lora_loads(start, tmp_path, name):
    tiny, fresh = build(name), build(name)
    for each in (tiny, fresh):
        each.pipe.vae.register_to_config(shift_factor=0.1)
    prompts = [Prompt("a red fox"), Prompt("two blue birds")]
    call = {"height": 16, "width": 16, "max_sequence_length": 16}
    run = start(
        pipe=tiny.pipe, prompts=prompts, call=call, tune="lora", epochs=2, warmup_min=0,
        warmup_max=0, learning_rate=1e-2, ema=0.0, lora_alpha=8.0, gradient_checkpointing=True,
    )  # fmt: skip
    before = run.sampler(prompts, [0, 1], steps=3)[1].clean
    assert run.run()
    folder = run.save()
    assert folder == run.out / "lora"
    after = run.sampler(prompts, [0, 1], steps=3)[1].clean
    assert (after - before).abs().max() > 1e-3
    fresh.pipe.load_lora_weights(folder)
    run.sampler.pipe, run.sampler.model = fresh.pipe, None
    loaded = run.sampler(prompts, [0, 1], steps=3)[1].clean
    torch.testing.assert_close(loaded, after, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sana", "qwen", "wan"])
def test_embeddings_take_the_place_of_a_text_encoder(start, name):
    tiny = build(name)
    given = {
        key: value
        for key, value in tiny.inputs().items()
        if value is not None and not key.startswith("negative_") and key != "generator"
    }
    rows = {key: value for key, value in given.items() if isinstance(value, torch.Tensor)}
    size = {key: given[key] for key in ("height", "width", "num_frames") if key in given}
    more = {"use_resolution_binning": False} if name == "sana" else {}

    def inputs(prompts):
        index = torch.tensor([int(prompt.text) for prompt in prompts])
        return {key: value[index] for key, value in rows.items()}

    run = start(
        pipe=tiny.pipe, prompts=[Prompt("0"), Prompt("1")], inputs=inputs, call=size | more,
        tune="lora", epochs=2, warmup_min=0, warmup_max=0,
    )  # fmt: skip
    assert run.run()


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_pipeline_without_loras_is_saved_whole(start, tune):
    run = start(tune=tune, epochs=2, warmup_min=0, warmup_max=0, learning_rate=1e-2, ema=0.0)
    run.run()
    folder = run.save()
    assert folder == run.out / "model"
    pipe = load_pipeline(folder)
    found = pipe([1, 2], seeds=[5, 6], num_inference_steps=3, output_type="latent").images
    mine = run.pipe([1, 2], seeds=[5, 6], num_inference_steps=3, output_type="latent").images
    torch.testing.assert_close(found, mine, rtol=1e-4, atol=1e-4)
    base = tiny_pipeline("denoised")
    old = base([1, 2], seeds=[5, 6], num_inference_steps=3, output_type="latent").images
    assert (found - old).abs().max() > 1e-3


def test_what_guidance_does_in_training_is_said(start):
    both = start("both", guidance_scale=3.0, train_cfg="both", epochs=1, critic=False)
    distil = start("distil", guidance_scale=3.0, train_cfg="distil", epochs=1, critic=False)
    both.run()
    distil.run()
    assert both.evaluation.guidance_scale == 3 and distil.evaluation.guidance_scale == 1
    # 8 samples of 3 steps with two passes each, then 16 states of policy and reference
    assert both.progress.evaluations == 8 * 3 * 2 + 16 * 2 * 2
    assert distil.progress.evaluations == 8 * 3 * 2 + 16 * 2


def test_autocast_is_around_the_denoiser_alone():
    pipe = tiny_pipeline("denoised")
    x = torch.randn(2, 3, 8, 8)
    given = {"timestep": torch.full((2,), 500.0), "class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        exact = pipe.transformer(x, **given).sample
        with autocasting(pipe.transformer, torch.bfloat16):
            rough = pipe.transformer(x, **given).sample
            outside = torch.ones(4, 4) @ torch.ones(4, 4)
            with pytest.raises(RuntimeError):
                pipe.transformer(x[:, :1], **given)
            assert not torch.is_autocast_enabled("cpu")
    assert rough.dtype == torch.float32 and outside.dtype == torch.float32
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, rtol=0.2, atol=0.2)


def test_the_timestep_is_read_off_the_trajectory():
    sigmas = [1.0, 0.7, 0.31, 0.02]
    assert fit_timestep(sigmas, [int(1000 * s) for s in sigmas]) == (1000.0, 0.0)
    assert fit_timestep(sigmas, [1 - s for s in sigmas]) == (-1.0, 1.0)
    slope, offset = fit_timestep(sigmas, [17 * s + 3 for s in sigmas])
    assert (slope, offset) == (pytest.approx(17), pytest.approx(3))
    with pytest.raises(NotImplementedError, match="no linear function"):
        fit_timestep(sigmas, [s**3 for s in sigmas])


def test_prompts_of_different_lengths_need_a_mask():
    module = torch.nn.Linear(1, 1)

    def part(length, mask):
        values = {"x": torch.zeros(1, 2), "text": torch.ones(1, length, 3)}
        values |= {"text_mask": torch.ones(1, length)} if mask else {}
        return Conditioning(module, values, frozenset(values), 1, "x")

    joined = Conditioning.join([part(2, True), part(3, True)])
    assert joined.arguments["text"].shape == (2, 3, 3)
    assert joined.arguments["text_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    with pytest.raises(ValueError, match="different shapes"):
        Conditioning.join([part(2, False), part(3, False)])


def test_methods_by_name_run(start):
    from diffsteer.training.acflow import METHODS

    for name, changes in METHODS.items():
        run = start(name, **{**changes, "epochs": 2})
        assert run.run()
        assert (run.learner.critic is None) == (not run.config.critic)
    assert isinstance(run.config, ACFlowConfig)
