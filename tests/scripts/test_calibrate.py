"""calibrate.py: resumes, says what generate.py should use, and refuses what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scripts_main
from PIL import Image
from tiny_pipelines import build

RUN = ("--num", 6, "--steps", 3, "--batch-size", 3, "--device", "cpu", "--classes", "0,1,2")


def calibrate(out: Path, *more: Any) -> int:
    return scripts_main.run("calibrate", *RUN, "--out", out, *more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibration") / "run"
    assert calibrate(out) == 0
    return out


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "calibration.json").read_text())


def test_writes_numbers_a_picture_and_what_made_them(folder: Path) -> None:
    found = read(folder)
    assert len(found["stages"]) == 3 and found["stages"][0]["count"] == 6
    levels = [float(stage["sigma"]) for stage in found["stages"]]
    assert levels == sorted(levels, reverse=True)
    assert found["ece"] == pytest.approx(sum(s["ece"] for s in found["stages"]) / 3)
    gfcg, elucd = found["settings"]["gfcg"], found["settings"]["elucd"]
    assert elucd["joint"] == pytest.approx(1 / gfcg["temperature"])
    assert all(stage["contrast"] > 0 for stage in found["stages"])
    with Image.open(folder / "reliability.png") as picture:
        assert picture.width > 300
    assert json.loads((folder / "run.json").read_text())["calibration"]["steps"] == 3


def test_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "parts").mkdir(parents=True)
    for name in ("run.json", "parts/000003.npz"):
        (out / name).write_bytes((folder / name).read_bytes())
    before = (out / "parts" / "000003.npz").stat().st_mtime_ns
    assert calibrate(out) == 0
    assert (out / "parts" / "000003.npz").stat().st_mtime_ns == before
    assert read(out) == read(folder)


def test_generate_takes_the_numbers(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    given = ("--guidance", "gfcg", "--calibration", folder, "--mode", "top", "--every", 2)
    code = scripts_main.run(
        "generate", "--num", 2, "--steps", 3, "--device", "cpu", "--out", out, *given
    )
    assert code == 0
    rule = json.loads((out / "run.json").read_text())["config"]["guidance"]["arguments"]
    settings = read(folder)["settings"]["gfcg"]
    assert rule["temperature"] == settings["temperature"] and rule["low"] == settings["low"]
    assert str(rule["high"]) == str(settings["high"]) and rule["mode"] == "top"


@pytest.mark.parametrize(
    "more, words",
    [
        (("--guidance", "apg"), "says nothing on --guidance apg"),
        (("--guidance", "gfcg", "--softplus", 3), "made with softplus None, not with 3.0"),
        (("--guidance", "gfcg", "--classifier", "timm:x"), "made with classifier embedded"),
    ],
)
def test_a_calibration_of_something_else_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: Any, words: str
) -> None:
    out = tmp_path / "images"
    code = scripts_main.run("generate", "--num", 1, "--out", out, "--calibration", folder, *more)
    assert code == 2 and words in capsys.readouterr().err and not out.exists()


def test_the_label_map_is_checked_on_real_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    for index, pixels in enumerate(noise):
        file = tmp_path / "data" / "test" / ("cat" if index % 2 else "dog") / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    assert calibrate(tmp_path / "run", "--data", tmp_path / "data") == 2
    assert "labelled images right, less than 50%" in capsys.readouterr().err
    assert not (tmp_path / "run" / "calibration.json").exists()


def test_prompts_need_their_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("sd").pipe.save_pretrained(tmp_path / "sd")
    run = ("--model", tmp_path / "sd", "--num", 4, "--steps", 2, "--device", "cpu")
    run = (*run, "--out", tmp_path / "run", "--prompt", "a cat", "--prompt", "a dog")
    assert scripts_main.run("calibrate", *run) == 2
    assert "--prompt-classes is missing" in capsys.readouterr().err
    assert scripts_main.run("calibrate", *run, "--prompt-classes", "3") == 2
    assert "gives 1 for 2 prompts" in capsys.readouterr().err
    # Random weights: whether the classifier beats chance is luck, that it was asked is not.
    scripts_main.run("calibrate", *run, "--prompt-classes", "3,5")
    with np.load(tmp_path / "run" / "parts" / "000000.npz") as part:
        assert part["logits"].shape == (2, 4, 2) and part["labels"].tolist() == [0, 1, 0, 1]


def test_another_run_in_the_folder_is_left_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "calibration.json").read_bytes()
    assert calibrate(folder, "--noisy") == 2
    assert "holds another run" in capsys.readouterr().err
    assert (folder / "calibration.json").read_bytes() == before


def test_presets_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ("--num", 1, "--steps", 2, "--device", "cpu", "--guidance", "apg")
    assert scripts_main.run("generate", *run, "--out", tmp_path / "a", "--preset", "pixels") == 0
    rule = json.loads((tmp_path / "a" / "run.json").read_text())["config"]["guidance"]
    assert rule["arguments"]["latent_std"] == 0.5 and rule["arguments"]["scale"] == 4.0
    code = scripts_main.run("generate", *run, "--out", tmp_path / "b", "--preset", "edm-64")
    assert code == 2 and "only for elucd" in capsys.readouterr().err
