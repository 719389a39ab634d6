"""Mistakes that every script shares: help, devices, missing libraries, runs that never began."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import scripts_main
from PIL import Image
from tiny_flow import tiny_pipeline

SCRIPTS = sorted(
    path.stem for path in scripts_main.SCRIPTS.glob("*.py") if not path.stem.startswith("_")
)
REQUIRED = {
    "average_classifiers": ("folder", "--out", "x"),
    "calibrate": ("--out", "x"),
    "finetune_acflow": ("--out", "x", "--reward", "jpeg"),
    "finetune_eggroll": ("--out", "x"),
    "generate": ("--out", "x"),
    "sweep": ("--out", "x"),
    "train_classifier": ("--out", "x"),
}


def parser_of(name: str):
    module = scripts_main.load(name)
    return module.evaluate_parser() if name == "evaluate" else module.parser()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_the_script_does_and_every_option(name):
    text = parser_of(name).format_help()
    assert f"scripts/{name}.py" in text  # a command to copy
    assert "SETTING_" not in text and "(default: )" not in text and "None" not in text
    actions = [action for action in parser_of(name)._actions if action.option_strings]
    assert [action.option_strings[0] for action in actions if not action.help] == []


@pytest.mark.parametrize("name", [n for n in SCRIPTS if "--device" in parser_of(n).format_help()])
@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(name, device, capsys):
    with pytest.raises(SystemExit, match="2"):
        parser_of(name).parse_args([*REQUIRED.get(name, ()), "--device", device])
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert "argument --device" in last and device in last and "cpu" in last


def test_a_missing_library_is_one_line(capsys):
    def main(argv):
        raise ImportError("this needs timm; pip install diffsteer[classifiers]")

    assert scripts_main.load("_run").run(main, []) == 2
    assert capsys.readouterr().err == "error: this needs timm; pip install diffsteer[classifiers]\n"


def test_a_run_that_never_made_an_image_is_in_nobodys_way(tmp_path, capsys):
    tiny_pipeline("denoised").save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    common = ("--model", tmp_path / "model", "--num", 2, "--steps", 2, "--out", out)
    method = ("--guidance", "autoguidance", "--device", "cpu")
    assert scripts_main.run("generate", *common, *method) == 2
    message = capsys.readouterr().err
    assert "--weak" in message and "negative=" not in message
    assert scripts_main.run("generate", *common, "--device", "cpu") == 0
    assert json.loads((out / "run.json").read_text())["config"]["guidance"] is None
    assert scripts_main.run("generate", *common, "--device", "cpu", "--guidance", "cfg") == 2
    assert "another configuration" in capsys.readouterr().err  # now there are images to lose


@pytest.mark.parametrize("name", ["average_classifiers", "compare_classifiers", "train_classifier"])
def test_data_that_is_not_there_is_one_line(name, tmp_path, capsys):
    more = {"average_classifiers": (tmp_path / "first",)}.get(name, ())
    code = scripts_main.run(name, *more, "--data", tmp_path / "nowhere", "--out", tmp_path / "x")
    assert code == 2
    assert re.fullmatch(r"error: .*(nowhere|first).*\n", capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_while_libraries_load_is_one_line(name, tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    command = [sys.executable, scripts_main.SCRIPTS / f"{name}.py", "--help"]
    paths = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": ""}
    done = subprocess.run(
        command, env={**os.environ, **paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode and done.stderr == "stopped before anything began\n"


def test_ctrl_c_leaves_evaluate_quietly(tmp_path, monkeypatch, capsys):
    module = scripts_main.load("evaluate")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "make_suite", stop)
    assert module.main([str(tmp_path)]) == 130
    assert capsys.readouterr().err == "stopped; no result was written\n"


def test_classifiers_are_compared_on_their_own_classes_only(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "data" / name / "0.png")
    code = scripts_main.run("compare_classifiers", "--data", tmp_path / "data", "--split", "train")
    error = capsys.readouterr().err
    assert code == 2 and "are cat, dog; the classifiers know airplane, automobile" in error


def test_a_mapping_that_is_none_is_named(capsys):
    for text in ("{", "3"):
        with pytest.raises(SystemExit, match="2"):
            parser_of("finetune_eggroll").parse_args(["--out", "x", "--call", text])
        assert "--call: expected a JSON mapping" in capsys.readouterr().err


def test_a_damaged_calibration_is_named(tmp_path, capsys):
    (tmp_path / "calibration.json").write_text("{")
    options = ("--guidance", "gfcg", "--calibration", tmp_path, "--out", tmp_path / "x")
    assert scripts_main.run("generate", *options) == 2
    error = capsys.readouterr().err
    assert "calibration.json is damaged" in error and "calibrate again" in error


@pytest.mark.parametrize("name", ["train", "finetune_acflow", "finetune_eggroll"])
def test_a_folder_of_something_else_is_left_alone(name, tmp_path, capsys):
    tiny_pipeline("denoised").save_pretrained(tmp_path / "model")
    for number, label in enumerate(("cat", "dog")):
        (tmp_path / "data" / label).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / label / f"{number}.png")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    options = {
        "train": ("--data", tmp_path / "data", "--resolution", 8, "--layers", 1, "--steps", 1),
        "finetune_acflow": ("--model", tmp_path / "model", "--reward", "brightness", "--metrics"),
        "finetune_eggroll": ("--model", tmp_path / "model", "--reward", "brightness"),
    }
    assert scripts_main.run(name, *options[name], "--out", tmp_path / "mine") == 2
    assert "mine holds thesis.tex and no training run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["finetune_acflow", "finetune_eggroll", "train"])
def test_nothing_is_saved_of_a_run_that_is_not_there(name, tmp_path, capsys):
    options = {"finetune_acflow": ("--reward", "jpeg")}.get(name, ())
    assert scripts_main.run(name, *options, "--save-only", "--out", tmp_path / "run") == 2
    assert "there is no" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


MISTAKES = {
    "reproduce_eggroll": (("--only", "nope"), "--only nope is no task"),
    "reproduce_acflow": (("--samples", 0), "--samples, --steps and --per-class must be at least 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_study_names_what_it_does_not_know(name, tmp_path, capsys):
    options, text = MISTAKES[name]
    assert scripts_main.run(name, *options, "--out", tmp_path / "out") == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_plots_are_refused_before_the_work_where_they_cannot_be_drawn(
    tmp_path, monkeypatch, capsys
):
    module = scripts_main.load("evaluate")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert module.main(["nowhere", "--plots", "--out", str(tmp_path)]) == 2
    assert "diffsteer[plots]" in capsys.readouterr().err
