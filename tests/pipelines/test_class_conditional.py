"""The class-conditional pipeline: its flow, guidance, seeds, saving, errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import diffusers
import pytest
import torch
from tiny_flow import NAMES, gaussian_pipeline, tiny_dit, tiny_pipeline, tiny_unet
from versions import needs_diffusers

from diffsteer import ClassConditionalPipeline, Kind
from diffsteer.core import seeded_noise

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "euler-shift": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW),
}


def latents(pipe, labels=(0, 3, 9), seeds=(5, 6, 7), **call):
    call = {"num_inference_steps": 4, "seeds": list(seeds), "output_type": "latent", **call}
    return pipe(list(labels), **call).images


@pytest.mark.parametrize("prediction", ["velocity", "denoised"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_flow_carries_noise_to_the_data_distribution(name, prediction):
    pipe = gaussian_pipeline(0.2, 0.3, prediction, SCHEDULERS[name]())
    noise = seeded_noise([5, 6, 7], (3, 8, 8))
    result = latents(pipe, num_inference_steps=200)
    expected = 0.2 + torch.tensor([0.0, 0.3, 0.9]).reshape(-1, 1, 1, 1) + 0.3 * noise
    # 0.03 covers 200 first-order steps of uneven size; a wrong level or kind is off by tenths.
    torch.testing.assert_close(result, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("prediction", ["velocity", "denoised"])
@pytest.mark.parametrize("steps", [1, 3])
def test_point_mass_is_reached_exactly_in_any_number_of_steps(prediction, steps):
    pipe = gaussian_pipeline(0.25, 0.0, prediction)
    result = latents(pipe, labels=[1, 2, 4], num_inference_steps=steps, guidance_scale=3.0)
    expected = 0.25 + 3 * torch.tensor([0.1, 0.2, 0.4]).reshape(-1, 1, 1, 1).expand_as(result)
    torch.testing.assert_close(result, expected)


def test_levels_that_end_at_zero_divide_by_nothing():
    result = latents(gaussian_pipeline(0.25, 0.3, "denoised"), sigmas=[1.0, 0.5, 0.0])
    assert result.isfinite().all()


def test_network_sees_the_level_as_timestep_and_the_null_class_first():
    pipe, seen = tiny_pipeline(), []
    pipe.transformer.register_forward_hook(lambda _, a, k, o: seen.append(k), with_kwargs=True)
    latents(pipe, guidance_scale=2.0)
    assert [float(k["timestep"][0]) for k in seen] == [1000.0, 750.0, 500.0, 250.0]
    assert all(k["class_labels"].tolist() == [10, 10, 10, 0, 3, 9] for k in seen)
    seen.clear()
    latents(pipe, guidance_scale=1.0)
    assert all(k["class_labels"].tolist() == [0, 3, 9] for k in seen)


@pytest.mark.parametrize("network", [tiny_dit, tiny_unet])
@pytest.mark.parametrize("prediction", ["velocity", "denoised"])
def test_guidance_is_the_affine_mix_of_the_two_branches(network, prediction):
    pipe, x = tiny_pipeline(prediction, network()), seeded_noise([5, 6, 7], (3, 8, 8))
    labels = torch.tensor([0, 3, 9])

    def velocity(classes):
        time = torch.full((3,), 1000.0)
        out = pipe.transformer(x, timestep=time, class_labels=classes).sample
        return out if prediction == "velocity" else x - out  # (x - denoised) / sigma at sigma 1

    with torch.no_grad():
        uncond, cond = velocity(torch.full_like(labels, 10)), velocity(labels)
    assert not torch.allclose(uncond, cond, atol=0.01)
    guided = latents(pipe, num_inference_steps=1, guidance_scale=3.0)
    torch.testing.assert_close(guided, x - (uncond + 3 * (cond - uncond)), atol=1e-4, rtol=1e-4)
    plain = latents(pipe, num_inference_steps=1)
    torch.testing.assert_close(plain, x - cond, atol=1e-4, rtol=1e-4)


def test_a_seed_names_an_image_in_any_batch():
    pipe = tiny_pipeline("denoised")
    together = latents(pipe, [1, 2, 3, 4], [9, 8, 7, 6], guidance_scale=3.0)
    alone = latents(pipe, [3], [7], guidance_scale=3.0)
    assert not torch.allclose(together[1], together[2], atol=0.1)
    torch.testing.assert_close(together[2:3], alone, atol=1e-4, rtol=1e-4)


def test_seeds_generators_and_latents_start_from_the_same_noise():
    pipe = tiny_pipeline()
    expected = latents(pipe)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    call = {"num_inference_steps": 4, "output_type": "latent"}
    assert torch.equal(pipe([0, 3, 9], generator=generators, **call).images, expected)
    noise = seeded_noise([5, 6, 7], (3, 8, 8))
    assert torch.equal(pipe([0, 3, 9], latents=noise, **call).images, expected)


@needs_diffusers("0.40", "its Euler scheduler draws without the generators")
def test_stochastic_schedulers_draw_from_each_image_s_own_generator():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    pipe = tiny_pipeline(scheduler=scheduler)
    together, alone = latents(pipe), latents(pipe, [3], [6])
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)


def test_labels_by_name_index_array_and_tensor_are_the_same():
    pipe = tiny_pipeline()
    for labels in (["cat", 3], torch.tensor([3, 3]), torch.tensor([3, 3]).numpy(), range(3, 4)):
        assert set(pipe.label_ids(labels)) == {3}
    assert pipe.label_ids("truck") == [9]
    assert latents(pipe, ["cat"], [1, 2]).shape == (2, 3, 8, 8)  # one label for all seeds


def test_output_types_hold_the_same_pixels():
    pipe = tiny_pipeline()
    raw = latents(pipe)
    tensor, array = latents(pipe, output_type="pt"), latents(pipe, output_type="np")
    torch.testing.assert_close(tensor, (raw / 2 + 0.5).clamp(0, 1))
    assert torch.equal(torch.from_numpy(array), tensor.permute(0, 2, 3, 1))
    pictures = latents(pipe, output_type="pil")
    assert [p.size for p in pictures] == [(8, 8)] * 3
    red = round(float(tensor[1, 0, 2, 5]) * 255)
    assert pictures[1].getpixel((5, 2))[0] == red
    assert isinstance(pipe([1], num_inference_steps=1, return_dict=False), tuple)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_networks_keep_a_float32_state(dtype):
    wide = latents(tiny_pipeline("denoised"), guidance_scale=2.0)
    narrow = latents(tiny_pipeline("denoised").to(dtype), guidance_scale=2.0)
    assert narrow.dtype == torch.float32
    assert float((wide - narrow).norm() / wide.norm()) < 0.1


def test_training_mode_drops_no_labels_and_is_kept():
    pipe = tiny_pipeline()
    expected = latents(pipe)
    pipe.transformer.train()
    pipe.transformer.transformer_blocks[0].eval()
    assert all(torch.equal(latents(pipe), expected) for _ in range(4))
    assert pipe.transformer.training
    assert not pipe.transformer.transformer_blocks[0].training


def test_callback_sees_and_changes_the_latents_and_may_stop():
    pipe, seen = tiny_pipeline(), []

    def zero_then_stop(pipe, index, timestep, tensors):
        seen.append((index, float(timestep), pipe.guidance_scale, pipe.num_timesteps))
        pipe._interrupt = index == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    result = latents(pipe, callback_on_step_end=zero_then_stop, guidance_scale=2.5)
    assert seen == [(0, 1000.0, 2.5, 4), (1, 750.0, 2.5, 4)]
    assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("network", [tiny_dit, tiny_unet])
def test_save_and_load_give_the_same_images(tmp_path, network):
    pipe = tiny_pipeline("denoised", network())
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"][0] == index["scheduler"][0] == "diffusers"
    again = ClassConditionalPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.prediction_kind == Kind.DENOISED
    assert again.id2label == NAMES
    # Rounding may differ: the loaded weights lie at other addresses.
    expected = latents(pipe, guidance_scale=2.0)
    torch.testing.assert_close(latents(again, guidance_scale=2.0), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_a_fresh_process_loads_what_was_saved(tmp_path):
    tiny_pipeline("denoised").save_pretrained(tmp_path)
    code = (
        "import sys, diffsteer\n"
        "pipe = diffsteer.ClassConditionalPipeline.from_pretrained(sys.argv[1])\n"
        "call = {'num_inference_steps': 2, 'output_type': 'latent'}\n"
        "print(pipe(['cat'], seeds=[7], **call).images.std().item())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    expected = latents(tiny_pipeline("denoised"), [3], [7], num_inference_steps=2).std()
    assert float(done.stdout) == pytest.approx(float(expected), rel=1e-5)


BAD_CALLS = {
    "label above": (
        {"class_labels": [3, 10]},
        ValueError,
        r"class_labels: 10 .* 10 classes, 0 to 9",
    ),
    "label below": ({"class_labels": -1}, ValueError, r"class_labels: -1 .* 0 to 9"),
    "unknown name": ({"class_labels": "unicorn"}, ValueError, r"'unicorn'; the names are airplane"),
    "label of no type": ({"class_labels": [1.5]}, TypeError, r"class_labels: .* got 1.5"),
    "no label": ({"class_labels": []}, ValueError, "class_labels is empty"),
    "zero steps": (
        {"num_inference_steps": 0},
        ValueError,
        "num_inference_steps .* at least 1, got 0",
    ),
    "scale NaN": ({"guidance_scale": float("nan")}, ValueError, "guidance_scale .* got nan"),
    "seeds": ({"seeds": [1, 2, 3]}, ValueError, "seeds: got 3 for 2 class_labels"),
    "seed of no type": ({"seeds": [1, 2.5]}, TypeError, "seeds must be integers, got 2.5"),
    "negative seed": ({"seeds": [1, -2]}, ValueError, r"seeds must be in \[0, 2\*\*64\), got -2"),
    "generators": ({"generator": [torch.Generator()]}, ValueError, "generator: got 1 for 2"),
    "no generator": ({"generator": 7}, TypeError, "generator: expected torch.Generator"),
    "both": ({"seeds": [1, 2], "latents": torch.zeros(2, 3, 8, 8)}, ValueError, "seeds or latents"),
    "latents": ({"latents": torch.zeros(2, 3, 8, 9)}, ValueError, r"\(2, 3, 8, 8\), got .*9\)"),
    "output type": ({"output_type": "jpeg"}, ValueError, "pil, np, pt, latent, got 'jpeg'"),
    "callback": ({"callback_on_step_end_tensor_inputs": ["x"]}, ValueError, r"'latents'.*\['x'\]"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_name_argument_value_and_remedy(name):
    change, error, text = BAD_CALLS[name]
    with pytest.raises(error, match=text):
        tiny_pipeline()(**{"class_labels": [1, 2], "num_inference_steps": 2, **change})


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: tiny_pipeline("epsilon"), "prediction must be one of velocity, denoised"),
        (lambda: tiny_pipeline(network=tiny_dit(out_channels=6)), "output as input channels"),
        (lambda: tiny_pipeline(id2label={12: "cat"}), "id2label: 12 is out of range"),
        (lambda: tiny_pipeline(id2label={1: "cat", 2: "cat"}), "occurs twice"),
        (
            lambda: tiny_pipeline(network=diffusers.UNet2DModel(sample_size=8, norm_num_groups=4,
                                  block_out_channels=(8, 8), attention_head_dim=4,
                                  down_block_types=("DownBlock2D",) * 2,
                                  up_block_types=("UpBlock2D",) * 2)),
            "UNet2DModel takes no class labels",
        ),
        (lambda: latents(tiny_pipeline(scheduler=diffusers.DDIMScheduler())), "no flow sigmas"),
        (
            lambda: latents(tiny_pipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True))),
            "use_dynamic_shifting=False",
        ),
        (
            lambda: latents(
                tiny_pipeline(scheduler=diffusers.FlowMatchHeunDiscreteScheduler()), sigmas=[1.0]
            ),
            "takes no sigmas",
        ),
    ],
)  # fmt: skip
def test_bad_parts_are_refused(build, text):
    with pytest.raises(ValueError, match=text):
        build()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_draws_the_cpu_s_noise(dtype):
    expected = latents(tiny_pipeline("denoised"), guidance_scale=2.0)
    pipe = tiny_pipeline("denoised").to("cuda", dtype)
    result = latents(pipe, guidance_scale=2.0).cpu()
    assert float((result - expected).norm() / expected.norm()) < 0.1
