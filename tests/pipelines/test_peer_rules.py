"""Rules that diffusers has too: the same pipeline under its own option, and steered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import LayerSkipConfig, guiders
from diffusers.hooks import HookRegistry
from diffusers.hooks.layer_skip import _apply_layer_skip_hook
from diffusers.models.attention_processor import Attention
from tiny_pipelines import SCALE, STEPS, build
from torch import Tensor, nn

from diffsteer import steer
from diffsteer.guidance import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    DegradedPassGuidance,
    GuidanceInterval,
    RescaledGuidance,
)
from diffsteer.pipelines import RuleGuider, degraded, install_guider
from diffsteer.pipelines.perturbed import perturbed

CFG = ClassifierFreeGuidance(SCALE)


def gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


class Denoised:
    """The same rule, handed denoised predictions."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule

    def __call__(self, step: Any) -> Tensor:
        return self.rule(step)


@pytest.mark.parametrize("name", ["sd", "sdxl", "ltx"])  # noise (VP), noise (sigmas), velocity
def test_rescale_is_that_of_the_pipelines(name: str) -> None:
    tiny, rule = build(name), RescaledGuidance(CFG, 0.7)
    theirs, plain = tiny.call(guidance_rescale=0.7), tiny.call()
    for given in (rule, Denoised(rule)):
        with steer(tiny.pipe, given):
            assert gap(tiny.call(), theirs) < 2e-6 < 1e-2 < gap(plain, theirs)
    with steer(tiny.pipe, RescaledGuidance(CFG, 0.7, space="denoised")):
        assert gap(tiny.call(), theirs) > 1e-2  # another method


def test_skip_layer_guidance_is_that_of_sd3() -> None:
    tiny, steps = build("sd3"), {"num_inference_steps": 6}
    window = {"skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.7}
    theirs = tiny.call(skip_guidance_layers=[0], **window, **steps)
    with steer(tiny.pipe, DegradedPassGuidance(CFG, start=0.1, stop=0.7), weak="skip:0") as run:
        ours = tiny.call(**steps)
    assert gap(ours, theirs) < 1e-5 < 1e-1 < gap(tiny.call(**steps), theirs)
    assert [record.evaluations for record in run.steps] == [1, 2, 2, 2, 2, 1]


def test_perturbed_attention_guidance_is_that_of_stable_diffusion() -> None:
    """Bit for bit: the pipeline's attention processors and ours give a token its own value."""
    theirs = build("sd-pag").call(pag_scale=3.0)
    tiny = build("sd")
    with steer(tiny.pipe, DegradedPassGuidance(CFG, 3.0, 0.0, 1.0), weak="perturb:mid_block"):
        ours = tiny.call()
    assert gap(ours, theirs) < 1e-6 < 1e-2 < gap(tiny.call(), theirs)


def with_guider(name: str, guider: Any) -> Tensor:
    tiny = build(name)
    tiny.pipe.update_components(guider=guider)
    return tiny.call()


@pytest.mark.parametrize("name", ["modular-sd3", "modular-wan-euler"])
@pytest.mark.parametrize(
    "guider, rule",
    [
        (guiders.ClassifierFreeGuidance(SCALE, 0.7), RescaledGuidance(CFG, 0.7)),
        (guiders.ClassifierFreeZeroStarGuidance(SCALE), ClassifierFreeZeroStarGuidance(SCALE)),
        (
            guiders.ClassifierFreeZeroStarGuidance(SCALE, 0),
            ClassifierFreeZeroStarGuidance(SCALE, 0),
        ),
    ],
    ids=["rescale", "zero-star", "zero-star without zero steps"],
)
def test_is_the_guider_of_diffusers(name: str, guider: Any, rule: Any) -> None:
    tiny = build(name)
    plain = tiny.call()
    with steer(tiny.pipe, rule):
        ours = tiny.call()
    theirs = with_guider(name, guider)
    assert gap(ours, theirs) < 5e-6 < 1e-2 < gap(plain, theirs)


def test_skip_layer_guider_of_diffusers_on_wan() -> None:
    config = LayerSkipConfig([0], fqn="blocks")
    theirs = with_guider(
        "modular-wan-euler",
        guiders.SkipLayerGuidance(SCALE, 2.8, 0.0, 1.0, skip_layer_config=config),
    )
    tiny = build("modular-wan-euler")
    rule = DegradedPassGuidance(CFG, 2.8, 1 / STEPS, 1.0)  # the guider leaves out the first step
    with steer(tiny.pipe, rule, weak="skip:0"):
        assert gap(tiny.call(), theirs) < 1e-6


def outputs(tiny: Any, *functions: Any) -> list[Tensor]:
    """What the functions make of the first call of the pipeline's denoiser."""
    module, calls = getattr(tiny.pipe, tiny.denoisers[0]), []
    handle = module.register_forward_hook(
        lambda _, args, kwargs, __: calls.append((args, kwargs)), with_kwargs=True
    )
    tiny.call(num_inference_steps=1)
    handle.remove()
    args, kwargs = calls[0]
    with torch.no_grad():
        return [function(*args, **{**kwargs, "return_dict": False})[0] for function in functions]


class Hooked:
    """A denoiser under the layer-skip hook of diffusers."""

    def __init__(self, module: nn.Module, blocks: str, **settings: bool) -> None:
        self.module, self.settings, self.blocks = module, settings, blocks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        config = LayerSkipConfig([0], fqn=self.blocks, **self.settings)
        _apply_layer_skip_hook(self.module, config, name="peer")
        try:
            return self.module(*args, **kwargs)
        finally:
            HookRegistry.check_if_exists_or_initialize(self.module).remove_hook(
                "peer", recurse=True
            )


ATTENTION = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}


