"""Classifier-free guidance and its scale schedules."""

from __future__ import annotations

import math

import pytest
import torch

from diffsteer.core import Level, MissingPrediction, Step
from diffsteer.guidance import (
    ClassifierFreeGuidance,
    CosineScale,
    LinearScale,
    ScaleSchedule,
    classifier_free,
    parse_scale,
)


def step_at(index: int = 0, count: int = 11, *, uncond: bool = True, dtype=torch.float32) -> Step:
    cond, other = torch.randn(2, 4, 8, 8).to(dtype), torch.randn(2, 4, 8, 8).to(dtype)
    level = Level.flow(0.5)
    return Step(cond, level, index, count, 0.5, cond, other if uncond else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bits_of_a_diffusers_pipeline(dtype: torch.dtype) -> None:
    step = step_at(dtype=dtype)
    both = torch.cat([step.uncond, step.cond])  # what pipelines do, line for line
    noise_pred_uncond, noise_pred_text = both.chunk(2)
    pipeline = noise_pred_uncond + 7.5 * (noise_pred_text - noise_pred_uncond)
    assert torch.equal(ClassifierFreeGuidance(7.5)(step), pipeline)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, -1.0])
def test_is_the_line_through_both_predictions(scale: float) -> None:
    step = step_at(dtype=torch.float64)
    guided = classifier_free(step.cond, step.uncond, scale)
    torch.testing.assert_close(guided, torch.lerp(step.uncond, step.cond, scale))


def test_scale_one_needs_no_uncond_and_is_exact() -> None:
    step = step_at(uncond=False)
    assert ClassifierFreeGuidance(1.0)(step) is step.cond
    with pytest.raises(MissingPrediction, match="Turn classifier-free guidance on") as error:
        ClassifierFreeGuidance(1.5)(step)
    assert "ClassifierFreeGuidance" in str(error.value) and isinstance(error.value, ValueError)


def test_a_scale_for_each_sample_keeps_the_dtype() -> None:
    step = step_at(dtype=torch.bfloat16)
    guided = classifier_free(step.cond, step.uncond, torch.tensor([1.0, 4.0]))
    assert guided.dtype == torch.bfloat16
    rows = [classifier_free(step.cond[i], step.uncond[i], s) for i, s in enumerate([1.0, 4.0])]
    torch.testing.assert_close(guided, torch.stack(rows))


def test_predictions_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same shape, got \(2, 3\) \(conditional\) and \(1, 3\)"):
        classifier_free(torch.randn(2, 3), torch.randn(1, 3), 2.0)


@pytest.mark.parametrize("schedule", [LinearScale(2.0, 10.0), CosineScale(2.0, 10.0)])
def test_schedules_go_from_the_first_step_to_the_last(schedule: ScaleSchedule) -> None:
    scales = []
    for index in range(11):
        step = step_at(index)
        guided = ClassifierFreeGuidance(schedule)(step)
        scales.append(float(((guided - step.uncond) / (step.cond - step.uncond)).median()))
    assert scales[0] == pytest.approx(2.0, rel=1e-4) and scales[-1] == pytest.approx(10.0, rel=1e-4)
    assert scales[5] == pytest.approx(6.0, rel=1e-4) and scales == sorted(scales)
    assert isinstance(schedule, ScaleSchedule)


def test_the_cosine_is_flat_at_both_ends_and_steep_between() -> None:
    cosine, h = CosineScale(0.0, 1.0), 1e-4
    slopes = [(cosine(p + h) - cosine(p - h)) / (2 * h) for p in (0.0, 0.5, 1.0)]
    assert slopes == pytest.approx([0.0, math.pi / 2, 0.0], abs=1e-6)


def test_any_function_of_progress_is_a_schedule() -> None:
    step = step_at(5)
    guided = ClassifierFreeGuidance(lambda progress: 1 + 4 * progress)(step)
    assert torch.equal(guided, classifier_free(step.cond, step.uncond, 3.0))
    with pytest.raises(ValueError, match="the scale at step 5 must be a finite number, got nan"):
        ClassifierFreeGuidance(lambda _: math.nan)(step)


def test_a_single_step_takes_the_start() -> None:
    step = step_at(0, count=1)
    guided = ClassifierFreeGuidance(LinearScale(2.0, 9.0))(step)
    assert torch.equal(guided, classifier_free(step.cond, step.uncond, 2.0))


@pytest.mark.parametrize(
    "text, scale",
    [("4", 4.0), ("linear:1:8", LinearScale(1.0, 8.0)), ("cosine:8:1.5", CosineScale(8.0, 1.5))],
)
def test_scales_from_a_command_line(text: str, scale: float | ScaleSchedule) -> None:
    assert parse_scale(text) == scale


@pytest.mark.parametrize("text", ["", "nan", "linear", "linear:1", "linear:1:2:3", "square:1:2"])
def test_bad_scales_from_a_command_line(text: str) -> None:
    with pytest.raises(ValueError, match="linear:START:END"):
        parse_scale(text)


def test_a_schedule_class_is_no_schedule() -> None:
    with pytest.raises(TypeError, match="scale must be a number"):
        ClassifierFreeGuidance(LinearScale)  # type: ignore[arg-type]
