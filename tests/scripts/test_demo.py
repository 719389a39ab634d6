"""demo.py: the picture, the numbers, and that it goes on where it stopped."""

from __future__ import annotations

import json

import pytest
import scripts_main
from PIL import Image
from tiny_flow import tiny_dit, tiny_pipeline


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo of 12 images a setting, by a tiny random model with 32x32 pixels."""
    folder = tmp_path_factory.mktemp("demo")
    network = tiny_dit(sample_size=32, patch_size=8)
    tiny_pipeline("denoised", network).save_pretrained(folder / "model")

    def run(*more):
        options = ("--model", folder / "model", "--num", 12, "--steps", 2, "--device", "cpu")
        return scripts_main.run("demo", *options, "--out", folder / "out", *more)

    assert run() == 0
    return folder / "out", run


SETTINGS = ["no guidance", "CFG 3", "APG 3", "CFG 8", "APG 8"]


def test_every_setting_has_the_same_seeds_and_its_own_rule(demo):
    out, _ = demo
    run = json.loads((out / "run.json").read_text())
    assert list(run["settings"]) == SETTINGS
    runs = [json.loads((out / f / "run.json").read_text()) for f in run["settings"].values()]
    assert all(r["complete"] and r["images"] == runs[0]["images"] for r in runs)
    guidance = [r["config"]["guidance"] for r in runs]
    assert guidance[0] is None
    assert [g["class"][:3] for g in guidance[1:]] == ["Cla", "Ada"] * 2
    assert [g["arguments"]["scale"] for g in guidance[1:]] == [3, 3, 8, 8]


def test_metrics_are_there_for_every_setting(demo):
    out, _ = demo
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics) == SETTINGS
    for found in metrics.values():
        assert {"accuracy", "saturation", "contrast", "clipped"} <= set(found["values"])
        assert found["labels"]["accuracy"] == "accuracy@12"


def test_the_picture_shows_ten_classes_under_headings(demo):
    out, _ = demo
    sheet = Image.open(out / "grid.png")
    first = Image.open(sorted((out / "no-guidance/images").iterdir())[0])
    cell = first.resize((96, 96), Image.Resampling.LANCZOS)
    left, top = sheet.width - 10 * 98, sheet.height - 5 * 98
    assert left > 96 and top > 20  # room for the labels
    assert sheet.crop((left, top, left + 96, top + 96)).tobytes() == cell.tobytes()
    ink = sheet.crop((0, top, left - 2, sheet.height)).convert("L").getextrema()
    assert ink[0] < 60 and ink[1] == 255  # something is written there, dark on white


def test_a_second_run_makes_no_image_again(demo):
    out, run = demo
    images = sorted(out.glob("*/images/*.png"))
    before = [image.stat().st_mtime_ns for image in images]
    assert run() == 0
    assert [image.stat().st_mtime_ns for image in images] == before and len(before) == 60


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("--steps", 3), "steps was 2, now 3"),
        (("--num", 0), "--num must be at least 1, got 0"),
        (("--scales", "nan", 8), "scale must be a finite number, got nan"),
        (("--model", "./nowhere"), "there is no pipeline folder"),
    ],
)
def test_bad_input_leaves_the_demo_as_it_was(demo, capsys, change, text):
    out, run = demo
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(*change) == 2
    assert text in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
