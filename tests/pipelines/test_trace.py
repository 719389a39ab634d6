"""What a rule does along a trajectory, against what classifier-free guidance is known to do."""

from __future__ import annotations

import pytest
import torch
from tiny_flow import tiny_pipeline

from diffsteer import steer
from diffsteer.guidance import (
    ClassifierFreeGuidance,
    GuidanceInterval,
    ManifoldProjectedGuidance,
)
from diffsteer.pipelines import plan_images, trace_rule
from diffsteer.pipelines.trace import mean_push


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("velocity")


def test_push_and_gap_of_classifier_free_guidance(pipe):
    requests = plan_images(range(3), pipe=pipe)
    seen = trace_rule(pipe, requests, ClassifierFreeGuidance(3.0), steps=4)
    assert [step.index for step in seen] == [0, 1, 2, 3]
    assert [step.sigma for step in seen] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    for step in seen:  # guided - cond = (scale - 1) * (cond - uncond), and v = (x - D) / sigma
        assert step.push.shape == (3,)
        torch.testing.assert_close(step.push, 2 * step.sigma * step.gap)
    assert mean_push(seen) == pytest.approx(float(torch.stack([s.push for s in seen]).mean()))


def test_the_gap_is_that_of_the_raw_velocities(pipe):
    requests = plan_images(range(2), pipe=pipe)
    seen = trace_rule(pipe, requests, ClassifierFreeGuidance(3.0), steps=2)
    x = pipe._noise(2, [torch.Generator().manual_seed(s) for s in (0, 1)], None, pipe.device)
    time = torch.full((4,), 1000.0)
    labels = torch.tensor([10, 10, 0, 1])
    with torch.no_grad():
        both = pipe.transformer(torch.cat([x, x]), timestep=time, class_labels=labels).sample
    gap = (both[2:] - both[:2]).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(seen[0].gap, gap, rtol=1e-4, atol=1e-6)


def test_the_innermost_rule_is_the_one_that_is_watched(pipe):
    requests = plan_images(range(2), pipe=pipe)
    rule = ManifoldProjectedGuidance(ClassifierFreeGuidance(3.0), iterations=2, above=0.4)
    moved = trace_rule(pipe, requests, rule, steps=4)
    plain = trace_rule(pipe, requests, ClassifierFreeGuidance(3.0), steps=4)
    assert not torch.equal(moved[0].gap, plain[0].gap)  # the same noise, but moved first
    inside = GuidanceInterval.flow(ClassifierFreeGuidance(3.0), 0.3, 0.8)
    assert [s.index for s in trace_rule(pipe, requests, inside, steps=4)] == [1, 2]


def test_watching_changes_no_image(pipe):
    call = {"seeds": [0, 1], "num_inference_steps": 3, "output_type": "pt", "guidance_scale": 4.0}
    rule = ManifoldProjectedGuidance(ClassifierFreeGuidance(3.0))
    seen = []
    with steer(pipe, rule):
        before = pipe([0, 1], **call).images
    from diffsteer.pipelines.trace import _watched

    with steer(pipe, _watched(rule, seen)):
        torch.testing.assert_close(pipe([0, 1], **call).images, before)
    assert len(seen) == 3


def test_nothing_recorded_is_said():
    with pytest.raises(ValueError, match="never asked"):
        mean_push([])
