"""What a rule may ask of the model inside a step: again, elsewhere, another model, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_pipelines import FAMILIES, SCALE, WITH_GUIDER, build
from torch import Tensor

from diffsteer import ClassifierFreeGuidance, Step, steer
from diffsteer.core import MissingPrediction

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

GUIDERS = [name for name in WITH_GUIDER if "qwen" not in name]


class Rule:
    """A rule out of a function; ``raw`` says that it takes raw outputs."""

    def __init__(self, function: Callable[[Step], Tensor], raw: bool = False) -> None:
        self.function, self.commutes = function, raw

    def __call__(self, step: Step) -> Tensor:
        return self.function(step)


@pytest.mark.parametrize("name", [*FAMILIES, *GUIDERS])
def test_evaluating_again_gives_the_same(name: str) -> None:
    """At the recorded inputs, and at rebuilt ones: doubled, scaled, with what was appended."""
    tiny = build(name)
    gaps: list[float] = []

    def look(step: Step) -> Tensor:
        for branch, known in (("cond", step.cond), ("uncond", step.uncond)):
            if step.index in (0, 2):
                gaps.append(float((step.predict(None, branch) - known).abs().max()))
                gaps.append(float((step.predict(step.x.clone(), branch) - known).abs().max()))
        return step.uncond + SCALE * (step.cond - step.uncond)

    expected = tiny.call() if name != "z-image" else None
    with steer(tiny.pipe, Rule(look, raw=True)) as run:
        steered = tiny.call()
    assert gaps and max(gaps) == 0.0
    assert expected is None or torch.equal(steered, expected)
    assert run.evaluations > len(run.steps)


def test_both_branches_of_a_doubled_batch_cost_one_evaluation() -> None:
    tiny = build("sd3")

    def look(step: Step) -> Tensor:
        x = step.x + 0.1
        uncond, cond = step.predict(x, "uncond"), step.predict(x, "cond")
        assert not torch.equal(uncond, cond) and not torch.equal(cond, step.cond)
        x += 0.1  # another sample in the same storage must not be answered from memory
        assert not torch.equal(step.predict(x, "cond"), cond)
        return step.cond

    with steer(tiny.pipe, Rule(look)) as run:
        tiny.call()
    assert [step.evaluations for step in run.steps] == [3] * len(run.steps)


def test_predict_elsewhere_is_the_model_there() -> None:
    """Against a run that starts at the other sample."""
    tiny = build("sd")
    shape = (2, 4, 8, 8)
    start, other = torch.randn(shape), torch.randn(shape)
    seen: dict[str, Tensor] = {}

    def ask(step: Step) -> Tensor:
        seen.setdefault("asked", step.predict(other, "cond"))
        return step.cond

    def note(step: Step) -> Tensor:
        seen.setdefault("told", step.cond)
        return step.cond

    with steer(tiny.pipe, Rule(ask)):
        tiny.call(latents=start)
    with steer(tiny.pipe, Rule(note)):
        tiny.call(latents=other)
    torch.testing.assert_close(seen["asked"], seen["told"], rtol=1e-5, atol=1e-5)


def test_overrides_replace_inputs_of_one_branch() -> None:
    tiny = build("dit")
    pairs: list[tuple[Tensor, Tensor]] = []

    def look(step: Step) -> Tensor:
        null = torch.tensor([tiny.pipe.transformer.config.num_embeds_ada_norm] * 2)
        pairs.append((step.predict(None, "cond", class_labels=null), step.uncond))
        pairs.append((step.predict(None, "uncond", class_labels=null), step.uncond))
        other = [
            step.predict(None, b, class_labels=torch.tensor([3, 4])) for b in ("cond", "uncond")
        ]
        assert not torch.allclose(other[0], step.uncond)
        pairs.append((other[0], other[1]))
        with pytest.raises(TypeError, match="no argument 'labels'"):
            step.predict(None, "cond", labels=null)
        return step.cond

    with steer(tiny.pipe, Rule(look)):
        tiny.call()
    for asked, known in pairs:
        torch.testing.assert_close(asked, known, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "z-image"])
def test_a_moved_sample_is_what_the_solver_steps_from(name: str) -> None:
    """The rule's denoised sample is meant at the moved one; the last step lands on it."""
    tiny = build(name)
    targets: list[Tensor] = []

    def shift(step: Step) -> Tensor:
        step.move(step.x + 0.25)
        targets.append(torch.full_like(step.x, 0.5))
        return targets[-1]

    with steer(tiny.pipe, Rule(shift), keep=True) as run:
        final = tiny.call()
    for record in run.steps:
        assert record.step is not None and record.step.moved is not None
        torch.testing.assert_close(record.denoised, torch.full_like(record.denoised, 0.5))
    torch.testing.assert_close(final, torch.full_like(final, 0.5), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("name", ["dit", "sd3", "flux"])
def test_a_weak_model_sees_the_recorded_inputs(name: str, raw: bool) -> None:
    tiny = build(name)
    itself = getattr(tiny.pipe, tiny.denoisers[0])
    calls: list[int] = []

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return itself(*args, **kwargs)

    def look(step: Step) -> Tensor:
        for known, branch in ((step.cond, "cond"), (step.uncond, "uncond")):
            assert torch.equal(step.weak(branch=branch), known)
            assert torch.equal(step.weak(itself, branch=branch), known)
            other = 0.9 * step.x
            assert torch.equal(step.weak(itself, branch, x=other), step.predict(other, branch))
        return step.cond

    with steer(tiny.pipe, Rule(look, raw), weak=function) as run:
        tiny.call()
    assert len(calls) == 2 * len(run.steps)


def test_autoguidance_with_another_network() -> None:
    tiny, weak = build("sd3"), build("sd3").pipe.transformer
    for weight in weak.parameters():
        weight.mul_(0.9)
    rule = Rule(lambda step: step.weak() + 2 * (step.cond - step.weak()), raw=True)
    with steer(tiny.pipe, rule, weak=weak) as run:
        guided = tiny.call()
    plain = tiny.call(guidance_scale=1.0)
    assert torch.isfinite(guided).all() and not torch.allclose(guided, plain, rtol=0.01)
    assert run.steps[0].evaluations == 3
    with pytest.raises(MissingPrediction, match="no weak model"), steer(tiny.pipe, rule):
        tiny.call()


def test_negative_inputs_add_true_guidance_to_flux_bit_exactly() -> None:
    tiny = build("flux")
    last: dict[str, Tensor] = {}
    handle = tiny.pipe.transformer.register_forward_hook(
        lambda _, __, kwargs, ___: last.update(kwargs), with_kwargs=True
    )
    expected = tiny.call()  # native true guidance: the negative call comes last
    handle.remove()
    negative = {k: last[k] for k in ("encoder_hidden_states", "pooled_projections")}
    embedded = {"negative_prompt": None, "negative_prompt_2": None}
    rule = ClassifierFreeGuidance(SCALE)
    with steer(tiny.pipe, rule, negative=negative) as run:
        assert torch.equal(tiny.call(**embedded), expected)
    assert run.steps[0].evaluations == 2
    with steer(tiny.pipe, rule, negative={k: v[:1].clone() for k, v in negative.items()}):
        repeated = tiny.call(**embedded)
    assert repeated.shape == expected.shape and torch.equal(repeated[:1], expected[:1])
    with pytest.raises(ValueError, match="makes one already"):
        with steer(tiny.pipe, rule, negative=negative):
            tiny.call()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_gradients_through_the_denoiser(name: str, inference: bool) -> None:
    tiny = build(name)
    gradients: list[Tensor] = []

    def look(step: Step) -> Tensor:
        with torch.enable_grad():
            x = step.x.detach().requires_grad_()
            error = step.predict(x, "cond").square().sum()
            (gradient,) = torch.autograd.grad(error, x)
        gradients.append(gradient)
        return step.cond - 0.01 * gradient / gradient.norm()

    with torch.inference_mode(inference), steer(tiny.pipe, Rule(look)):
        guided = tiny.call()
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)
    if inference:
        with steer(tiny.pipe, Rule(look)):
            assert torch.equal(guided, tiny.call())


def test_a_gradient_is_the_slope() -> None:
    tiny = build("sd3")

    def look(step: Step) -> Tensor:
        if step.index == 1:
            direction = torch.randn_like(step.x)
            with torch.enable_grad():
                x = step.x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(step.predict(x, "cond").sum(), x)
            low, high = (step.predict(step.x + h * direction).sum() for h in (-2e-3, 2e-3))
            slope = float((high - low) / 4e-3)
            assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.02, abs=0.5)
        return step.cond

    with steer(tiny.pipe, Rule(look)):
        tiny.call()
