"""scripts/finetune_acflow.py from a model folder to a LoRA or a pipeline, and its errors."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
import scripts_main
import torch
from PIL import Image
from tiny_flow import tiny_pipeline
from tiny_pipelines import build

from diffsteer.pipelines import load_pipeline
from diffsteer.training.acflow import ACFlowConfig
from diffsteer.training.acflow.plan import check_split

PACE = (
    "--epochs 2 --prompts-per-epoch 2 --images-per-prompt 2 --sample-steps 2 --eval-steps 2 "
    "--eval-images 4 --warmup-min 1 --warmup-max 1 --ramp 0 --precision fp32 --rank 2 "
    "--critic-width 4"
).split()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "classes"
    tiny_pipeline("denoised").save_pretrained(folder)
    return folder


def finetune(*options: object) -> int:
    return scripts_main.run("finetune_acflow", *PACE, *options)


@pytest.fixture(scope="module", params=["sd3", "flux"])
def text_model(request, tmp_path_factory) -> Path:
    tiny = build(request.param)
    tiny.pipe.vae.register_to_config(shift_factor=0.1)
    folder = tmp_path_factory.mktemp("models") / request.param
    tiny.pipe.save_pretrained(folder)
    return folder


def test_a_text_to_image_folder_from_end_to_end(text_model, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox in snow\ntwo blue birds\n")
    call = json.dumps({"height": 16, "width": 16, "max_sequence_length": 16})
    options = [
        "--model",
        text_model,
        "--prompts",
        prompts,
        "--call",
        call,
        "--out",
        tmp_path / "run",
    ]
    assert finetune(*options, "--reward", "brightness", "--held-out", "jpeg") == 0
    out = tmp_path / "run"
    pipe = load_pipeline(text_model)
    pipe.load_lora_weights(out / "lora")
    assert (out / "before_after.png").is_file() and (out / "curves.png").is_file()
    judged = json.loads((out / "metrics.json").read_text())["judged"]
    assert [row["epoch"] for row in judged] == [0, 2]
    assert "held_out/jpeg" in judged[-1] and "reward/brightness" in judged[-1]
    assert "reward/brightness" in capsys.readouterr().out


def test_a_class_model_with_a_config_file_goes_on_where_it_was(model, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("learning_rate: 1e-3\ntune: full\nalpha: 2\n")
    options = ["--model", model, "--out", tmp_path / "run", "--reward", "brightness@2", "jpeg@-1"]
    options += ["--config", config, "--classes", "cat,dog"]
    assert finetune(*options, "--metrics") == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["learning_rate"], saved["tune"], saved["alpha"]) == (1e-3, "full", 2.0)
    found = load_pipeline(tmp_path / "run" / "model")
    images = found(["cat"], seeds=[1], num_inference_steps=2, output_type="pt").images
    assert bool(torch.isfinite(images).all())
    first = (tmp_path / "run" / "log.jsonl").read_text()
    assert finetune(*options, "--metrics") == 0  # nothing is left to do
    assert (tmp_path / "run" / "log.jsonl").read_text() == first
    with Image.open(tmp_path / "run" / "before_after.png") as grid:
        assert grid.width > grid.height / 2


def test_grpo_and_the_special_cases_are_named(model, tmp_path):
    options = ["--model", model, "--reward", "brightness", "--metrics", "--eval-images", 0]
    grpo = ["--method", "grpo", "--sample-steps", 4, "--ratio-clip", 0.01]
    assert finetune(*options, "--out", tmp_path / "grpo", *grpo) == 0
    assert json.loads((tmp_path / "grpo" / "config.json").read_text())["ratio_clip"] == 0.01
    assert finetune(*options, "--out", tmp_path / "orw", "--method", "orw") == 0
    assert json.loads((tmp_path / "orw" / "config.json").read_text())["critic"] is False


@pytest.mark.parametrize(
    "options, text",
    [
        (["--reward", "shiny"], "unknown reward 'shiny'"),
        (["--prompts", "nowhere.txt"], "takes classes; give --classes"),
        (["--classes", "cat,unicorn"], "unknown class name 'unicorn'"),
        (["--images-per-prompt", "3", "--updates-per-epoch", "4"], "must be a multiple of 4"),
        (["--tau", "0"], "tau must be positive"),
        (["--config", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["--ratio-clip", "0.1"], "ratio_clip is no setting here"),
        (["--weights", "signed", "--normalise", "none"], "alpha above the advantage clip"),
        (["--lora-targets", "nowhere"], "match no linear layer"),
        (["--call", '{"height": 8}'], "takes no argument 'height'"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(model, tmp_path, capsys, options, text):
    given = ["--model", model, "--out", tmp_path / "run", "--metrics"]
    given += [] if "--reward" in options else ["--reward", "brightness"]
    assert finetune(*given, *options) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, text",
    [
        ("alpha: [1", "cannot read"),
        ("- 1\n", "must hold names and values"),
        ("alfa: 1\n", "alfa is no setting here"),
        ("epochs: 1.5\n", "epochs must be an integer"),
        ("critic: 2\n", "critic must be true or false"),
        ("alpha: high\n", "alpha must be a float"),
    ],
)
def test_bad_config_files_are_named(model, tmp_path, capsys, content, text):
    config = tmp_path / "run.yaml"
    config.write_text(content)
    given = ["--model", model, "--out", tmp_path / "run", "--reward", "brightness"]
    assert finetune(*given, "--config", config) == 2
    assert text in capsys.readouterr().err


def test_a_prompt_model_needs_a_file_that_is_good(text_model, tmp_path, capsys):
    given = ["--model", text_model, "--out", tmp_path / "run", "--reward", "brightness"]
    assert finetune(*given) == 2
    assert "give --prompts FILE" in capsys.readouterr().err
    assert finetune(*given, "--prompts", tmp_path / "nowhere.txt") == 2
    assert "prompts: there is no file" in capsys.readouterr().err
    for content, text in [("", "holds none"), ("a\nb\na\n", "line 3 .* repeats line 1")]:
        path = tmp_path / "prompts.txt"
        path.write_text(content)
        assert finetune(*given, "--prompts", path) == 2
        error = capsys.readouterr().err
        assert text in error or text.split(" .*")[0] in error
    assert not (tmp_path / "run").exists()


def test_overwrite_begins_anew(model, tmp_path):
    options = ["--model", model, "--out", tmp_path / "run", "--reward", "brightness"]
    options += ["--metrics", "--eval-images", 0]
    assert finetune(*options) == 0
    assert finetune(*options, "--alpha", 2) == 2
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert finetune(*options, "--overwrite", "--lora-targets", "nowhere", "--tune", "lora") == 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before  # a mistake: kept
    assert finetune(*options, "--alpha", 2, "--overwrite") == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["alpha"] == 2
    assert not list(tmp_path.glob(".run*"))


def test_the_settings_of_the_page_are_settings_that_fit_eight_ranks(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "acflow.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "run.yaml"
    path.write_text(block)
    options = scripts_main.load("_config_options")
    parser = argparse.ArgumentParser()
    options.add_config_options(parser, ACFlowConfig)
    config = options.read_config(parser.parse_args(["--config", str(path)]), ACFlowConfig)
    check_split(config, 8)
    assert (config.train_cfg, config.learning_rate, config.rank) == ("both", 1e-4, 32)


def test_each_rank_of_a_launch_has_a_device_of_its_own(monkeypatch):
    """Models of rewards and the pipeline are loaded before accelerate chooses the device."""
    cli = scripts_main.load("_cli")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert cli.default_device() == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert cli.default_device() == "cuda:3"
    for native, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native, **_: native)
        assert cli.dtype_for("auto", cli.default_device()) == dtype
