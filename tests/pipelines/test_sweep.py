"""Sweeps: the same seeds for every point, nothing made twice, nothing lost, tables that agree."""

from __future__ import annotations

import csv
import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_flow import tiny_dit, tiny_pipeline

from diffsteer import ClassConditionalPipeline, steer
from diffsteer.eval import EvalSuite
from diffsteer.guidance import AdaptiveProjectedGuidance, AutoGuidance, ClassifierFreeGuidance
from diffsteer.pipelines import FolderError, SweepPoint, plan_images, run_sweep

POINTS = [
    SweepPoint("none", None, 2),
    SweepPoint("cfg-2", ClassifierFreeGuidance(2.0), 2, "cfg", 2.0),
    SweepPoint("cfg-4", ClassifierFreeGuidance(4.0), 2, "cfg", 4.0),
    SweepPoint("apg-4", AdaptiveProjectedGuidance(4.0, latent_std=0.5), 3, "apg", 4.0),
]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("denoised")


@pytest.fixture
def calls(monkeypatch):
    """The sizes of all batches that the pipeline makes."""
    seen: list[int] = []
    original = ClassConditionalPipeline.__call__

    @functools.wraps(original)
    def counted(self, class_labels, **kwargs):
        seen.append(len(class_labels))
        return original(self, class_labels, **kwargs)

    monkeypatch.setattr(ClassConditionalPipeline, "__call__", counted)
    return seen


def sweep(pipe, out, points=POINTS, num=6, metrics=("accuracy", "colour"), **more):
    requests = plan_images(range(num), pipe=pipe)
    options = {"batch_size": 4, "config": {"model": "tiny"}, **more}
    return run_sweep(pipe, requests, out, points, suite=EvalSuite(metrics), **options)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = (path for path in (folder / "points").rglob("*") if path.is_file())
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in found}


def told(found):
    """A result as it is written down, where NaN (a class without images) equals itself."""
    return found.point, found.folder, found.cost, found.result.as_dict()


def test_every_point_has_its_rule_and_the_same_seeds(pipe, tmp_path):
    results = sweep(pipe, tmp_path / "out")
    assert [found.point for found in results] == POINTS
    runs = [json.loads((found.folder / "run.json").read_text()) for found in results]
    assert all(run["complete"] and run["images"] == runs[0]["images"] for run in runs)
    assert [run["config"]["steps"] for run in runs] == [2, 2, 2, 3]
    assert [found.cost.nfe for found in results] == [2, 4, 4, 6]
    with steer(pipe, POINTS[3].rule):
        call = {"seeds": [5], "num_inference_steps": 3, "guidance_scale": 4.0}
        expected = np.asarray(pipe([5], **call).images[0]).astype(int)
    image = np.asarray(Image.open(results[3].folder / "images/000005_dog.png")).astype(int)
    assert np.abs(image - expected).max() <= 1


def test_table_json_picture_and_plots_agree(pipe, tmp_path):
    results = sweep(pipe, tmp_path, metrics=("accuracy", "colour", "fd"))
    about = json.loads((tmp_path / "sweep.json").read_text())
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert about["complete"] is True and about["seeds"] == list(range(6))
    assert [row["name"] for row in rows] == [point.name for point in POINTS]
    for row, record, found in zip(rows, about["points"], results, strict=True):
        for name, value in found.result.values.items():
            assert float(row[name]) == record[name] == value
        assert int(row["nfe"]) == record["nfe"] == found.cost.nfe
        assert float(row["seconds_per_image"]) > 0 and int(row["count"]) == 6
    assert about["points"][1]["guidance"]["arguments"]["scale"] == 2.0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 6 * 96 and grid.height > 4 * 96
    assert (tmp_path / "fd_accuracy.png").is_file() and (
        tmp_path / "saturation_scale.png"
    ).is_file()
    assert about["plots_missing"] == {"precision_recall": "no point has both recall and precision"}


def test_a_finished_point_is_never_made_again(pipe, tmp_path, calls):
    sweep(pipe, tmp_path, POINTS[:2])
    before = snapshot(tmp_path)
    calls.clear()
    again = sweep(pipe, tmp_path, POINTS[:2])
    assert calls == [] and snapshot(tmp_path) == before
    more = sweep(pipe, tmp_path, POINTS[:3])
    assert calls == [1, 4, 2]  # the price of the new point, and its images
    assert [told(found) for found in more[:2]] == [told(found) for found in again]
    assert before.items() <= snapshot(tmp_path).items()


