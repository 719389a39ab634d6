"""Every error of steer() says what is wrong and what to do; what a pipeline hides is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pipelines import SCALE, SPECIAL, STEPS, build
from torch import Tensor

from diffsteer import AdaptiveProjectedGuidance, ClassifierFreeGuidance, Step, steer
from diffsteer.core import MissingPrediction
from diffsteer.pipelines.verify import fit_pair, fit_single, resolve

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CFG = ClassifierFreeGuidance(SCALE)


@pytest.mark.parametrize(
    "pipe", ["a path", None, 3, torch.nn.Linear(2, 2), object], ids=lambda p: type(p).__name__
)
def test_what_is_no_pipeline(pipe: Any) -> None:
    with pytest.raises(TypeError, match=r"takes a diffusers pipeline.*from_pretrained"):
        steer(pipe, CFG)


@pytest.mark.parametrize(
    "rule, text",
    [
        ("apg", "got the string 'apg'"),
        (AdaptiveProjectedGuidance, "the class AdaptiveProjectedGuidance"),
        (None, "a NoneType"),
        (7.5, "a float"),
    ],
)
def test_what_is_no_rule(rule: Any, text: str) -> None:
    with pytest.raises(TypeError, match=f"{text}.*") as caught:
        steer(build("dit").pipe, rule)
    assert "ClassifierFreeGuidance(scale=5.0)" in str(caught.value)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"weak": 3}, TypeError, "weak must be a module"),
        ({"weak": "transformer"}, FileNotFoundError, "weak: there is no model in the folder"),
        ({"weak": "skip:9"}, ValueError, "has no layer 9; it has 2 transformer blocks"),
        ({"negative": torch.ones(2)}, TypeError, "negative must be a dictionary"),
        ({"negative": {"prompt": 1}}, TypeError, "no argument prompt; it takes hidden_states"),
        ({"order": "both"}, ValueError, "order must be 'uc'"),
        ({"sign": 2}, ValueError, "sign must be 1, -1 or None, got 2"),
        ({"denoiser": "unet"}, TypeError, "denoiser must be a module"),
        ({"guidance_scale": 3}, TypeError, "unexpected keyword argument 'guidance_scale'"),
    ],
)
def test_wrong_options(options: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        steer(build("dit").pipe, CFG, **options)


def test_a_pipeline_is_no_weak_model() -> None:
    with pytest.raises(TypeError, match=r"weak_pipe\.transformer"):
        steer(build("dit").pipe, CFG, weak=build("dit").pipe)


HIDDEN = {
    "lumina": (ValueError, "guides three channels only"),
    "lumina2-normalised": (ValueError, "cfg_normalization=False"),
    "qwen": (ValueError, "rescales every token"),
    "sd-pag": (NotImplementedError, r"\(6, 4, 8, 8\).*PAG"),
    "sd-pix2pix": (NotImplementedError, "three predictions"),
    "sd-rescale": (ValueError, "guidance_rescale=0.0"),
    "sd3-skip-layer": (NotImplementedError, "skip-layer"),
}


def test_every_special_pipeline_is_listed() -> None:
    assert sorted(HIDDEN) == sorted(SPECIAL)


@pytest.mark.parametrize("name", SPECIAL)
def test_hidden_processing_is_found_and_named(name: str) -> None:
    error, text = HIDDEN[name]
    tiny = build(name)
    with pytest.raises(error, match=text), steer(tiny.pipe, CFG):
        tiny.call()


def test_hidden_rescaling_is_measured_too() -> None:
    """A pipeline that does not tell of its guidance_rescale is found out by the weights."""
    tiny = build("sd-rescale")

    class Silent(type(tiny.pipe)):  # type: ignore[misc]
        guidance_rescale = property(lambda self: _Quiet(self._guidance_rescale))

    class _Quiet(float):
        def __gt__(self, other: float) -> bool:  # asked by steer, and once by the pipeline
            import sys

            return False if "verify" in sys._getframe(1).f_code.co_filename else float(self) > other

    tiny.pipe.__class__ = Silent
    with pytest.raises(ValueError, match="weights must add up"), steer(tiny.pipe, CFG):
        tiny.call()


@pytest.mark.parametrize("name, order, sign", [("qwen", "cu", 1), ("lumina2-normalised", "cu", -1)])
def test_order_and_sign_together_let_the_rule_replace_it(name: str, order: str, sign: int) -> None:
    tiny = build(name)
    with steer(tiny.pipe, CFG, order=order, sign=sign) as run:
        replaced = tiny.call()
    assert torch.isfinite(replaced).all() and len(run.steps) == STEPS
    if name.startswith("lumina2"):  # the pipeline with its normalisation off is plain guidance
        assert torch.equal(replaced, tiny.call(cfg_normalization=False))


def test_a_wrong_word_on_order_or_sign() -> None:
    tiny = build("sd3")
    for options, text in (({"order": "cu"}, "leave order out"), ({"sign": -1}, "leave sign out")):
        with pytest.raises(ValueError, match=text), steer(tiny.pipe, CFG, **options):
            tiny.call()
    with steer(tiny.pipe, CFG, order="uc"):
        tiny.call()


@pytest.mark.parametrize("rule", [CFG, AdaptiveProjectedGuidance(SCALE)])
def test_guidance_that_is_off_says_how_to_turn_it_on(rule: Any) -> None:
    for name, argument in (("sd", "guidance_scale"), ("flux", "true_cfg_scale")):
        tiny = build(name)
        with pytest.raises(MissingPrediction, match=r"guidance_scale above 1.*negative="):
            with steer(tiny.pipe, rule):
                tiny.call(**{argument: 1.0})


def test_a_rule_that_returns_nonsense() -> None:
    tiny = build("dit")
    for result, error in ((None, TypeError), (torch.ones(1), ValueError)):
        with (
            pytest.raises(error, match="function returned"),
            steer(tiny.pipe, lambda _, r=result: r),
        ):
            tiny.call()


def test_evaluating_a_branch_that_does_not_exist() -> None:
    tiny = build("dit")
    with pytest.raises(ValueError, match="branch must be"):
        with steer(tiny.pipe, lambda step: step.predict(None, "negative")):
            tiny.call()
    with pytest.raises(ValueError, match="predict: expected shape"):
        with steer(tiny.pipe, lambda step: step.predict(step.x[:1])):
            tiny.call()
    with pytest.raises(MissingPrediction, match="no unconditional inputs"):
        with steer(tiny.pipe, lambda step: step.predict(None, "uncond")):
            tiny.call(guidance_scale=1.0)


def pair(gap: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 4, 16, 16, generator=generator)
    return first, first + gap * torch.randn(first.shape, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gap", [1.0, 0.05])
@pytest.mark.parametrize("weight", [1.5, 7.5, 30.0])
def test_the_fit_finds_weight_order_and_sign(dtype: torch.dtype, gap: float, weight: float) -> None:
    uncond, cond = (t.to(dtype) for t in pair(gap))
    guided = uncond + weight * (cond - uncond)
    fit = fit_pair(-guided, uncond, cond)
    assert fit.linear and fit.order == "uc" and fit.sign == -1
    assert fit.second_weight == pytest.approx(-weight, rel=0.02)
    assert fit_pair(guided, cond, uncond).order == "cu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        lambda guided, cond: guided * (cond.std() / guided.std()),
        lambda guided, cond: guided * (cond.norm(dim=1) / guided.norm(dim=1))[:, None],
        lambda guided, cond: torch.cat([guided[:, :3], cond[:, 3:]], dim=1),
        lambda guided, cond: guided.clamp(-3, 3),
    ],
    ids=["rescale", "renormalise", "three channels", "clamp"],
)
def test_the_fit_finds_what_is_not_linear(dtype: torch.dtype, change: Any) -> None:
    uncond, cond = (t.to(dtype) for t in pair())
    guided = change(uncond + 7.5 * (cond - uncond), cond).to(dtype)
    assert not fit_pair(guided, uncond, cond).linear


def test_predictions_that_are_alike_leave_the_order_to_convention() -> None:
    same = pair()[0]
    fit = fit_pair(-same, same, same)
    assert fit.linear and not fit.decided and fit.order is None and fit.sign == -1
    pipe = build("dit").pipe
    assert resolve(pipe, same, [same, same], 1, None, None) == ("cu", 1, False)
    zero = torch.zeros_like(same)
    assert resolve(pipe, zero, [zero, zero], 1, None, None)[2] is False


def test_a_weight_between_0_and_1_leaves_the_order_to_convention() -> None:
    """w * cond + (1 - w) * uncond and the same with w and 1 - w swapped look alike."""
    uncond, cond = pair()
    fit = fit_pair(0.3 * cond + 0.7 * uncond, uncond, cond)
    assert fit.linear and fit.order is None


def test_a_single_prediction_must_arrive_as_it_is() -> None:
    only = pair()[0]
    assert fit_single(-only, only).linear and fit_single(-only, only).sign == -1
    assert not fit_single(2 * only, only).linear


def test_verification_that_could_not_decide_is_tried_again() -> None:
    """cond == uncond at the first step only (a rule must still find the order later)."""
    tiny = build("dit")
    transformer, calls = tiny.pipe.transformer, []

    def alike(_: Any, __: Any, output: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            output.sample.copy_(output.sample[:2].repeat(2, 1, 1, 1))
        return output

    handle = transformer.register_forward_hook(alike)
    expected = tiny.call()
    calls.clear()
    with steer(tiny.pipe, CFG):
        assert torch.equal(tiny.call(), expected)
    handle.remove()


def test_a_rule_sees_raw_predictions_only_if_it_commutes() -> None:
    tiny = build("sd3")
    seen: dict[bool, Tensor] = {}

    class Look:
        def __init__(self, commutes: bool) -> None:
            self.commutes = commutes

        def __call__(self, step: Step) -> Tensor:
            seen.setdefault(self.commutes, step.cond)
            return step.cond

    for commutes in (True, False):
        with steer(tiny.pipe, Look(commutes)):
            start = tiny.inputs()
            tiny.call(**start)
    assert not torch.allclose(seen[True], seen[False], atol=0.1)
