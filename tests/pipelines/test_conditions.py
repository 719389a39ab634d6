"""GFCG over a closed set of prompts: tables of what each prompt becomes."""

from __future__ import annotations

import importlib

import pytest
import torch
from tiny_pipelines import build
from torch import Tensor

from diffsteer import steer
from diffsteer.guidance import GradientFreeClassifierGuidance
from diffsteer.pipelines import prompt_conditions

PROMPTS = ["a red fox in snow", "two blue birds", "a boat on a lake"]
TABLES = {
    "sd": {"encoder_hidden_states"},
    "sdxl": {"encoder_hidden_states", "added_cond_kwargs"},
    "sd3": {"encoder_hidden_states", "pooled_projections"},
    "flux": {"encoder_hidden_states", "pooled_projections"},
}


def settings(tiny: object) -> dict[str, object]:
    given = tiny.inputs()  # type: ignore[attr-defined]
    keep = ("height", "width", "max_sequence_length", "output_type")
    return {name: given[name] for name in keep if name in given}


@pytest.mark.parametrize("name", TABLES)
def test_asking_for_another_prompt_is_running_with_it(name: str) -> None:
    """With weight -1 the guided prediction is that of the reference prompt."""
    tiny = build(name)
    tables = prompt_conditions(tiny.pipe, PROMPTS, batch_size=2, **settings(tiny))
    assert tables.keys() == TABLES[name]
    assert tables["encoder_hidden_states"].shape[0] == 3

    class Other:
        def __call__(self, step) -> Tensor:  # type: ignore[no-untyped-def]
            rule = GradientFreeClassifierGuidance(
                lambda images: images.flatten(1)[:, :3], condition=tables,
                labels=torch.tensor([0, 1]),
            )  # fmt: skip
            wanted = rule._condition(step, torch.tensor([1, 2]))
            return step.predict(branch="cond", **wanted)

    with steer(tiny.pipe, Other()):
        asked = tiny.call(num_inference_steps=2)
    off = {tiny.guidance_argument: 1.0}
    told = tiny.call(num_inference_steps=2, prompt=PROMPTS[1:], **off)
    torch.testing.assert_close(asked, told, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(told, tiny.call(num_inference_steps=2, **off), rtol=1e-2)


def test_what_has_no_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for prompts in (["one"], "one", ["one", "one"]):
        with pytest.raises(ValueError, match="two classes or more, each once"):
            prompt_conditions(None, prompts)
    module = importlib.import_module("diffsteer.pipelines.conditions")
    # Z-Image gives its network lists of embeddings of any length, which have no rows.
    monkeypatch.setattr(module, "_first_call", lambda *_: {"cap_feats": [None, None]})
    with pytest.raises(ValueError, match="no table to make"):
        prompt_conditions(None, PROMPTS)
