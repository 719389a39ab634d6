"""scripts/reproduce_targets.py at tiny sizes: it resumes, refuses and reports."""

from __future__ import annotations

import json
import math

import pytest
import scripts_main


def run(out, *options):
    return scripts_main.run("reproduce_targets", "--out", out, "--toy-steps", 2, *options)


def test_toy_parts_are_done_once_and_reported(tmp_path, monkeypatch):
    options = ("--parts", "d", "--points", 40)
    assert run(tmp_path, *options) == 0
    points = sorted((tmp_path / "d").glob("own-*.json"))
    times = [path.stat().st_mtime_ns for path in points]
    points[0].unlink()
    assert run(tmp_path, *options) == 0
    assert [path.stat().st_mtime_ns for path in points][1:] == times[1:]
    weights = json.loads(points[0].read_text())["weights"]
    assert math.isclose(sum(weights), 1, rel_tol=1e-6)
    report = (tmp_path / "report.md").read_text()
    assert "## (d)" in report and "| inf |" in report and "0.5 / 0.3 / 0.2" in report


def test_other_settings_and_counts_are_refused(tmp_path, capsys):
    assert run(tmp_path, "--parts", "d", "--points", 40) == 0
    capsys.readouterr()
    assert run(tmp_path, "--parts", "d", "--points", 50) == 2
    assert "made with other settings (points)" in capsys.readouterr().err
    assert run(tmp_path, "--parts", "d", "--points", 0) == 2
    assert "--points must be at least 1" in capsys.readouterr().err


def test_the_linear_rule_holds_for_symmetric_times_and_breaks_for_others():
    toy = scripts_main.load("_targets_toy")
    for dims, intrinsic in ((64, 4), (16, 16)):
        rule = dims / (dims + intrinsic)
        for law in ("uniform", "logit-normal(0, 1)"):
            found = toy.best_linear_k(dims, intrinsic, toy.times(toy.LAWS[law]))
            assert found == pytest.approx(rule, abs=2e-4)
        off = toy.best_linear_k(dims, intrinsic, toy.times((-0.8, 0.8)))
        assert abs(off - rule) > 0.2


def test_weights_are_rounded_to_the_grid_of_their_bits():
    import torch

    images = scripts_main.load("_targets_images")
    layer = torch.nn.Linear(30, 20)
    before = layer.weight.detach().clone()
    images.quantised(layer, 3)
    assert len(layer.weight.unique()) <= 8
    step = (before.max() - before.min()) / 7
    assert (layer.weight - before).abs().max() <= step * 1.001
    assert images.log_drift(3072, math.inf, 0.1) == pytest.approx(6.5, abs=0.1)  # the spec's
    assert images.log_drift(3072, 128.0, 0.1) == pytest.approx(1.3, abs=0.05)
