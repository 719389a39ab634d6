"""GuidedDenoiser and Step: what a rule sees, may ask for, and is told when it cannot be had."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffsteer.core import GaussianMixture, Guidance, GuidedDenoiser, Level, MissingPrediction, Step
from diffsteer.guidance import AdaptiveProjectedGuidance, ClassifierFreeGuidance

MIXTURE = GaussianMixture.ring()
X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
LABELS = torch.tensor([0, 1, 2, 3])
SIGMA = torch.tensor(0.5, dtype=torch.float64)


class Spy:
    """A rule that keeps the steps it saw and answers with what a function of the step gives."""

    commutes = False

    def __init__(self, answer=lambda step: step.cond) -> None:
        self.answer, self.steps = answer, []

    def __call__(self, step: Step) -> Tensor:
        self.steps.append(step)
        return self.answer(step)


def guided(rule: Guidance | None, **more: object) -> GuidedDenoiser:
    model = MIXTURE.denoiser(level=Level.flow)
    settings = {"level": Level.flow, "arguments": {"labels": LABELS}} | more
    return GuidedDenoiser(rule, model, model, **settings)  # type: ignore[arg-type]


def test_a_rule_is_a_guidance_method() -> None:
    assert isinstance(ClassifierFreeGuidance(2.0), Guidance) and isinstance(Spy(), Guidance)


def test_without_a_rule_it_is_the_conditional_model() -> None:
    denoise = guided(None)
    assert torch.equal(denoise(X, SIGMA), MIXTURE.denoise(X, Level.flow(SIGMA), LABELS))
    assert denoise.evaluations == 1


def test_the_rule_sees_both_exact_predictions() -> None:
    spy = Spy(ClassifierFreeGuidance(3.0))
    found = guided(spy, count=7)(X, SIGMA)
    step, level = spy.steps[0], Level.flow(SIGMA)
    cond, uncond = MIXTURE.denoise(X, level, LABELS), MIXTURE.denoise(X, level)
    assert torch.equal(step.cond, cond) and torch.equal(step.uncond, uncond)
    assert torch.equal(found, uncond + 3.0 * (cond - uncond))
    assert (step.index, step.count, step.stage) == (0, 7, 0)
    assert float(step.level.ratio) == 1.0 and step.next_level is None


def test_steps_stages_and_trajectories() -> None:
    spy = Spy()
    denoise = guided(spy)
    for _ in range(2):
        denoise.begin(count=2)
        for _ in range(2):
            denoise.begin_step(next_sigma=torch.tensor(0.1))
            denoise(X, SIGMA)
            denoise(X, SIGMA)
    assert [(s.index, s.stage) for s in spy.steps] == [(0, 0), (0, 1), (1, 0), (1, 1)] * 2
    memories = [id(s.memory) for s in spy.steps]
    assert memories[0] == memories[3] != memories[4] == memories[7]
    assert float(spy.steps[0].next_level.sigma) == pytest.approx(0.1)


def test_momentum_is_forgotten_between_trajectories() -> None:
    denoise = guided(AdaptiveProjectedGuidance(4.0, radius=math.inf))

    def trajectory() -> list[Tensor]:
        denoise.begin()
        found = []
        for _ in range(3):
            denoise.begin_step()
            found.append(denoise(X, SIGMA))
        return found

    first, second = trajectory(), trajectory()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.allclose(first[0], first[1])  # same inputs, but momentum is at work


def test_predict_elsewhere_and_for_another_class() -> None:
    level = Level.flow(SIGMA)
    other = LABELS.flip(0)
    denoise = guided(Spy(lambda step: step.predict(step.x + 1, labels=other)))
    assert torch.equal(denoise(X, SIGMA), MIXTURE.denoise(X + 1, level, other))
    denoise = guided(Spy(lambda step: step.predict(branch="uncond")))
    assert torch.equal(denoise(X, SIGMA), MIXTURE.denoise(X, level))
    assert denoise.evaluations == 3


def test_weak_models() -> None:
    def weak(x: Tensor, sigma: Tensor, labels: object = None) -> Tensor:
        return x * 0 + 7

    denoise = guided(Spy(lambda step: step.weak()), weak=weak)
    assert torch.equal(denoise(X, SIGMA), torch.full_like(X, 7))
    given = guided(Spy(lambda step: step.weak(weak)))
    assert torch.equal(given(X, SIGMA), torch.full_like(X, 7))
    with pytest.raises(MissingPrediction, match="no weak model; pass weak="):
        guided(Spy(lambda step: step.weak()))(X, SIGMA)


def test_the_same_step_at_another_sample() -> None:
    """Whatever is asked of it is asked there."""

    def weak(x: Tensor, sigma: Tensor, labels: object = None) -> Tensor:
        return 0.5 * x

    def look(step: Step) -> Tensor:
        there = step.at(step.x + 1)
        assert torch.equal(there.x, X + 1) and torch.equal(step.x, X) and step.moved is None
        for branch, given in (("cond", LABELS), ("uncond", None)):
            want = MIXTURE.denoise(X + 1, step.level, given)
            assert torch.equal(getattr(there, branch), want)
            assert torch.equal(there.predict(branch=branch), want)
        assert torch.equal(there.weak(), (X + 1) / 2) and torch.equal(step.weak(), X / 2)
        assert torch.equal(there.predict(X), step.cond) and torch.equal(there.weak(x=X), X / 2)
        return there.cond

    guided(Spy(look), weak=weak)(X, SIGMA)
    alone = GuidedDenoiser(Spy(lambda step: step.at(step.x).cond), MIXTURE.denoiser())
    assert torch.equal(alone(X, SIGMA), MIXTURE.denoise(X, Level.ve(SIGMA)))


def test_arguments_of_the_call() -> None:
    denoise = guided(Spy(lambda step: step.cond + step.argument("labels")[:, None]))
    expected = MIXTURE.denoise(X, Level.flow(SIGMA), LABELS) + LABELS[:, None]
    assert torch.equal(denoise(X, SIGMA), expected)
    with pytest.raises(MissingPrediction, match=r"cond argument 'prompt'; it has \['labels'\]"):
        guided(Spy(lambda step: step.argument("prompt")))(X, SIGMA)


def test_a_moved_sample_is_told() -> None:
    def move(step: Step) -> Tensor:
        step.move(step.x * 2)
        return step.cond

    denoise = guided(Spy(move))
    assert denoise.moved is None
    denoise(X, SIGMA)
    assert torch.equal(denoise.moved, X * 2)
    with pytest.raises(ValueError, match=r"move: expected shape \(4, 2\), got \(3, 2\)"):
        guided(Spy(lambda step: step.move(step.x[1:])))(X, SIGMA)


def test_a_missing_branch_says_how_to_get_it() -> None:
    model = MIXTURE.denoiser()
    with pytest.raises(MissingPrediction, match="needs the unconditional prediction"):
        GuidedDenoiser(ClassifierFreeGuidance(2.0), model)(X, SIGMA)
    with pytest.raises(MissingPrediction, match="no unconditional model; pass uncond="):
        GuidedDenoiser(Spy(lambda s: s.predict(branch="uncond")), model)(X, SIGMA)


@pytest.mark.parametrize(
    "ask, text",
    [
        (lambda step: step.predict(), "use steer"),
        (lambda step: step.weak(), "no weak model"),
        (lambda step: step.argument("class_labels"), "'class_labels'"),
        (lambda step: step.need_uncond("MyRule"), "MyRule needs the unconditional prediction"),
    ],
)
def test_a_bare_step_says_what_it_cannot_do(ask, text: str) -> None:
    with pytest.raises(MissingPrediction, match=text):
        ask(Step(X, Level.ve(SIGMA), 0, 1, SIGMA, cond=X))
