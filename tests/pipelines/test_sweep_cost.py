"""What an image costs: closed-form counts of evaluations, and budgets that are kept."""

from __future__ import annotations

import pytest
import torch
from tiny_flow import tiny_dit, tiny_pipeline
from torch import nn

from diffsteer.core import MissingPrediction
from diffsteer.guidance import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    CalibratedClassifierGuidance,
    ClassifierFreeGuidance,
    GradientFreeClassifierGuidance,
    GuidanceInterval,
    ManifoldProjectedGuidance,
)
from diffsteer.pipelines import SweepPoint, at_budget, plan_images, point_cost
from diffsteer.pipelines.sweep_budget import steps_for_budget


class Colours(nn.Module):
    """Ten classes from the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)
        nn.init.orthogonal_(self.head.weight, 5.0)
        self.seen: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(images))
        return self.head(images.mean((2, 3)))


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("denoised")


@pytest.fixture(scope="module")
def request_(pipe):
    return plan_images([3], pipe=pipe)[0]


def cost(pipe, request_, rule, steps=5, **more):
    return point_cost(pipe, request_, rule, steps=steps, **more)


CFG = ClassifierFreeGuidance(3.0)
# evaluations of 5 steps, rows of 5 steps, whether the unconditional branch is needed
PRICES = {
    "none": (None, 5, 5, False),
    "cfg": (CFG, 10, 10, True),
    "cfg at 1": (ClassifierFreeGuidance(1.0), 5, 5, False),
    "apg": (AdaptiveProjectedGuidance(3.0), 10, 10, True),
    "gfcg": (GradientFreeClassifierGuidance(Colours().eval()), 10, 10, False),
    "gfcg on cfg": (
        GradientFreeClassifierGuidance(Colours().eval(), combine="cfg", cfg_scale=2.0),
        # the reference is a conditional prediction, but the pipeline computes both halves
        15, 20, True,
    ),
    "elucd": (CalibratedClassifierGuidance(Colours().eval()), 5, 5, False),
    # flow sigmas 1, 0.8, 0.6, 0.4, 0.2: three are above 0.5, where 2 + (2 K - 1) + 2 = 7
    "cfgmp": (
        ManifoldProjectedGuidance(CFG, iterations=2, above=0.5), 3 * 7 + 2 * 2, 3 * 10 + 4, True
    ),
    "cfgmp gated off": (ManifoldProjectedGuidance(CFG, above=1.0), 10, 10, True),
}  # fmt: skip


@pytest.mark.parametrize("name", PRICES)
def test_evaluations_of_an_image(pipe, request_, name):
    rule, nfe, rows, guided = PRICES[name]
    found = cost(pipe, request_, rule)
    assert (found.nfe, found.rows, found.guided) == (nfe, rows, guided)


def test_a_weak_model_is_counted_and_the_unconditional_branch_is_spared(pipe, request_):
    found = cost(pipe, request_, AutoGuidance(2.0), weak=tiny_dit())
    assert (found.nfe, found.rows, found.guided) == (10, 10, False)
    inside = GuidanceInterval.flow(AutoGuidance(2.0), 0.3, 0.7)  # sigmas 0.6 and 0.4
    assert cost(pipe, request_, inside, weak=tiny_dit()).nfe == 7


def test_what_is_missing_is_said(pipe, request_):
    with pytest.raises(MissingPrediction, match="weak"):
        cost(pipe, request_, AutoGuidance(2.0))


def test_the_classifier_is_timed_on_a_whole_batch(pipe, request_):
    classifier = Colours().eval()
    rule = GuidanceInterval.flow(CalibratedClassifierGuidance(classifier), 0.3, 0.7)
    found = cost(pipe, request_, rule, batch_size=7)
    assert found.classifier_calls == 2 and found.batch_size == 7
    assert found.classifier_seconds is not None and found.classifier_seconds > 0
    assert classifier.seen == [1, 1, 7, 7, 7]  # two steps of one image, three timings
    assert classifier.head.weight.grad is None
    assert cost(pipe, request_, CFG).classifier_seconds is None


def test_counting_changes_no_image(pipe):
    from diffsteer import steer

    call = {"seeds": [3], "num_inference_steps": 3, "output_type": "pt", "guidance_scale": 2.0}
    rule = ManifoldProjectedGuidance(AdaptiveProjectedGuidance(3.0))
    with steer(pipe, rule):
        before = pipe("cat", **call).images
    cost(pipe, plan_images([3], pipe=pipe)[0], rule)
    with steer(pipe, rule):
        assert torch.equal(before, pipe("cat", **call).images)


@pytest.mark.parametrize("budget", [2, 3, 60, 61])
def test_a_budget_buys_the_most_steps_it_can(budget):
    asked = []

    def nfe(steps):
        asked.append(steps)
        return 2 * steps + 4 * int(0.6 * steps)  # gated at the first six tenths

    steps = steps_for_budget(nfe, budget)
    assert nfe(steps) <= budget < nfe(steps + 1)
    assert len(asked) < 12


def test_points_at_equal_price(pipe, request_):
    points = [
        SweepPoint("cfg", CFG),
        SweepPoint("mp", ManifoldProjectedGuidance(CFG, iterations=2, above=0.5)),
    ]
    found = at_budget(pipe, request_, points, 25)
    # 12 steps of CFG are 24; of CFG-MP 5 are 25, since three of 5 sigmas are above 0.5
    assert [(p.name, p.steps) for p in found] == [("cfg-steps=12", 12), ("mp-steps=5", 5)]
    with pytest.raises(ValueError, match=r"point mp: a single step needs 7 .* budget of 5"):
        at_budget(pipe, request_, points[1:], 5)
    with pytest.raises(ValueError, match="budget must be an integer of at least 1, got 0"):
        at_budget(pipe, request_, points, 0)
