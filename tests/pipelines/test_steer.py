"""steer() on every family of tiny pipelines: exact where it must be, different where it should."""

from __future__ import annotations

import functools
import math
from typing import Any

import diffusers
import pytest
import torch
from tiny_pipelines import FAMILIES, REQUIRED, SCALE, STEPS, WITH_GUIDER, Tiny, build

from diffsteer import (
    AdaptiveProjectedGuidance,
    ClassConditionalPipeline,
    ClassifierFreeGuidance,
    GuidanceInterval,
    Kind,
    Step,
    steer,
)

# diffusers, on building its own models
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

GUIDERS = [name for name in WITH_GUIDER if "qwen" not in name]
CFG_AS_APG = AdaptiveProjectedGuidance(SCALE, eta=1.0, radius=math.inf, momentum=0.0)


@functools.cache
def shared(name: str) -> Tiny:
    """One build for all tests that leave the pipeline as it is."""
    return build(name)


@functools.cache
def untouched(name: str) -> torch.Tensor:
    return shared(name).call()


def other_scale(tiny: Tiny) -> dict[str, float]:
    """Another guidance scale for the pipeline itself, which the rule must replace."""
    return {tiny.guidance_argument: SCALE / 2}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return float((a.float() - b.float()).norm()) <= tolerance * float(b.float().norm())


@pytest.mark.parametrize("name", [*FAMILIES, *GUIDERS])
def test_plain_guidance_is_bit_exact(name: str) -> None:
    tiny = shared(name)
    # Z-Image calls s what others call s + 1, and sums in another order.
    shifted = name == "z-image"
    with steer(tiny.pipe, ClassifierFreeGuidance(SCALE + shifted)) as run:
        steered = tiny.call(**other_scale(tiny))
    if shifted:
        assert close(steered, untouched(name), 2e-6)
    else:
        assert torch.equal(steered, untouched(name))
    assert len(run.steps) >= 2 and run.trajectories == 1


