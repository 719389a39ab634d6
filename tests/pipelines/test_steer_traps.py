"""What breaks naive wrappers: offloading, compiling, caches, copies, callbacks, interrupts."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from tiny_pipelines import SCALE, Tiny, build
from torch import Tensor

from diffsteer import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ManifoldProjectedGuidance,
    Step,
    steer,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

CFG = ClassifierFreeGuidance(SCALE)


class CallsAgain:
    """Plain guidance that evaluates the model once more at each step and checks the answer."""

    commutes = True

    def __call__(self, step: Step) -> Tensor:
        assert torch.equal(step.predict(step.x.clone(), "cond"), step.cond)
        uncond = step.need_uncond("CallsAgain")
        return uncond + SCALE * (step.cond - uncond)


def state_of(tiny: Tiny) -> dict[str, Any]:
    """What steer could leave a trace in: attributes by identity, dictionaries by content."""
    owners = {"pipe": tiny.pipe, "scheduler": tiny.pipe.scheduler}
    owners |= {name: getattr(tiny.pipe, name) for name in tiny.denoisers}
    found: dict[str, Any] = {}
    for name, owner in owners.items():
        found[name] = type(owner), sorted(vars(owner))
        hooks = {k: v for k, v in vars(owner).items() if "hook" in k or "forward" in k}
        found[name, "hooks"] = {
            k: dict(v) if isinstance(v, dict) else id(v) for k, v in hooks.items()
        }
        found[name, "parts"] = {
            k: id(v) for k, v in vars(owner).items() if isinstance(v, torch.nn.Module)
        }
    return found


@contextmanager
def unchanged(tiny: Tiny) -> Iterator[None]:
    before = state_of(tiny)
    yield
    assert state_of(tiny) == before


@pytest.mark.parametrize("name", ["dit", "flux", "wan2.2"])
def test_everything_is_as_it_was(name: str) -> None:
    tiny = build(name)
    tiny.call()
    with unchanged(tiny), steer(tiny.pipe, CFG):
        tiny.call()


def test_everything_is_as_it_was_after_an_error() -> None:
    tiny = build("sd3")
    expected = tiny.call()

    class Broken:
        def __call__(self, step: Step) -> Tensor:
            if step.index == 2:
                raise RuntimeError("on purpose")
            return step.cond

    with unchanged(tiny), pytest.raises(RuntimeError, match="on purpose"):
        with steer(tiny.pipe, Broken()):
            tiny.call()
    assert torch.equal(tiny.call(), expected)
    with steer(tiny.pipe, CFG):
        assert torch.equal(tiny.call(), expected)


def test_an_error_in_one_run_leaves_no_memory_for_the_next() -> None:
    tiny = build("sd3")
    rule = AdaptiveProjectedGuidance(SCALE, momentum=-0.7)

    def stop(pipe: Any, index: int, t: Any, kwargs: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return kwargs

    with steer(tiny.pipe, rule):
        expected = tiny.call()
        with pytest.raises(KeyboardInterrupt):
            tiny.call(callback_on_step_end=stop)
        assert torch.equal(tiny.call(), expected)


def test_interrupting_a_run() -> None:
    tiny = build("sd3")

    def stop(pipe: Any, index: int, t: Any, kwargs: Any) -> Any:
        pipe._interrupt = index >= 1
        return kwargs

    expected = tiny.call(callback_on_step_end=stop)
    with steer(tiny.pipe, CFG) as run:
        assert torch.equal(tiny.call(callback_on_step_end=stop), expected)
        assert len(run.steps) == 2
        assert tiny.call().shape == expected.shape and len(run.steps) == 4


def test_guidance_turned_off_by_a_callback() -> None:
    """The documented recipe; from there on the pipeline's own conditional prediction stands."""
    tiny = build("sd")

    def off(pipe: Any, index: int, t: Any, kwargs: Any) -> Any:
        if index == 1:
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return kwargs

    options = {
        "callback_on_step_end": off,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    expected = tiny.call(**options)
    for rule in (CFG, AdaptiveProjectedGuidance(SCALE)):
        with steer(tiny.pipe, rule) as run:
            steered = tiny.call(**options)
        assert [step.guided for step in run.steps] == [True, True, False, False]
        assert torch.equal(steered, expected) is (rule is CFG)


def test_cpu_offload_survives_the_second_call() -> None:
    tiny = build("sd")
    expected = tiny.call()
    tiny.pipe.unet, hook = accelerate.cpu_offload_with_hook(tiny.pipe.unet, "cpu")
    with steer(tiny.pipe, CFG) as run:
        assert torch.equal(tiny.call(), expected)
        # At the end of every call diffusers takes all offload hooks off and puts them on anew.
        accelerate.hooks.remove_hook_from_module(tiny.pipe.unet, recurse=True)
        tiny.pipe.unet, hook = accelerate.cpu_offload_with_hook(tiny.pipe.unet, "cpu")
        assert torch.equal(tiny.call(guidance_scale=2.0), expected)
        assert run.evaluations == 8
    hook.remove()


def test_group_offload() -> None:
    tiny = build("sd3")
    expected = tiny.call()
    tiny.pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    with steer(tiny.pipe, CallsAgain()):
        assert torch.equal(tiny.call(), expected)
        assert torch.equal(tiny.call(guidance_scale=2.0), expected)


@pytest.mark.parametrize("how", ["wrapped", "in place", "repeated blocks"])
def test_compiled_denoisers(how: str) -> None:
    tiny = build("flux")
    expected = tiny.call(num_inference_steps=2)
    torch._dynamo.reset()
    transformer = tiny.pipe.transformer
    if how == "wrapped":
        tiny.pipe.transformer = torch.compile(transformer, backend="eager", fullgraph=True)
    elif how == "in place":
        transformer.compile(backend="eager")
    else:
        transformer.compile_repeated_blocks(backend="eager")
    with unchanged(tiny), steer(tiny.pipe, CallsAgain()):
        assert torch.equal(tiny.call(true_cfg_scale=2.0, num_inference_steps=2), expected)
    torch._dynamo.reset()


def test_a_step_cache_is_not_mixed_up() -> None:
    tiny = build("flux")
    without = tiny.call()
    tiny.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1.0))
    expected = tiny.call()
    assert not torch.equal(expected, without)  # some blocks were answered from the cache

    class AsksElsewhere:
        commutes = True

        def __call__(self, step: Step) -> Tensor:
            for branch in ("cond", "uncond"):
                step.predict(3 * step.x, branch)
            return CFG(step)

    for rule in (CallsAgain(), AsksElsewhere()):
        with steer(tiny.pipe, rule):
            assert torch.equal(tiny.call(true_cfg_scale=2.0), expected)


