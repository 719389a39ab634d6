"""Guidance intervals: where they are on, what they remember, what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffsteer.core import Level, MissingPrediction, Step
from diffsteer.guidance import AdaptiveProjectedGuidance, ClassifierFreeGuidance, GuidanceInterval

RULE = ClassifierFreeGuidance(3.0)


def step_at(level: Level, *, uncond: bool = True, memory: dict | None = None, index=0) -> Step:
    cond, other = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    kept = {} if memory is None else memory
    return Step(cond, level, index, 9, 0.5, cond, other if uncond else None, memory=kept)


@pytest.mark.parametrize(
    "sigma, on", [(0.1, False), (0.3, False), (0.31, True), (1.0, True), (2.9, True), (3.0, False)]
)
def test_on_above_low_up_to_high(sigma: float, on: bool) -> None:
    step = step_at(Level.ve(sigma))
    guided = GuidanceInterval(RULE, 0.3, 2.9)(step)
    assert torch.equal(guided, RULE(step) if on else step.cond)


@pytest.mark.parametrize(
    "level",
    [Level.ve(1.5), Level.flow(0.6), Level.vp(1 / (1 + 1.5**2)), Level(0.5, 0.75)],
    ids=["ve", "flow", "vp", "any"],
)
def test_one_meaning_of_sigma_for_every_schedule(level: Level) -> None:
    step = step_at(level)
    assert torch.equal(GuidanceInterval(RULE, 1.4, 1.6)(step), RULE(step))
    assert torch.equal(GuidanceInterval(RULE, 1.6, 1.8)(step), step.cond)


def test_ends_in_flow_sigma() -> None:
    rule = GuidanceInterval.flow(RULE, 0.2, 0.8)
    assert (rule.low, rule.high) == pytest.approx((0.25, 4.0))
    assert GuidanceInterval.flow(RULE).high == math.inf
    pure_noise = step_at(Level.flow(1.0))  # alpha 0: the ratio is infinite
    assert torch.equal(GuidanceInterval.flow(RULE)(pure_noise), RULE(pure_noise))
    assert torch.equal(rule(pure_noise), pure_noise.cond)


def test_outside_no_uncond_is_needed() -> None:
    step = step_at(Level.ve(5.0), uncond=False)
    assert GuidanceInterval(RULE, 0.3, 3.0)(step) is step.cond
    with pytest.raises(MissingPrediction):
        GuidanceInterval(RULE, 0.3, 9.0)(step)


def test_levels_that_differ_in_a_batch() -> None:
    step = step_at(Level.ve(torch.tensor([0.1, 1.0, 9.0])))
    guided = GuidanceInterval(RULE, 0.3, 3.0)(step)
    assert torch.equal(guided[1], RULE(step)[1])
    assert torch.equal(guided[[0, 2]], step.cond[[0, 2]])


def test_one_level_a_sample_is_one_level_where_all_agree() -> None:
    step = step_at(Level.ve(torch.full((3,), 9.0)), uncond=False)
    assert GuidanceInterval(RULE, 0.3, 3.0)(step) is step.cond


def test_memory_is_empty_on_entry() -> None:
    """In, out, in: the second entry must be as the first, momentum included."""
    inner = AdaptiveProjectedGuidance(4.0, momentum=-0.5)
    rule, memory = GuidanceInterval(inner, 0.5, 3.0), {}
    steps = [step_at(Level.ve(s), memory=memory) for s in (2.0, 1.5, 0.1, 1.0)]
    guided = [rule(step) for step in steps]
    fresh = step_at(Level.ve(2.0))
    fresh.cond, fresh.uncond = steps[3].cond, steps[3].uncond
    assert torch.equal(guided[3], inner(fresh))
    second = step_at(Level.ve(1.5))
    second.cond, second.uncond = steps[1].cond, steps[1].uncond
    assert not torch.allclose(guided[1], inner(second))  # within the interval momentum is at work


def test_the_same_rule_inside_two_intervals_keeps_two_memories() -> None:
    inner, memory = AdaptiveProjectedGuidance(4.0), {}
    early, late = GuidanceInterval(inner, 1.0), GuidanceInterval(inner, 0.0, 1.0)
    early(step_at(Level.ve(2.0), memory=memory))
    step = step_at(Level.ve(0.5), memory=memory)
    alone = step_at(Level.ve(0.5))
    alone.cond, alone.uncond = step.cond, step.uncond
    assert torch.equal(late(step), inner(alone))


class Mover:
    """A rule that moves the sample by one."""

    commutes, moves = False, True

    def __call__(self, step: Step) -> Tensor:
        step.move(step.x + 1)
        return step.cond


def test_a_moved_sample_gets_through() -> None:
    step = step_at(Level.ve(1.0))
    rule = GuidanceInterval(Mover(), 0.5, 2.0)
    rule(step)
    assert rule.moves and torch.equal(step.moved, step.x + 1)
    outside = step_at(Level.ve(5.0))
    rule(outside)
    assert outside.moved is None
    mixed = step_at(Level.ve(torch.tensor([0.1, 1.0, 9.0])))
    rule(mixed)
    assert torch.equal(mixed.moved, torch.stack([mixed.x[0], mixed.x[1] + 1, mixed.x[2]]))


def test_commutes_if_the_inner_rule_does() -> None:
    assert GuidanceInterval(RULE, 0.5).commutes
    assert not GuidanceInterval(AdaptiveProjectedGuidance(3.0), 0.5).commutes
    assert not GuidanceInterval(RULE, 0.5).moves


@pytest.mark.parametrize(
    "low, high, text",
    [
        (2.0, 1.0, "low must be less than high, got low=2.0 and high=1.0"),
        (1.0, 1.0, "guidance is on where low < sigma <= high"),
        (math.nan, 1.0, "low must be a finite number, got nan"),
        (0.0, math.nan, "high must be a finite number, got nan; use math.inf"),
        (-1.0, 1.0, r"low must be in \[0, inf\), got -1.0; sigma is a noise-to-signal ratio"),
    ],
)
def test_bad_ends_say_what_to_do(low: float, high: float, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        GuidanceInterval(RULE, low, high)


@pytest.mark.parametrize("low, high", [(-0.1, 0.5), (0.5, 1.1), (0.8, 0.2), (math.nan, 1.0)])
def test_bad_flow_ends(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=r"low|high"):
        GuidanceInterval.flow(RULE, low, high)


@pytest.mark.parametrize(
    "rule, text",
    [
        ("cfg", "rule must be a guidance method such as .* got 'cfg' of type str"),
        (ClassifierFreeGuidance, "got the class ClassifierFreeGuidance itself; make one"),
        (None, "got None"),
    ],
)
def test_what_is_no_rule_is_refused(rule: object, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        GuidanceInterval(rule)  # type: ignore[arg-type]


LOW = ClassifierFreeGuidance(1.5)


@pytest.mark.parametrize(
    "sigma, inside", [(0.95, True), (0.875, True), (0.874, False), (0.1, False)]
)
def test_a_rule_for_each_of_two_experts(sigma: float, inside: bool) -> None:
    rule = GuidanceInterval.two_experts(RULE, LOW, 0.875)
    for level in (Level.flow(sigma), Level.ve(torch.tensor(sigma / (1 - sigma)))):
        step = step_at(level)
        assert torch.equal(rule(step), (RULE if inside else LOW)(step))


def test_two_rules_keep_two_memories() -> None:
    """Momentum begins anew where a rule takes over, and does not leak into the other."""
    inner = AdaptiveProjectedGuidance(4.0, momentum=-0.5)
    rule, memory = GuidanceInterval(inner, 1.0, outside=inner), {}
    for sigma in (3.0, 2.0, 0.5):
        step = step_at(Level.ve(sigma), memory=memory)
        guided = rule(step)
    fresh = step_at(Level.ve(0.5))
    fresh.cond, fresh.uncond = step.cond, step.uncond
    assert torch.equal(guided, inner(fresh))


def test_two_rules_where_levels_differ_in_a_batch() -> None:
    step = step_at(Level.ve(torch.tensor([0.1, 1.0, 9.0])))
    guided = GuidanceInterval(RULE, 0.3, 3.0, outside=LOW)(step)
    assert torch.equal(guided[1], RULE(step)[1])
    assert torch.equal(guided[[0, 2]], LOW(step)[[0, 2]])
    moved = GuidanceInterval(LOW, 0.3, 3.0, outside=Mover())
    moved(step)
    assert moved.moves
    assert torch.equal(step.moved, torch.stack([step.x[0] + 1, step.x[1], step.x[2] + 1]))


def test_two_rules_want_what_either_wants() -> None:
    apg, none = AdaptiveProjectedGuidance(3.0), ClassifierFreeGuidance(1.0)
    assert GuidanceInterval(RULE, 0.5, outside=LOW).commutes
    assert not GuidanceInterval(RULE, 0.5, outside=apg).commutes
    assert GuidanceInterval(none, 0.5, outside=LOW).needs_uncond
    assert not GuidanceInterval(none, 0.5, outside=none).needs_uncond
    with pytest.raises(TypeError, match="outside must be a guidance method"):
        GuidanceInterval(RULE, 0.5, outside="cfg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"boundary must be in \(0, 1\), got 875; it is pipe\.con"):
        GuidanceInterval.two_experts(RULE, LOW, 875)
