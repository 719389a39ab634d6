"""The script that fine-tunes by evolution strategies: one command, and again where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts_main import run
from tiny_flow import tiny_pipeline
from tiny_pipelines import build

SMALL = (
    *("--steps", 2, "--population-size", 4, "--prompts-per-step", 2, "--sample-steps", 1),
    *("--eval-images", 2, "--preview-images", 2, "--checkpoint-every", 1, "--eval-every", 1),
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_one_command_leaves_a_model_a_picture_and_curves(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = ("--model", model, "--out", out, "--reward", "brightness", "--device", "cpu", *SMALL)
    assert run("finetune_eggroll", *flags, "--held-out", "jpeg", "--save-lora-rank", 2) == 0
    printed = capsys.readouterr().out
    assert "after 2 generations" in printed and "LoRA of rank 2" in printed
    for name in ("model/model_index.json", "grid.png", "curves.png", "fitness_log.jsonl",
                 "lora/pytorch_lora_weights.safetensors"):  # fmt: skip
        assert (out / name).exists(), name
    assert "held_out/jpeg" in json.loads((out / "eval.jsonl").read_text().splitlines()[-1])
    more = (*flags, "--held-out", "jpeg", "--steps", 3)
    assert run("finetune_eggroll", *more) == 0
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [part["from_generation"] for part in history] == [0, 2]
    assert run("finetune_eggroll", *flags, "--sigma", 0.5) == 2
    assert "started with sigma=0.003, now it is 0.5" in capsys.readouterr().err


def test_a_pipeline_of_prompts_needs_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("sd3").pipe.save_pretrained(tmp_path / "sd3")
    flags = ("--model", tmp_path / "sd3", "--out", tmp_path / "run", "--device", "cpu", *SMALL)
    assert run("finetune_eggroll", *flags, "--reward", "brightness") == 2
    assert "takes prompts: give --prompts FILE" in capsys.readouterr().err
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\na car\n")
    call = ("--call", '{"height": 16, "width": 16, "max_sequence_length": 16}')
    flags = (*flags, "--prompts", prompts, "--reward", "brightness", *call, "--steps", 1)
    assert run("finetune_eggroll", *flags) == 0
    assert (tmp_path / "run" / "model" / "model_index.json").exists()
    assert run("finetune_eggroll", *flags, "--config", tmp_path / "no.yaml") == 2