def test_the_swapped_scheduler_is_still_itself(tmp_path: Any) -> None:
    tiny = build("sd")
    scheduler = tiny.pipe.scheduler
    kind = type(scheduler)
    with steer(tiny.pipe, CFG):
        assert isinstance(scheduler, kind) and type(scheduler).__name__ == kind.__name__
        assert type(scheduler) is not kind
        assert inspect.signature(scheduler.step) == inspect.signature(kind.step.__get__(scheduler))
        scheduler.save_pretrained(tmp_path)
        twin = copy.deepcopy(scheduler)
        twin.set_timesteps(3)
        x = torch.ones(1, 2, 2, 2)
        assert twin.step(x, twin.timesteps[0], x).prev_sample.shape == x.shape
        again = kind.from_config(scheduler.config)
        assert type(again) is kind
    assert type(scheduler) is kind
    twin.step(x, twin.timesteps[1], x)
    assert type(kind.from_pretrained(tmp_path)) is kind


def test_a_pipeline_that_steps_a_copy_is_found_out() -> None:
    tiny = build("sd")

    class Copying(diffusers.StableDiffusionPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            kept, self.scheduler = self.scheduler, copy.deepcopy(self.scheduler)
            try:
                return super().__call__(*args, **kwargs)
            finally:
                self.scheduler = kept

    tiny.pipe.__class__ = Copying
    with pytest.raises(RuntimeError, match="a copy of its scheduler"), steer(tiny.pipe, CFG):
        tiny.call()


def test_stochastic_schedulers_draw_the_same_noise() -> None:
    tiny = build("sd")
    tiny.pipe.scheduler = diffusers.DDIMScheduler.from_config(tiny.pipe.scheduler.config)
    expected = tiny.call(eta=1.0)
    with steer(tiny.pipe, CFG):
        assert torch.equal(tiny.call(eta=1.0), expected)
    with steer(tiny.pipe, AdaptiveProjectedGuidance(SCALE)):
        assert not torch.equal(tiny.call(eta=1.0), expected)


def test_pipelines_that_share_parts() -> None:
    tiny = build("sd")
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(tiny.pipe)
    with steer(tiny.pipe, CFG) as run:
        with pytest.raises(RuntimeError, match="steered already"), steer(other, CFG):
            pass
        tiny.call()
        assert run.evaluations == 4
    with steer(other, CFG):
        pass
    with pytest.raises(RuntimeError, match="steered already"):
        with steer(tiny.pipe, CFG), steer(tiny.pipe, CFG):
            pass
    assert "_diffsteer" not in vars(type(tiny.pipe.scheduler))


def test_several_images_a_prompt_and_custom_timesteps() -> None:
    tiny = build("sd")
    options = {"num_images_per_prompt": 2, "generator": None, "latents": torch.randn(4, 4, 8, 8)}
    expected = tiny.call(**options)
    with steer(tiny.pipe, CFG):
        assert torch.equal(tiny.call(**options), expected)
    tiny = build("sdxl")
    expected = tiny.call(timesteps=[900, 500, 100], num_inference_steps=3)
    with steer(tiny.pipe, CFG) as run:
        assert torch.equal(tiny.call(timesteps=[900, 500, 100], num_inference_steps=3), expected)
    assert len(run.steps) == 3


def test_dit_with_euler_is_refused_where_it_matters() -> None:
    """DiTPipeline hands Euler the scaled sample: plain guidance does not care, APG would."""
    tiny = build("dit")
    tiny.pipe.scheduler = diffusers.EulerDiscreteScheduler()
    expected = tiny.call()
    with steer(tiny.pipe, CFG):
        assert torch.equal(tiny.call(), expected)
    with pytest.raises(ValueError, match="already scaled"):
        with steer(tiny.pipe, AdaptiveProjectedGuidance(SCALE)):
            tiny.call()


def test_an_unconditional_batch_of_dit_is_not_taken_for_a_doubled_one() -> None:
    tiny = build("dit")
    expected = tiny.call(guidance_scale=1.0)

    class Conditional:
        def __call__(self, step: Step) -> Tensor:
            assert step.uncond is None and step.x.shape[0] == 2
            return step.cond

    with steer(tiny.pipe, Conditional()):
        torch.testing.assert_close(tiny.call(guidance_scale=1.0), expected, rtol=1e-4, atol=1e-4)


def test_nor_is_a_batch_of_twins_anywhere_else() -> None:
    """Equal noise, equal prompts, guidance off: there is no unconditional half to be found."""
    tiny = build("sd")
    twins = {"prompt": ["a fox"] * 2, "negative_prompt": None, "guidance_scale": 1.0}
    twins |= {"generator": None, "latents": torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1)}
    with pytest.raises(ValueError, match="needs the unconditional"), steer(tiny.pipe, CFG):
        tiny.call(**twins)


