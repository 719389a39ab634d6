"""Guiders against diffusers' own guidance, against ``steer``, and what they see of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import diffusers
import pytest
import torch
from tiny_pipelines import SCALE, WITH_GUIDER, Tiny, build
from torch import Tensor

from diffsteer.core import MissingPrediction, Step, to_denoised
from diffsteer.guidance import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    GuidanceInterval,
    LinearScale,
    classifier_free,
)
from diffsteer.pipelines import (
    AdaptiveProjectedGuider,
    ClassifierFreeGuider,
    RuleGuider,
    attach,
    degraded,
    install_guider,
    noise_level,
    steer,
)

PLAIN_APG = {"eta": 1.0, "relative_radius": None, "momentum": 0.0}
# Qwen rescales every token after its guider, and steer takes the place of that too.
COMPARABLE = [name for name in WITH_GUIDER if name != "modular-qwen"]


def give(tiny: Tiny, guider: RuleGuider) -> Tiny:
    for name in ("guider", "guider_2"):
        if getattr(tiny.pipe, name, None) is not None:
            install_guider(tiny.pipe, guider.new(), name)
    return tiny


def spy_on(tiny: Tiny, rule) -> RuleGuider:
    guider = RuleGuider(rule)
    install_guider(tiny.pipe, guider)
    return guider


def gap(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", WITH_GUIDER)
def test_plain_guidance_is_that_of_diffusers(name: str) -> None:
    tiny = build(name)
    theirs = tiny.call()
    assert torch.equal(give(tiny, ClassifierFreeGuider(guidance_scale=SCALE)).call(), theirs)
    projected = give(tiny, AdaptiveProjectedGuider(guidance_scale=SCALE, **PLAIN_APG)).call()
    assert gap(projected, theirs) < 3e-6


@pytest.mark.parametrize("name", COMPARABLE)
def test_projected_guidance_is_that_of_steer(name: str) -> None:
    # The two experts of Wan 2.2 have a guider each, and so a momentum each; steer has one.
    momentum = 0.0 if name == "modular-wan2.2" else -0.5
    tiny = build(name)
    plain = tiny.call()
    with steer(tiny.pipe, AdaptiveProjectedGuidance(scale=8.0, momentum=momentum)):
        steered = tiny.call()
    give(tiny, AdaptiveProjectedGuider(guidance_scale=8.0, momentum=momentum))
    guided = tiny.call()
    assert gap(guided, steered) < 2e-6
    assert gap(guided, plain) > 0.05
    assert torch.equal(guided, tiny.call()), "nothing is left over from a run"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    tiny = build("modular-sd3", dtype)
    theirs = tiny.call()
    assert torch.equal(give(tiny, ClassifierFreeGuider(guidance_scale=SCALE)).call(), theirs)
    with steer(tiny.pipe, AdaptiveProjectedGuidance()) as run:
        steered = tiny.call()
    assert len(run.steps) == 4
    guided = give(tiny, AdaptiveProjectedGuider()).call()
    assert guided.dtype == dtype and torch.equal(guided, steered)


@pytest.mark.parametrize("name", ["modular-sd3", "modular-wan-euler", "modular-z-image"])
def test_a_flow_model_needs_no_attaching(name: str) -> None:
    tiny = build(name)
    attached = give(tiny, AdaptiveProjectedGuider()).call()
    tiny.pipe.update_components(guider=AdaptiveProjectedGuider())
    assert tiny.pipe.guider.scheduler is None
    assert gap(tiny.call(), attached) < 1e-6


@dataclass(frozen=True)
class Spy:
    """Guides like plain guidance, in the denoised space, and keeps what it saw."""

    seen: list[Step] = field(default_factory=list)
    again: bool = False

    def __call__(self, step: Step) -> Tensor:
        self.seen.append(step)
        if self.again:
            assert torch.equal(step.predict(), step.cond)
            assert torch.equal(step.predict(branch="uncond"), step.uncond)
            assert gap(step.predict(step.x, branch="uncond"), step.uncond) < 1e-6
            elsewhere = step.predict(step.x + 0.1)
            assert elsewhere.shape == step.x.shape and not torch.equal(elsewhere, step.cond)
        return classifier_free(step.cond, step.uncond, SCALE)


@pytest.mark.parametrize("name", [n for n in WITH_GUIDER if n != "modular-wan2.2"])
def test_a_rule_sees_the_sample_and_the_level(name: str) -> None:
    tiny, spy, given = build(name), Spy(), []
    theirs = tiny.call()
    spy_on(tiny, spy)
    scheduler = tiny.pipe.scheduler
    step = scheduler.step

    def watch(output: Tensor, timestep: Tensor, sample: Tensor, **kwargs):
        reading = noise_level(scheduler, timestep)
        given.append(
            (sample.clone(), reading, to_denoised(output, reading.kind, sample, reading.level))
        )
        return step(output, timestep, sample, **kwargs)

    scheduler.step = watch
    assert gap(tiny.call(), theirs) < 3e-6
    assert [s.index for s in spy.seen] == [0, 1, 2, 3] and {s.count for s in spy.seen} == {4}
    for seen, (sample, reading, denoised) in zip(spy.seen, given, strict=True):
        assert gap(seen.x, sample) < 1e-6
        assert torch.equal(seen.level.sigma, reading.level.sigma)
        assert seen.next_level is not None
        if name != "modular-qwen":  # what the scheduler gets was rescaled after the guider
            guided = classifier_free(seen.cond, seen.uncond, SCALE)
            torch.testing.assert_close(guided, denoised, rtol=1e-4, atol=1e-3)
    for before, after in pairwise(spy.seen):
        assert torch.equal(before.next_level.sigma, after.level.sigma)
    text = "cap_feats" if name == "modular-z-image" else "encoder_hidden_states"
    embeds = [spy.seen[0].argument(text, branch) for branch in ("cond", "uncond")]
    assert len(embeds[0]) == 2 and not torch.equal(embeds[0][0], embeds[1][0])


@pytest.mark.parametrize("name", ["modular-sd3", "modular-sdxl", "modular-z-image", "modular-qwen"])
def test_a_rule_may_evaluate_the_model_again(name: str) -> None:
    tiny, spy = build(name), Spy(again=True)
    theirs = tiny.call()
    spy_on(tiny, spy)
    assert gap(tiny.call(), theirs) < 3e-6
    assert len(spy.seen) == 4


def test_another_model_may_be_asked() -> None:
    tiny, weak = build("modular-sd3"), build("sd3").pipe.transformer
    for parameter in weak.parameters():
        parameter.mul_(0.9)
    differences = []

    def rule(step: Step) -> Tensor:
        differences.append(float((step.weak(weak) - step.cond).norm()))
        return step.weak(tiny.pipe.transformer)

    spy_on(tiny, rule)
    tiny.call()
    assert len(differences) == 4 and min(differences) > 0


def test_a_rule_without_unconditional_prediction_spares_it() -> None:
    tiny = build("modular-sd3")
    weak = degraded(tiny.pipe.transformer, skip=[0])
    with steer(tiny.pipe, AutoGuidance(2.0), weak=weak):
        steered = tiny.call()
    install_guider(tiny.pipe, RuleGuider(AutoGuidance(2.0, model=weak)))
    assert tiny.pipe.guider.num_conditions == 1
    ran = calls_of(tiny)
    assert gap(tiny.call(), steered) < 2e-6
    assert len(ran) == 8, "one of the model and one of its degraded pass a step"
    install_guider(tiny.pipe, RuleGuider(AutoGuidance(2.0)))
    with pytest.raises(MissingPrediction, match=r"steer\(pipe, rule, weak=\.\.\.\)"):
        tiny.call()


def calls_of(tiny: Tiny) -> list[str]:
    """The names of the branches, in the order in which the network ran."""
    module, ran = getattr(tiny.pipe, tiny.denoisers[0]), []
    module.register_forward_hook(lambda *_: ran.append(tiny.pipe.guider.is_conditional))
    return ran


@pytest.mark.parametrize("name", ["modular-sd3", "modular-sdxl"])
def test_a_part_of_the_steps_twice(name: str) -> None:
    """With diffusers' own guider the second run of SDXL fails for want of a negative prompt."""
    tiny = give(build(name), AdaptiveProjectedGuider(stop=0.5))
    ran = calls_of(tiny)
    first = tiny.call()
    assert ran == [True, False, True, False, True, True], "no unconditional prediction is wasted"
    assert tiny.pipe.guider.num_conditions == 2
    assert torch.equal(first, tiny.call())
    ran.clear()
    give(tiny, AdaptiveProjectedGuider(start=0.5)).call()
    assert ran == [True, True, True, False, True, False]


