"""The methods beyond CFG and APG, through steer() on real (tiny) pipelines."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
from tiny_pipelines import build
from torch import Tensor

from diffsteer import steer
from diffsteer.core import MissingPrediction
from diffsteer.guidance import (
    CalibratedClassifierGuidance,
    ClassifierFreeGuidance,
    GradientFreeClassifierGuidance,
    GuidanceInterval,
    ManifoldProjectedGuidance,
)
from diffsteer.guidance.cfgmp import flow_sigma
from diffsteer.pipelines.labels import known_classes
from diffsteer.pipelines.levels import LevelReader

CFG = ClassifierFreeGuidance(3.0)
NAMES = ("dit", "sd", "sd3", "wan", "z-image")


class Spy:
    """A rule that keeps what it saw and does classifier-free guidance."""

    commutes = False

    def __init__(self) -> None:
        self.steps = []

    def __call__(self, step) -> Tensor:
        self.steps.append(step)
        return CFG(step)


@pytest.mark.parametrize("name", NAMES)
def test_the_next_level_is_the_one_the_next_step_finds(name):
    tiny, spy = build(name), Spy()
    with steer(tiny.pipe, spy):
        tiny.call()
    assert len(spy.steps) > 2
    for now, after in zip(spy.steps, spy.steps[1:], strict=False):
        torch.testing.assert_close(now.next_level.alpha, after.level.alpha)
        torch.testing.assert_close(now.next_level.sigma, after.level.sigma)
    assert float(spy.steps[-1].next_level.sigma) < float(spy.steps[-1].level.sigma)


@pytest.mark.parametrize("name", NAMES)
def test_manifold_projection_moves_and_costs_what_it_says(name):
    tiny, spy = build(name), Spy()
    with steer(tiny.pipe, spy):
        plain = tiny.call()
    levels = [float(flow_sigma(step.level)) for step in spy.steps]
    middle = (levels[0] + levels[-1]) / 2
    rule = ManifoldProjectedGuidance(CFG, iterations=2, above=middle)
    with steer(tiny.pipe, rule) as run:
        first = tiny.call()
        again = tiny.call()
    assert torch.isfinite(first).all() and not torch.allclose(first, plain, rtol=1e-2)
    torch.testing.assert_close(again, first)
    costs = {record.evaluations for record in run.steps}
    assert len(costs) == 2, "steps inside and outside the gate"
    off = ManifoldProjectedGuidance(CFG, iterations=0)
    with steer(tiny.pipe, off):
        without = tiny.call()
    with steer(tiny.pipe, CFG):
        torch.testing.assert_close(without, tiny.call(), rtol=1e-4, atol=1e-5)


def ten_logits(images: Tensor) -> Tensor:
    return 5 * images.flatten(1)[:, :10]


def test_gfcg_reads_the_class_and_asks_for_another():
    tiny = build("dit")
    asked: list[Tensor] = []

    def classifier(images: Tensor) -> Tensor:
        asked.append(images)
        return ten_logits(images)

    rule = GradientFreeClassifierGuidance(classifier, scale=2.0, combine="cfg", cfg_scale=3.0)
    with pytest.raises(ValueError, match="has 10 classes, the model 1000"), steer(tiny.pipe, rule):
        tiny.call()
    asked.clear()
    rule = replace(rule, label_map=torch.arange(10))
    with steer(tiny.pipe, rule) as run:
        guided = tiny.call()
    assert len(asked) == len(run.steps)
    assert all(record.evaluations == 2 for record in run.steps)  # the pair, and the reference
    with steer(tiny.pipe, CFG):
        plain = tiny.call()
    assert torch.isfinite(guided).all() and not torch.allclose(guided, plain, rtol=1e-3)


@pytest.mark.parametrize("name, classes", [("dit", 1000), ("pixart", None), ("sd", None)])
def test_a_step_knows_how_many_classes_there_are(name, classes):
    tiny, spy = build(name), Spy()
    with steer(tiny.pipe, spy):
        tiny.call()
    assert {step.classes for step in spy.steps} == {classes}
    compiled = torch.compile(getattr(tiny.pipe, tiny.denoisers[0]), backend="eager")
    assert known_classes(compiled) == classes


def test_gfcg_says_what_is_missing_where_there_are_no_classes():
    tiny = build("sd3")
    rule = GradientFreeClassifierGuidance(ten_logits)
    with pytest.raises(MissingPrediction, match="class_labels"), steer(tiny.pipe, rule):
        tiny.call()


@pytest.mark.parametrize("form", ["score", "posterior", "direction"])
@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_elucd_forms_run_and_push(name, form):
    tiny = build(name)
    with steer(tiny.pipe, CFG):
        plain = tiny.call()
    rule = CalibratedClassifierGuidance(
        ten_logits, rule=CFG, scale=0.2, form=form, labels=torch.zeros(len(plain)).long()
    )
    with steer(tiny.pipe, rule):
        guided = tiny.call()
    assert torch.isfinite(guided).all() and not torch.allclose(guided, plain, rtol=1e-3)


def test_following_is_none_where_it_cannot_be_told():
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler()
    scheduler.set_timesteps(4)
    reader = LevelReader(scheduler)
    reader.read(scheduler.timesteps[0])
    assert reader.following(scheduler.timesteps[0]) is None


STOCHASTIC = {
    "DDPM": (diffusers.DDPMScheduler, {}, {}),
    "Euler ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}, {}),
    "DDIM with eta": (diffusers.DDIMScheduler, {}, {"eta": 0.5}),
    "SDE-DPM++": (
        diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_acceleration_refuses_a_solver_that_adds_noise(name):
    scheduler, settings, options = STOCHASTIC[name]
    tiny = build("sd")
    tiny.pipe.scheduler = scheduler.from_config(tiny.pipe.scheduler.config, **settings)
    fast = ManifoldProjectedGuidance(CFG, iterations=2, anderson=1, above=0.3)
    with pytest.raises(ValueError, match=r"adds noise.*anderson=0"), steer(tiny.pipe, fast):
        tiny.call(**options)
    with steer(tiny.pipe, replace(fast, anderson=0)) as run:  # the plain iteration runs
        assert torch.isfinite(tiny.call(**options)).all()
    assert max(record.evaluations for record in run.steps) > 1


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_levels_outside_the_run_are_named(name):
    tiny = build(name)
    nowhere = GradientFreeClassifierGuidance(ten_logits, high=1e-9, labels=torch.zeros(2).long())
    late = ManifoldProjectedGuidance(CFG, above=0.9999999)
    for rule in (nowhere, late, GuidanceInterval(CFG, high=1e-9)):
        if name == "sd3" and rule is late:
            continue  # its first step is pure noise, above any gate
        with pytest.raises(ValueError, match="no step of this run lies in"), steer(tiny.pipe, rule):
            tiny.call()