def test_the_null_class_of_dit_is_still_a_doubled_batch() -> None:
    tiny = build("dit")
    null = tiny.pipe.transformer.config.num_embeds_ada_norm
    with steer(tiny.pipe, AdaptiveProjectedGuidance(SCALE)) as run:
        assert torch.isfinite(tiny.call(class_labels=[null, null])).all()
    assert all(step.guided for step in run.steps)


@pytest.mark.parametrize(
    "rule",
    [AdaptiveProjectedGuidance(4.0), ManifoldProjectedGuidance(ClassifierFreeGuidance(4.0))],
    ids=["apg", "cfgmp"],
)
def test_levels_of_the_user_s_own_may_end_at_zero(rule) -> None:
    """A step at sigma = 0, where no prediction matters, neither divides by it nor changes a bit."""
    levels = {"one less": [1.0, 0.6, 0.3], "with zero": [1.0, 0.6, 0.3, 0.0]}
    results = {}
    for name, sigmas in levels.items():
        tiny = build("sd3")
        given = {k: v for k, v in tiny.inputs().items() if k != "num_inference_steps"}
        with steer(tiny.pipe, rule):
            results[name] = tiny.pipe(**given, guidance_scale=4.0, sigmas=sigmas).images
    assert torch.equal(results["one less"], results["with zero"])