def test_an_interval_of_levels_is_that_of_steer_and_saves_evaluations() -> None:
    tiny = build("modular-sd3")
    rule = GuidanceInterval.flow(AdaptiveProjectedGuidance(), 0.5, 0.95)
    with steer(tiny.pipe, rule) as run:
        steered = tiny.call()
    inside = [0.5 < step.sigma <= 0.95 for step in run.steps]
    assert any(inside) and not all(inside)
    install_guider(tiny.pipe, AdaptiveProjectedGuider(interval_low=1.0, interval_high=19.0))
    ran = calls_of(tiny)
    assert gap(tiny.call(), steered) < 2e-6
    assert len(ran) == 4 + sum(inside)


def test_off_is_the_conditional_prediction() -> None:
    # Modular SDXL enables any guider at every run, so there only a scale of 1 turns it off.
    tiny = build("modular-sd3")
    conditional = tiny.call(guidance_scale=1.0)
    for guider in (
        ClassifierFreeGuider(guidance_scale=1.0),
        AdaptiveProjectedGuider(guidance_scale=1.0),
        AdaptiveProjectedGuider(enabled=False),
    ):
        give(tiny, guider)
        assert tiny.pipe.guider.num_conditions == 1
        assert torch.equal(tiny.call(), conditional)
    tiny.pipe.guider.enable()
    assert tiny.pipe.guider.num_conditions == 2