def test_a_half_done_point_goes_on(pipe, tmp_path, monkeypatch, calls):
    counted = ClassConditionalPipeline.__call__

    @functools.wraps(counted)
    def stop_in_the_second_point(self, class_labels, **kwargs):
        if len(calls) == 5:  # two prices, two batches of the first point, one of the second
            raise KeyboardInterrupt
        return counted(self, class_labels, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ClassConditionalPipeline, "__call__", stop_in_the_second_point)
        with pytest.raises(KeyboardInterrupt):
            sweep(pipe, tmp_path, POINTS[:2])
    about = json.loads((tmp_path / "sweep.json").read_text())
    assert about["complete"] is False and [p["name"] for p in about["points"]] == ["none"]
    calls.clear()
    results = sweep(pipe, tmp_path, POINTS[:2])
    assert calls == [1, 2]  # its price again, and the two images that were missing
    again = sweep(pipe, tmp_path, POINTS[:2])
    assert [told(found) for found in again] == [told(found) for found in results]


def test_other_metrics_score_the_same_images_again(pipe, tmp_path, calls):
    sweep(pipe, tmp_path, POINTS[:2], metrics=("colour",))
    images = {k: v for k, v in snapshot(tmp_path).items() if k.endswith(".png")}
    calls.clear()
    results = sweep(pipe, tmp_path, POINTS[:2], metrics=("accuracy",))
    assert calls == [] and images.items() <= snapshot(tmp_path).items()
    assert all(set(found.result.values) >= {"accuracy"} for found in results)
    assert "saturation" not in results[0].result.values


def test_lost_images_and_scores_are_made_again(pipe, tmp_path, calls):
    (first, second) = sweep(pipe, tmp_path, POINTS[:2])
    (first.folder / "images/000003_cat.png").unlink()
    (second.folder / "metrics.json").unlink()
    calls.clear()
    again = sweep(pipe, tmp_path, POINTS[:2])
    assert calls == [1, 1]  # the price, and the lost image
    assert [found.result.values for found in again] == [f.result.values for f in (first, second)]


def test_a_rule_that_needs_no_unconditional_branch_runs_without_it(pipe, tmp_path):
    weak = tiny_dit()
    rule = AutoGuidance(3.0)
    (found,) = sweep(pipe, tmp_path, [SweepPoint("auto", rule, 2)], weak=weak, num=2)
    run = json.loads((found.folder / "run.json").read_text())
    assert run["config"]["call"] == {"guidance_scale": 1.0} and found.cost.nfe == 4
    with steer(pipe, rule, weak=weak):
        call = {"seeds": [1], "num_inference_steps": 2, "guidance_scale": 4.0}
        expected = np.asarray(pipe([1], **call).images[0]).astype(int)
    image = np.asarray(Image.open(found.folder / "images/000001_automobile.png")).astype(int)
    assert np.abs(image - expected).max() <= 1


def test_another_setting_under_the_same_name_is_refused(pipe, tmp_path):
    sweep(pipe, tmp_path, POINTS[:2])
    before = snapshot(tmp_path)
    for changed in (
        replace(POINTS[1], rule=ClassifierFreeGuidance(3.0)),
        replace(POINTS[1], steps=3),
    ):
        with pytest.raises(FolderError, match="another configuration"):
            sweep(pipe, tmp_path, [POINTS[0], changed])
    with pytest.raises(FolderError, match="model was"):
        sweep(pipe, tmp_path, POINTS[:2], config={"model": "another"})
    assert snapshot(tmp_path) == before
    sweep(pipe, tmp_path, [replace(POINTS[1], steps=3)], overwrite=True)
    run = json.loads((tmp_path / "points/cfg-2/run.json").read_text())
    assert run["config"]["steps"] == 3 and run["complete"]


def test_what_cannot_run_stops_the_sweep_before_it_begins(pipe, tmp_path, calls):
    points = [*POINTS, SweepPoint("auto", AutoGuidance(2.0), 2)]
    with pytest.raises(ValueError, match=r"point auto: .*weak"):
        sweep(pipe, tmp_path / "out", points)
    assert not (tmp_path / "out").exists() and max(calls) == 1


@pytest.mark.parametrize(
    ("points", "text"),
    [([], "give at least one"), ([POINTS[0], POINTS[0]], "none is there twice")],
)
def test_points_must_be_there_and_differ(pipe, tmp_path, points, text):
    with pytest.raises(ValueError, match=text):
        sweep(pipe, tmp_path / "out", points)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "a/b", "..", "cfg 2", ".hidden"])
def test_names_are_those_of_folders(name):
    with pytest.raises(ValueError, match="a point's name may hold"):
        SweepPoint(name)


def test_a_folder_of_something_else_is_not_touched(pipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FolderError, match=r"holds no sweep\.json"):
        sweep(pipe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(FolderError, match="is a file"):
        sweep(pipe, tmp_path / "thesis.tex")
