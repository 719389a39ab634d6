"""The tiny pipelines are fit to test guidance with: it is on, it matters, a run can be repeated."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import diffusers
import pytest
import torch
from tiny_pipelines import FAMILIES, REQUIRED, SCALE, SPECIAL, WITH_GUIDER, Tiny, build


@contextmanager
def watched(tiny: Tiny) -> Iterator[tuple[dict[str, int], list[float]]]:
    """How many rows each denoiser predicts, and the timesteps that the scheduler steps at."""
    rows, times, scheduler = dict.fromkeys(tiny.denoisers, 0), [], tiny.pipe.scheduler
    handles, step = [], scheduler.step

    def count(name: str, output) -> None:
        rows[name] += len(output[0])

    for name in tiny.denoisers:
        hook = lambda _, args, output, name=name: count(name, output)  # noqa: E731
        handles.append(getattr(tiny.pipe, name).register_forward_hook(hook))
    scheduler.step = lambda *a, **k: times.append(float(a[1])) or step(*a, **k)
    yield rows, times
    del scheduler.step
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", FAMILIES + SPECIAL + WITH_GUIDER)
def test_the_condition_matters_and_a_run_repeats(name: str) -> None:
    tiny = build(name)
    with watched(tiny) as (rows, times):
        latents = tiny.call()
    if name not in SPECIAL:
        assert sum(rows.values()) == 2 * 2 * len(times), "two prompts, two predictions a step"
    assert all(rows.values()), "every denoiser works"
    assert latents.dtype == torch.float32 and latents.isfinite().all()
    assert torch.equal(latents, tiny.call())
    stronger = tiny.call(**{tiny.guidance_argument: SCALE + 2})
    assert (stronger - latents).norm() > 0.05 * latents.norm()
    # Two prompts, two samples: a mistake in the order of a batch cannot hide.
    assert (latents[0] - latents[1]).norm() > 0.05 * latents.norm()


@pytest.mark.parametrize("name", REQUIRED)
def test_bfloat16_runs(name: str) -> None:
    assert build(name, torch.bfloat16).call(num_inference_steps=2).isfinite().all()


@pytest.mark.parametrize("name", ["dit", "sd", "sdxl", "sd3"])
def test_a_saved_pipeline_gives_the_same_latents(name: str, tmp_path) -> None:
    """These four are also the local folders that the scripts are tested with."""
    tiny = build(name)
    tiny.pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    weights = getattr(loaded, tiny.denoisers[0]).state_dict()
    for key, weight in getattr(tiny.pipe, tiny.denoisers[0]).state_dict().items():
        assert torch.equal(weight, weights[key])
    if name == "dit":  # its latents are read off the first pipeline's decoder
        return
    scale = inspect.signature(loaded.__call__).parameters["guidance_scale"].default
    with torch.no_grad():
        latents = loaded(**tiny.inputs() | {"num_inference_steps": 2})[0]
    torch.testing.assert_close(
        tiny.call(num_inference_steps=2, guidance_scale=scale), latents, rtol=1e-4, atol=1e-3
    )