def test_a_ramp_of_scales() -> None:
    tiny = build("modular-sd3")
    with steer(tiny.pipe, ClassifierFreeGuidance(LinearScale(1.0, 8.0))):
        steered = tiny.call()
    assert torch.equal(
        give(tiny, ClassifierFreeGuider(guidance_scale="linear:1:8")).call(), steered
    )


def test_stages_of_a_solver_are_not_steps() -> None:
    tiny, spy = build("modular-sdxl"), Spy()
    heun = diffusers.HeunDiscreteScheduler.from_config(tiny.pipe.scheduler.config)
    tiny.pipe.update_components(scheduler=heun)
    # diffusers' own guiders count evaluations for steps, and end in the middle of the run.
    give(tiny, ClassifierFreeGuider(guidance_scale=SCALE))
    with steer(tiny.pipe, AdaptiveProjectedGuidance()) as run:
        steered = tiny.call()
    assert all(step.guided for step in run.steps)
    assert gap(give(tiny, AdaptiveProjectedGuider()).call(), steered) < 2e-6
    spy_on(tiny, spy)
    tiny.call()
    assert [(s.index, s.stage) for s in spy.seen] == [(i // 2, i % 2) for i in range(7)]


def test_a_second_guider_begins_each_of_its_runs_afresh() -> None:
    """Wan 2.2 gives it the later steps alone, so no run of it begins at step 0."""
    tiny = give(build("modular-wan2.2"), AdaptiveProjectedGuider(relative_radius=None))
    first = tiny.call()
    assert torch.equal(tiny.call(), first)


def test_a_run_that_broke_off_leaves_nothing_behind() -> None:
    tiny = give(build("modular-sd3"), AdaptiveProjectedGuider())
    whole = tiny.call()
    transformer = tiny.pipe.transformer
    count = [0]

    def fail(*_) -> None:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt

    handle = transformer.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        tiny.call()
    handle.remove()
    assert torch.equal(tiny.call(), whole)
    assert not transformer._forward_hooks, "no hook is left after a run"


def test_guiders_stay_with_their_pipeline() -> None:
    tiny = build("modular-sdxl")
    guider = AdaptiveProjectedGuider()
    install_guider(tiny.pipe, guider)
    assert guider.scheduler is tiny.pipe.scheduler
    other = diffusers.DDIMScheduler.from_config(tiny.pipe.scheduler.config)
    tiny.pipe.update_components(scheduler=other)
    assert guider.scheduler is other, "a scheduler put in later is the one that counts"
    assert guider.new(eta=0.5).scheduler is None
    assert attach(tiny.pipe) is tiny.pipe
