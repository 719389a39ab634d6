"""Weak models: a module, a folder, a degraded pass of the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import build
from torch import Tensor, nn

from diffsteer import AutoGuidance, steer
from diffsteer.pipelines import degraded, generate_images, load_weak, plan_images


def steered(tiny: Any, weak: Any) -> Tensor:
    with steer(tiny.pipe, AutoGuidance(2.5), weak=weak):
        return tiny.call(num_inference_steps=2)


def test_a_folder_is_the_model_that_was_saved_there(tmp_path: Path) -> None:
    tiny, other = build("sd3"), build("sd3").pipe.transformer
    for weight in other.parameters():
        weight.mul_(0.95)
    other.save_pretrained(tmp_path / "weak")
    by_module = steered(tiny, other)
    assert torch.equal(steered(tiny, tmp_path / "weak"), by_module)
    assert torch.equal(steered(tiny, str(tmp_path / "weak")), by_module)


@pytest.mark.parametrize(
    "name, layer",
    [("dit", 1), ("sd3", 1), ("flux", 0), ("flux", -1), ("sana", 0), ("sd", "mid_block")],
)
def test_a_degraded_pass_is_the_model_without_the_layer(name: str, layer: Any) -> None:
    tiny = build(name)
    module = getattr(tiny.pipe, tiny.denoisers[0])
    calls: list[tuple[Any, Any]] = []
    handle = module.register_forward_hook(
        lambda _, args, kwargs, __: calls.append((args, kwargs)), with_kwargs=True
    )
    tiny.call(num_inference_steps=1)
    handle.remove()
    args, kwargs = calls[0]
    weak = degraded(module, skip=[layer])
    with torch.no_grad():
        less, whole = (f(*args, **{**kwargs, "return_dict": False})[0] for f in (weak, module))
        assert less.shape == whole.shape and not torch.allclose(less, whole, rtol=1e-3)
        again = module(*args, **{**kwargs, "return_dict": False})[0]
    assert torch.equal(again, whole), "the model itself is as it was"
    if isinstance(layer, int):  # the textbook way: take the block out of the list
        lists = [
            n for n in ("transformer_blocks", "single_transformer_blocks") if hasattr(module, n)
        ]
        blocks = [(n, i) for n in lists for i in range(len(getattr(module, n)))]
        where, index = blocks[layer]
        kept = [b for i, b in enumerate(getattr(module, where)) if i != index]
        setattr(module, where, nn.ModuleList(kept))
        with torch.no_grad():
            without = module(*args, **{**kwargs, "return_dict": False})[0]
        torch.testing.assert_close(less, without)


@pytest.mark.parametrize("how, kind", [("in place", "skip"), ("blocks", "perturb")])
def test_a_degraded_pass_of_a_compiled_model_is_degraded(how: str, kind: str) -> None:
    """What was compiled without our hooks would not call them."""
    plain, tiny = steered(build("flux"), f"{kind}:0"), build("flux")
    transformer = tiny.pipe.transformer
    if how == "in place":
        transformer.compile(backend="eager")
    else:
        transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(steered(tiny, f"{kind}:0"), plain)


def test_the_three_ways_from_a_word(tmp_path: Path) -> None:
    tiny = build("sd3")
    assert torch.equal(
        steered(tiny, "skip:0"), steered(tiny, degraded(tiny.pipe.transformer, skip=[0]))
    )
    assert load_weak("skip:0,1", tiny.pipe).id == (
        "SD3Transformer2DModel without transformer_blocks.0, transformer_blocks.1"
    )


@pytest.mark.parametrize(
    "skip, words",
    [([], "names no layer"), ([7], "no layer 7"), (["nowhere"], "no layer 'nowhere'")],
)
def test_layers_that_are_not_there(skip: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        degraded(build("sd3").pipe.transformer, skip=skip)
    with pytest.raises(TypeError, match="torch module"):
        degraded("transformer", skip=skip)  # type: ignore[arg-type]


def test_a_layer_that_changes_shapes_cannot_be_passed_over() -> None:
    tiny = build("sd")
    with pytest.raises(ValueError, match="cannot be passed over"):
        steered(tiny, degraded(tiny.pipe.unet, skip=["down_blocks.0"]))


@pytest.mark.parametrize("other", ["flux", "sd"])
def test_a_weak_model_of_another_shape_is_named(other: str) -> None:
    tiny, stranger = build("sd3"), build(other)
    weak = getattr(stranger.pipe, stranger.denoisers[0])
    with pytest.raises(ValueError, match=rf"weak model \({type(weak).__name__}\) does not fit"):
        steered(tiny, weak)


def test_images_under_autoguidance_waste_no_evaluation(tmp_path: Path) -> None:
    from diffsteer import load_embedded
    from diffsteer.pipelines import load_embedded_weak

    pipe, weak = load_embedded(), load_embedded_weak()
    rows: list[int] = []
    pipe.transformer.register_forward_hook(lambda _, args, kwargs, out: rows.append(len(out[0])),
                                           with_kwargs=True)  # fmt: skip
    generate_images(
        pipe, plan_images([0, 1], pipe=pipe, classes=[3]), tmp_path / "out",
        rule=AutoGuidance(2.0), weak=weak, steps=2,
    )  # fmt: skip
    assert rows == [2, 2], "the conditional branch alone"
