"""scripts/reproduce_acflow.py at tiny sizes: equal budgets, judged once, a page, the toy's rows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import scripts_main
import torch

TINY = {"prompts_per_epoch": 2, "sample_batch": 4, "critic_width": 4}
SIZE = ["--steps", "3", "--per-class", "2"]
METHODS = ("acflow", "orw", "control", "grpo")


@pytest.fixture
def study(monkeypatch):
    script = scripts_main.load("reproduce_acflow")
    monkeypatch.setattr(script, "SETTINGS", {**script.SETTINGS, **TINY})
    monkeypatch.setattr(script, "CRITIC", {**script.CRITIC, "critic_steps": 2})
    monkeypatch.setattr(script, "GRPO_STEPS", 3)
    monkeypatch.setattr(script.judging, "PROXY_SAMPLES", 2)
    return script


def test_every_method_gets_the_same_evaluations(study):
    args = study.parser().parse_args(["--budget", "4000", *SIZE])
    sampling, states = 2 * 2 * 3, 2 * 2 * 2
    for method in study.ALL:
        config = study.config_of(method, args, 0)
        warm = config.warmup.most
        passes = 2 if config.alpha else 1
        spent = warm * sampling + (config.epochs - warm) * (sampling + passes * states)
        assert 4000 - sampling - 2 * states < spent <= 4000, method


def test_runs_come_seed_by_seed_and_brightness_for_some_methods_only(study):
    found = study.planned(study.parser().parse_args(["--seeds", "1", "0"]))
    assert [seed for _, _, seed in found] == [1] * 17 + [0] * 17
    for name, methods in study.PLAN.items():
        assert {method for method, reward, _ in found if reward == name} == set(methods)


def test_a_small_study_is_judged_written_and_not_made_again(study, tmp_path):
    page = tmp_path / "docs" / "science" / "acflow.md"
    page.parent.mkdir(parents=True)
    mark = study.page.begin("reproduce_acflow.py")
    page.write_text(f"# Kept\n\n{mark}\nold\n{study.page.END}\n\nkept too\n")
    options = ["--out", tmp_path / "runs", "--budget", 90, "--samples", 4, "--toy-seeds", 0, *SIZE]
    options += ["--rewards", "jpeg", "--seeds", 0, "--page", page, "--methods", *METHODS]
    assert scripts_main.run("reproduce_acflow", *options) == 0
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    methods = ["control", "jpeg-acflow", "jpeg-grpo", "jpeg-orw"]
    assert folders == ["base", *(f"{name}-seed0" for name in methods)]
    found = {f: json.loads((tmp_path / "runs" / f / "judged.json").read_text()) for f in folders}
    proxies = {name: row["scores"]["w2_proxy"] for name, row in found.items()}
    assert proxies["base"] == 0 and all(v > 0 for n, v in proxies.items() if n != "base")
    text = page.read_text()
    assert text.startswith("# Kept") and text.endswith("kept too\n") and "old" not in text
    for name in ("base model", "AC-Flow", "control", "Flow-GRPO", "ORW-CFM-W2"):
        assert f"| {name}" in text
    assert "--methods acflow orw control grpo" in text and "--rewards jpeg" in text
    assert "AC-Flow minus ORW" in text and "Explained variance" in text
    pictures = sorted(path.name for path in (tmp_path / "docs" / "images").iterdir())
    assert pictures == ["acflow_curves.png", "acflow_jpeg.png", "acflow_trade.png"]
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


def test_differences_are_paired_over_seeds_and_images():
    """Images that differ much, and methods that differ little: pairing finds the difference."""
    pairs = scripts_main.load("_acflow_pairs")
    noise = torch.Generator().manual_seed(0)
    images = 100 * torch.randn(200, generator=noise)
    of_seed = {seed: 0.1 * torch.randn((), generator=noise) for seed in range(5)}
    theirs = {seed: images.tolist() for seed in of_seed}
    ours = {
        seed: (images + 0.5 + shift + 0.2 * torch.randn(200, generator=noise)).tolist()
        for seed, shift in of_seed.items()
    }
    mean, half = pairs.difference(ours, theirs)
    assert abs(mean - 0.5) < half < 0.3
    assert pairs.difference(ours, theirs | {9: theirs[0]}) == (mean, half)
    one = pairs.difference({0: [2.0]}, {0: [1.5]})
    assert one == (0.5, 0.0) and pairs.shown(one, 1) == "+0.5"
    assert pairs.difference({0: [2.0]}, {1: [1.5]}) is None
    # Closed form: gaps 1, 2, 3 of three seeds, one number each.
    gaps = {seed: [float(seed)] for seed in (1, 2, 3)}
    zeros = {seed: [0.0] for seed in gaps}
    assert pairs.difference(gaps, zeros) == pytest.approx((2.0, 4.303 / 3**0.5))