@pytest.mark.parametrize(
    "name, kind, blocks",
    [
        ("wan", "skip", "blocks"),
        ("ltx", "skip", "transformer_blocks"),
        ("cogview4", "skip", "transformer_blocks"),  # its blocks return (image, text)
        ("cogview4", "perturb", "transformer_blocks"),
        ("pixart", "perturb", "transformer_blocks"),
    ],
)
def test_a_degraded_pass_is_that_of_the_hooks_of_diffusers(
    name: str, kind: str, blocks: str
) -> None:
    tiny = build(name)
    module = getattr(tiny.pipe, tiny.denoisers[0])
    theirs = Hooked(module, blocks, **(ATTENTION if kind == "perturb" else {}))
    ours, peer, whole = outputs(tiny, degraded(module, **{kind: [0]}), theirs, module)
    assert torch.equal(ours, peer) and not torch.allclose(ours, whole, rtol=1e-2)


@pytest.mark.parametrize("name, layer", [("flux", 0), ("flux", 1), ("sd3", 1), ("lumina2", 0)])
def test_a_perturbed_token_sees_no_other(name: str, layer: int) -> None:
    """The perturbed layer maps every image token by itself: a change of one changes it alone."""
    module = build(name).pipe.transformer
    lists = ("transformer_blocks", "single_transformer_blocks", "layers")
    blocks = [block for part in lists for block in getattr(module, part, ())]
    seen: list[Tensor] = []

    def change_one(_: Any, args: Any, kwargs: Any) -> Any:
        changed = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        changed = changed.clone()
        changed[:, 3] += 1.0
        return (
            ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})
        )

    def keep(_: Any, __: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[-1])

    tiny = build(name)
    for function in (degraded(module, perturb=[layer]), module):
        for change in (False, True):
            block = blocks[layer]
            handles = [block.register_forward_hook(keep)]
            if change:
                handles.append(block.register_forward_pre_hook(change_one, with_kwargs=True))
            outputs(tiny, function)
            for handle in handles:
                handle.remove()
    touched, everywhere = ((a - b).abs().amax((0, 2)) > 0 for a, b in (seen[:2], seen[2:]))
    assert touched.nonzero().flatten().tolist() == [3] and everywhere.sum() > 3


