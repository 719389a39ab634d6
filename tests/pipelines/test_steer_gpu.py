"""The matrix of ``test_steer`` on CUDA: half precision, offloaded, compiled (``pytest -m gpu``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from scheduler_configs import CONFIGS, Config
from tiny_pipelines import FAMILIES, SCALE, WITH_GUIDER, Tiny, build
from torch import Tensor
from torch.utils._pytree import tree_map

from diffsteer import AdaptiveProjectedGuidance, ClassifierFreeGuidance, Step, steer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning"),
]

CFG = ClassifierFreeGuidance(SCALE)
GUIDERS = [name for name in WITH_GUIDER if "qwen" not in name]
HALVES = [torch.bfloat16, torch.float16]


def on_gpu(name: str, dtype: torch.dtype = torch.float32, *, move: bool = True) -> Tiny:
    """A tiny pipeline on the GPU; ``move=False`` leaves the weights to offloading."""
    tiny = build(name, dtype)
    if move:
        tiny.pipe.to("cuda")

    def inputs() -> dict[str, Any]:
        return tree_map(lambda v: v.cuda() if isinstance(v, Tensor) else v, tiny.inputs())

    return replace(tiny, inputs=inputs)


def other_scale(tiny: Tiny) -> dict[str, float]:
    return {tiny.guidance_argument: SCALE / 2}


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a.float() - b.float()).norm()) <= tolerance * float(b.float().norm())


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", [*FAMILIES, *GUIDERS])
def test_plain_guidance_is_bit_exact(name: str, dtype: torch.dtype) -> None:
    tiny = on_gpu(name, dtype)
    shifted = name == "z-image"
    # Blocks that mix in half precision and widen what they give the scheduler.
    widened = dtype != torch.float32 and name.startswith(("modular-wan", "modular-z-image"))
    with deterministic():
        expected = tiny.call()
        with steer(tiny.pipe, ClassifierFreeGuidance(SCALE + shifted)):
            steered = tiny.call(**other_scale(tiny))
    if shifted or widened:
        assert close(steered, expected, 1e-5 if dtype == torch.float32 else 5e-2)
    else:
        assert torch.equal(steered, expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FAMILIES)
def test_apg_runs_in_half_precision(name: str, dtype: torch.dtype) -> None:
    tiny = on_gpu(name, dtype)
    with steer(tiny.pipe, AdaptiveProjectedGuidance(SCALE)):
        image = tiny.call()
    if bool(torch.isfinite(tiny.call()).all()):
        assert torch.isfinite(image).all()


@pytest.mark.parametrize("config", CONFIGS, ids=[config.name for config in CONFIGS])
def test_every_scheduler(config: Config) -> None:
    if "invert_sigmas" in config.name:
        pytest.skip("Stable Diffusion 3 cannot run Mochi's direction of time")
    tiny = on_gpu("sd3" if config.flow else "sd")
    results = []
    for rule in (None, CFG):
        tiny.pipe.scheduler = config.build()
        torch.manual_seed(0)
        with deterministic():
            if rule is None:
                results.append(tiny.call())
            else:
                with steer(tiny.pipe, rule):
                    results.append(tiny.call(guidance_scale=2.0))
    assert torch.equal(*results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs streams of a real device")
@pytest.mark.parametrize("how", ["model", "sequential", "group"])
def test_offloading(how: str) -> None:
    tiny = on_gpu("sd3", move=False)
    if how == "model":
        tiny.pipe.enable_model_cpu_offload()
    elif how == "sequential":
        tiny.pipe.enable_sequential_cpu_offload()
    else:
        tiny.pipe.to("cuda")
        tiny.pipe.transformer.enable_group_offload(
            onload_device=torch.device("cuda"), offload_type="leaf_level", use_stream=True
        )
    with deterministic():
        expected = tiny.call()
        with steer(tiny.pipe, CFG) as run:
            for _ in range(2):  # the second call is where monkeypatches are gone
                assert torch.equal(tiny.call(guidance_scale=2.0), expected)
    assert run.trajectories == 2 and len(run.steps) == 4


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_compiled(name: str, mode: str) -> None:
    tiny = on_gpu(name)
    tiny.pipe.transformer = torch.compile(tiny.pipe.transformer, mode=mode)
    expected = tiny.call()
    with steer(tiny.pipe, CFG):
        assert torch.equal(tiny.call(**other_scale(tiny)), expected)


class Asks:
    """One more evaluation at another sample, and a gradient."""

    def __call__(self, step: Step) -> Tensor:
        # By itself a branch may be another kernel's, and convolutions round to TF32.
        assert close(step.predict(None, "cond"), step.cond, 1e-2)
        with torch.enable_grad():
            x = step.x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(step.predict(x, "cond").square().sum(), x)
        return step.cond - 1e-3 * gradient / gradient.norm()


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "z-image"])
def test_evaluations_and_gradients(name: str) -> None:
    tiny = on_gpu(name)
    with deterministic(), steer(tiny.pipe, Asks()):
        assert torch.isfinite(tiny.call()).all()


@pytest.mark.parametrize("rule", [CFG, AdaptiveProjectedGuidance(SCALE)])
def test_no_host_synchronisation_after_the_first_step(rule: Any) -> None:
    tiny = on_gpu("sd3")

    class Guarded:
        commutes = getattr(rule, "commutes", False)

        def __call__(self, step: Step) -> Tensor:
            guided = rule(step)
            # From the end of the first rule to the end of the last: the adapter's own work, the
            # network's and the scheduler's (FlowMatchEuler does not wait for the device).
            torch.cuda.set_sync_debug_mode("error" if step.index + 1 < step.count else "default")
            return guided

    try:
        with steer(tiny.pipe, Guarded()):
            tiny.call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