@pytest.mark.parametrize("name", [*FAMILIES, *GUIDERS])
def test_denoised_space_gives_the_same_to_rounding(name: str) -> None:
    """APG with all its parts off is plain guidance, but goes through denoised space."""
    tiny = shared(name)
    rule = CFG_AS_APG if name != "z-image" else ClassifierFreeGuidance(SCALE + 1)
    with steer(tiny.pipe, rule):
        steered = tiny.call(**other_scale(tiny))
    assert close(steered, untouched(name), 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_apg_changes_the_image(name: str) -> None:
    tiny = shared(name)
    with steer(tiny.pipe, AdaptiveProjectedGuidance(SCALE)):
        image = tiny.call()
    assert torch.isfinite(image).all() and not close(image, untouched(name), 1e-2)


@pytest.mark.parametrize("name", ["dit", "sdxl", "flux"])
def test_the_pipelines_own_scale_does_not_matter(name: str) -> None:
    tiny = shared(name)
    with steer(tiny.pipe, AdaptiveProjectedGuidance(SCALE)):
        images = [tiny.call(**{tiny.guidance_argument: scale}) for scale in (2.0, 20.0)]
    assert torch.equal(*images)
    assert not torch.equal(tiny.call(**other_scale(tiny)), untouched(name))
    assert torch.equal(tiny.call(), untouched(name))


@pytest.mark.parametrize("name", ["sana", *(n for n in REQUIRED if n != "sana")])
def test_plain_guidance_is_bit_exact_in_bfloat16(name: str) -> None:
    tiny = build(name, torch.bfloat16)
    expected = tiny.call()
    with steer(tiny.pipe, ClassifierFreeGuidance(SCALE)):
        assert torch.equal(tiny.call(**other_scale(tiny)), expected)


# Their blocks mix in half precision, and widen what they give the scheduler; steer widens first.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["modular-wan", "modular-z-image"])
def test_blocks_that_mix_in_half_precision(name: str, dtype: torch.dtype) -> None:
    tiny = build(name, dtype)
    expected = tiny.call()
    with steer(tiny.pipe, ClassifierFreeGuidance(SCALE)):
        assert close(
            tiny.call().float(), expected.float(), 5e-2 if dtype == torch.bfloat16 else 1e-2
        )


def test_a_record_of_every_step() -> None:
    tiny = shared("sd3")
    with steer(tiny.pipe, ClassifierFreeGuidance(SCALE)) as run:
        tiny.call()
    sigmas = tiny.pipe.scheduler.sigmas
    assert [step.index for step in run.steps] == list(range(STEPS))
    assert [step.sigma for step in run.steps] == pytest.approx(sigmas[:-1].tolist())
    assert run.steps[1].ratio == pytest.approx(float(sigmas[1] / (1 - sigmas[1])))
    assert run.evaluations == sum(step.evaluations for step in run.steps) == STEPS
    assert all(step.guided and step.step is None for step in run.steps)


@pytest.mark.parametrize("rule", [ClassifierFreeGuidance(SCALE), AdaptiveProjectedGuidance(SCALE)])
def test_kept_steps_are_denoised_and_explain_the_result(rule: Any) -> None:
    tiny = shared("sd3")
    with steer(tiny.pipe, rule, keep=True) as run:
        final = tiny.call()
    last = run.steps[-1]
    assert last.step is not None and last.denoised is not None
    # The last flow step lands on the guided denoised sample.
    torch.testing.assert_close(last.denoised, final, rtol=1e-4, atol=1e-4)
    mix = last.step.uncond + SCALE * (last.step.cond - last.step.uncond)
    assert close(last.denoised, mix, 1e-5) is isinstance(rule, ClassifierFreeGuidance)


def test_a_fresh_memory_for_every_run_and_none_of_the_other() -> None:
    tiny = shared("sd3")
    rule = AdaptiveProjectedGuidance(SCALE, momentum=-0.5)
    with steer(tiny.pipe, rule) as run:
        first, second = tiny.call(), tiny.call()
    assert torch.equal(first, second) and run.trajectories == 2 and len(run.steps) == STEPS


def test_an_interval_leaves_the_conditional_prediction_outside() -> None:
    tiny = shared("sd3")
    with steer(tiny.pipe, ClassifierFreeGuidance(1.0)) as run:
        conditional = tiny.call()
    between = sum(record.ratio for record in run.steps[1:3]) / 2
    early = GuidanceInterval(ClassifierFreeGuidance(SCALE), low=between)
    with steer(tiny.pipe, early, keep=True) as run:
        assert not torch.equal(tiny.call(), conditional)
    as_cond = [close(record.denoised, record.step.cond, 1e-5) for record in run.steps]
    assert as_cond == [False, False, *[True] * (STEPS - 2)]
    with pytest.raises(ValueError, match="no step of this run"):
        with steer(tiny.pipe, GuidanceInterval(ClassifierFreeGuidance(SCALE), high=1e-6)):
            tiny.call()
    assert close(tiny.call(guidance_scale=1.0), conditional, 1e-5)


def test_steps_know_where_they_are() -> None:
    seen: list[Step] = []

    class Watch:
        def __call__(self, step: Step) -> torch.Tensor:
            seen.append(step)
            return step.cond

    tiny = shared("sd-img2img")
    with steer(tiny.pipe, Watch()):
        tiny.call()
    assert [step.index for step in seen] == list(range(len(seen)))
    assert {step.count for step in seen} == {len(seen)}
    assert all(step.x.dtype == step.cond.dtype == torch.float32 for step in seen)
    levels = [float(step.level.sigma) for step in seen]
    assert levels == sorted(levels, reverse=True)


def test_a_scheduler_may_have_no_table_before_the_run() -> None:
    tiny, seen = build("sd3"), []
    del tiny.pipe.scheduler.sigmas  # ``set_timesteps`` makes it

    class Watch:
        def __call__(self, step: Step) -> torch.Tensor:
            seen.append(step)
            return step.cond

    with steer(tiny.pipe, Watch()):
        tiny.call()
    assert seen[0].ratios is not None and len(seen[0].ratios) == len(seen)


def test_several_denoisers_are_followed() -> None:
    tiny = shared("wan2.2")
    modules = [tiny.pipe.transformer, tiny.pipe.transformer_2]
    called: list[int] = []
    handles = [
        m.register_forward_hook(lambda *_, i=i: called.append(i)) for i, m in enumerate(modules)
    ]
    with steer(tiny.pipe, ClassifierFreeGuidance(SCALE)) as run:
        tiny.call()
    for handle in handles:
        handle.remove()
    assert set(called) == {0, 1} and run.evaluations == len(called)


def test_a_network_that_predicts_something_else_than_the_scheduler_takes() -> None:
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=3,
        num_layers=1,
        norm_num_groups=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = ClassConditionalPipeline(network, scheduler, prediction="denoised")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.prediction_kind == Kind.DENOISED

    def call(scale: float) -> torch.Tensor:
        return pipe(
            [1, 2], guidance_scale=scale, num_inference_steps=4, seeds=[0, 1], output_type="latent"
        )[0]

    expected = call(SCALE)
    with steer(pipe, ClassifierFreeGuidance(SCALE)):
        assert torch.equal(call(2.0), expected)
    with steer(pipe, CFG_AS_APG):
        assert close(call(2.0), expected, 1e-5)
