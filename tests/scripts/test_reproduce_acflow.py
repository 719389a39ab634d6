"""scripts/reproduce_acflow.py at tiny sizes: equal budgets, judged once, a page, the toy's rows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import scripts_main

TINY = {
    "prompts_per_epoch": 2, "images_per_prompt": 2, "sample_steps": 3, "sample_batch": 4,
    "critic_width": 4,
}  # fmt: skip
METHODS = ("acflow", "control", "grpo")


@pytest.fixture
def study(monkeypatch):
    script = scripts_main.load("reproduce_acflow")
    monkeypatch.setattr(script, "SETTINGS", {**script.SETTINGS, **TINY})
    monkeypatch.setattr(script.judging, "PROXY_SAMPLES", 2)
    return script


def test_every_method_gets_the_same_evaluations(study):
    args = study.parser().parse_args(["--budget", "4000"])
    sampling, states = 2 * 2 * 3, 2 * 2 * 2
    for method in study.ALL:
        config = study.config_of(method, args, 0)
        warm = config.warmup.most
        passes = 2 if config.alpha else 1
        spent = warm * sampling + (config.epochs - warm) * (sampling + passes * states)
        assert 4000 - sampling - 2 * states < spent <= 4000, method


def test_a_small_study_is_judged_written_and_not_made_again(study, tmp_path):
    page = tmp_path / "docs" / "science" / "acflow.md"
    page.parent.mkdir(parents=True)
    page.write_text(f"# Kept\n\n{study.page.BEGIN}\nold\n{study.page.END}\n\nkept too\n")
    options = ["--out", tmp_path / "runs", "--budget", 90, "--samples", 4, "--toy-seeds", 0]
    options += ["--rewards", "jpeg", "--seeds", 0, "--page", page, "--methods", *METHODS]
    assert scripts_main.run("reproduce_acflow", *options) == 0
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert folders == ["base", "control-seed0", "jpeg-acflow-seed0", "jpeg-grpo-seed0"]
    found = {f: json.loads((tmp_path / "runs" / f / "judged.json").read_text()) for f in folders}
    proxies = {name: row["scores"]["w2_proxy"] for name, row in found.items()}
    assert proxies["base"] == 0 and all(v > 0 for n, v in proxies.items() if n != "base")
    text = page.read_text()
    assert text.startswith("# Kept") and text.endswith("kept too\n") and "old" not in text
    for name in ("base model", "AC-Flow", "control", "Flow-GRPO"):
        assert f"| {name}" in text
    assert "--methods acflow control grpo" in text and "--rewards jpeg" in text
    pictures = sorted(path.name for path in (tmp_path / "docs" / "images").iterdir())
    assert pictures == ["acflow_curves.png", "acflow_jpeg.png"]
    times = {f: (tmp_path / "runs" / f / "judged.json").stat().st_mtime_ns for f in folders}
    assert scripts_main.run("reproduce_acflow", *options) == 0
    again = {f: (tmp_path / "runs" / f / "judged.json").stat().st_mtime_ns for f in folders}
    assert times == again


def test_the_toy_finds_what_theory_says(monkeypatch):
    """A much shorter run: weights of the value alone gain nothing, those of the reward do."""
    toy = scripts_main.load("_acflow_toy")
    monkeypatch.setattr(toy, "ROUNDS", 7)
    rows = {(row.name, row.alpha): replace(row, warm_up=1) for row in toy.toys()}
    base = toy.base_model(0, updates=300)
    names = [("base model", 0.0), ("exp(tau V)", 1.0), ("exp(tau z), ORW", 1.0)]
    found = [toy.run_toy(rows[name], base, 0)["reward"] for name in names]
    assert abs(found[1] - found[0]) < 0.04 < 0.06 < found[2] - found[0]
