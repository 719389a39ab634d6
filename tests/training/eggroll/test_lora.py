"""The result of a run as a LoRA: the best one of its rank, and one that diffusers reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from eggroll_runs import trainer
from torch import nn

from diffsteer.pipelines import load_pipeline
from diffsteer.training.eggroll import low_rank, save_lora, save_result


def test_a_lora_is_the_truncated_svd_and_says_what_it_holds() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(9, 6))[0], torch.linalg.qr(torch.randn(7, 6))[0]
    sizes = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.1])
    change = basis[0] * sizes @ basis[1].T
    found = low_rank({"a.weight": change, "still.weight": torch.zeros(3, 3)}, 2)
    assert set(found.state) == {"a.lora_A.weight", "a.lora_B.weight"}
    product = found.state["a.lora_B.weight"] @ found.state["a.lora_A.weight"]
    lost = float((change - product).square().sum())
    assert lost == pytest.approx(float(sizes[2:].square().sum()), rel=1e-5)  # Eckart-Young
    assert found.energy == pytest.approx(25 / float(sizes.square().sum()))
    whole = low_rank({"a.weight": change}, 100)
    torch.testing.assert_close(
        whole.state["a.lora_B.weight"] @ whole.state["a.lora_A.weight"], change
    )
    assert whole.energy == pytest.approx(1.0)


def test_the_factors_of_a_convolution_are_convolutions() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False)
    found = low_rank({"c.weight": layer.weight}, 5)
    down, up = found.state["c.lora_A.weight"], found.state["c.lora_B.weight"]
    assert down.shape == (5, 3, 3, 3) and up.shape == (5, 5, 1, 1)
    x = torch.randn(2, 3, 8, 8)
    inner = nn.functional.conv2d(x, down, stride=2, padding=1)
    torch.testing.assert_close(nn.functional.conv2d(inner, up), layer(x), rtol=1e-4, atol=1e-5)


def test_what_no_lora_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a\.bias changed as well"):
        low_rank({"a.bias": torch.ones(3)}, 1)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        low_rank({}, 0)


def test_a_run_saves_a_pipeline_and_a_lora_that_load(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    assert peft
    from tiny_pipelines import build

    from diffsteer.training.prompts import Prompt

    tiny, fresh = build("sd3"), build("sd3")
    wanted = ("height", "width", "max_sequence_length")
    run = trainer(
        tmp_path, pipe=tiny.pipe, prompts=[Prompt("a fox")], steps=2, population_size=4, sigma=0.1,
        member_batch_size=4, call={k: v for k, v in tiny.inputs().items() if k in wanted},
    )  # fmt: skip
    before = tiny.call()
    run.run()
    after = tiny.call()
    assert not torch.allclose(before, after, atol=1e-2)
    found = low_rank(run.eggroll.offsets.parameters, 64)  # no matrix is larger
    save_lora(tmp_path / "lora", found)
    fresh.pipe.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(fresh.call(), after, rtol=1e-3, atol=1e-3)


def test_the_result_folder_is_a_pipeline(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=1)
    run.run()
    found = save_result(run.pipe, run.eggroll, tmp_path, component="transformer", lora_rank=2)
    assert found is not None and 0 < found.energy < 1
    assert json.loads((tmp_path / "lora" / "energy.json").read_text())["energy"] == found.energy
    again = load_pipeline(tmp_path / "model")
    call = {"seeds": [3], "output_type": "pt", "num_inference_steps": 2}
    torch.testing.assert_close(again("cat", **call).images, run.pipe("cat", **call).images)