def test_cross_attention_stays_also_where_it_has_as_many_keys() -> None:
    attention = Attention(query_dim=8, heads=2, dim_head=4).requires_grad_(False)
    image, text = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(0))
    with perturbed({"attention": attention}):
        beyond, own = attention(image, text), attention(image)
    assert torch.equal(beyond, attention(image, text))
    torch.testing.assert_close(own, attention.to_out[0](attention.to_v(image)))
    with pytest.raises(ValueError, match="no attention in attention went through"):
        with perturbed({"attention": attention}):
            attention(image, text)


def hooks(tiny: Any) -> int:
    modules = tiny.pipe.transformer.modules()
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules)


def test_no_hook_is_left_and_nothing_is_perturbed_in_silence() -> None:
    tiny = build("sana")  # linear attention
    before = hooks(tiny)
    rule = DegradedPassGuidance(CFG, 2.0, 0.0, 1.0)
    with pytest.raises(
        ValueError, match=r"perturb: no attention in transformer_blocks\.0 went thr"
    ):
        with steer(tiny.pipe, rule, weak="perturb:0"):
            tiny.call()
    assert hooks(tiny) == before
    with pytest.raises(ValueError, match="perturb: there is no self-attention in proj_out"):
        degraded(tiny.pipe.transformer, perturb=["proj_out"])


def test_a_rule_for_each_expert_of_wan() -> None:
    """``guidance_scale`` and ``guidance_scale_2`` of the pipeline, to the bit."""
    tiny = build("wan2.2")
    boundary = tiny.pipe.config.boundary_ratio
    theirs = tiny.call(guidance_scale_2=2.0)
    low = ClassifierFreeGuidance(2.0)
    with steer(tiny.pipe, GuidanceInterval.two_experts(CFG, low, boundary)):
        assert torch.equal(tiny.call(), theirs)
    one = tiny.call()
    with steer(tiny.pipe, CFG):  # a single rule takes the place of both scales
        assert torch.equal(tiny.call(guidance_scale_2=2.0), one)
    assert gap(one, theirs) > 1e-2


@pytest.mark.parametrize("kind", ["skip", "perturb"])
def test_a_degraded_pass_is_of_the_expert_that_predicts(kind: str) -> None:
    tiny = build("wan2.2")
    with steer(tiny.pipe, AutoGuidance(2.0), weak=f"{kind}:0") as run:
        ours = tiny.call(guidance_scale=1.0)
    own = [degraded(m, **{kind: [0]}) for m in (tiny.pipe.transformer, tiny.pipe.transformer_2)]
    rules = [AutoGuidance(2.0, model=model) for model in own]
    boundary = tiny.pipe.config.boundary_ratio
    with steer(tiny.pipe, GuidanceInterval.two_experts(*rules, boundary)):
        assert torch.equal(tiny.call(guidance_scale=1.0), ours)
    assert len({record.sigma >= boundary for record in run.steps}) == 2
    stranger = build("wan2.2").pipe.transformer  # no network of this pipeline: it stays
    with steer(tiny.pipe, AutoGuidance(2.0), weak=degraded(stranger, **{kind: [0]})):
        assert gap(tiny.call(guidance_scale=1.0), ours) > 1e-2


def test_two_rules_as_a_guider() -> None:
    rule = GuidanceInterval.flow(AdaptiveProjectedGuidance(6.0), low=0.7, outside=CFG)
    tiny = build("modular-sd3")
    with steer(tiny.pipe, rule) as run:
        steered = tiny.call()
    assert len({record.sigma > 0.7 for record in run.steps}) == 2
    install_guider(tiny.pipe, RuleGuider(RuleGuider(rule).config["rule"]))  # by way of plain values
    assert gap(tiny.call(), steered) < 1e-5
    install_guider(tiny.pipe, RuleGuider(CFG))
    assert gap(tiny.call(), steered) > 1e-2
