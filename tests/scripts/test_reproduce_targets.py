"""scripts/reproduce_targets.py at tiny sizes: it resumes, refuses and reports."""

from __future__ import annotations

import io
import json
import math

import datasets
import pytest
import scripts_main
import torch
from PIL import Image

from diffsteer.eval import EvalSuite, cifar_extractor

TINY = "--resolution 8 --layers 1 --heads 2 --head-dim 8 --batch-size 8 --precision fp32".split()


def run(out, *options):
    return scripts_main.run("reproduce_targets", "--out", out, "--toy-steps", 2, *options)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder that looks like CIFAR-10's: forty images to train on, twenty to be held against."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    kinds = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=[f"c{i}" for i in range(10)])}
    )
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 40), ("test", 20)):
        rows = []
        for _ in range(count):
            pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(file := io.BytesIO(), format="PNG")
            rows.append({"bytes": file.getvalue(), "path": None})
        data = {"img": rows, "label": [i % 10 for i in range(count)]}
        made = datasets.Dataset.from_dict(data, features=kinds)
        made.to_parquet(tmp_path / "cifar" / f"{split}-00000-of-00001.parquet")
    return tmp_path / "cifar"


def test_image_parts_train_score_draw_and_go_on(tmp_path, cifar, monkeypatch):
    images = scripts_main.load("_targets_images")

    def quick_suite(metrics):
        extractor = cifar_extractor()
        extractor.micro_batch = 20  # small batches are filled up to it
        return EvalSuite(metrics, extractors=extractor)

    monkeypatch.setattr(images, "EvalSuite", quick_suite)
    monkeypatch.setattr(images, "KS", ("0.5", "learned"))
    monkeypatch.setattr(images, "DIMS", ("64",))
    monkeypatch.setattr(images, "BITS", (4,))
    monkeypatch.setattr(images, "ALPHAS", (0.2,))
    page, out = tmp_path / "page.md", tmp_path / "out"
    page.write_text(
        "# Said by hand\n<!-- from here on written by scripts/reproduce_targets.py -->\nstale\n"
        "<!-- up to here -->\nand below\n"
    )
    options = ("--data", cifar, "--samples", 20, "--steps", 2, "--page", page,
               "--plots", tmp_path / "plots", *TINY)  # fmt: skip
    assert run(out, "--parts", "b", "c", *options) == 0
    text = page.read_text()
    assert (
        text.startswith("# Said by hand") and text.endswith("and below\n") and "stale" not in text
    )
    assert "| 0.5 | 0.500 |" in text and "Learned k (at update)" in text
    assert "| 64 | 0.1027 | 2.6 |" in text
    assert "fd, alpha 0.2, told" in text and "fd, 4 bits" in text
    drawn = {path.name for path in (tmp_path / "plots").iterdir()}
    assert drawn == {
        f"targets_{name}.png" for name in ("b_curves", "b_samples", "c_robustness", "c_samples")
    }
    point = json.loads((out / "c" / "D-64-0.json").read_text())
    assert point["target"]["augment_dim"] == 64 and len(point["cases"]) == 4
    assert len({case["fd-cifar"] for case in point["cases"].values()}) == 4
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json*")}
    assert run(out, "--parts", "b", "c", *options) == 0
    notes = ("settings.json", "history.jsonl")
    assert all(p.stat().st_mtime_ns == t for p, t in before.items() if p.name not in notes)
    assert page.read_text() == text
    assert run(out, "--parts", "b", "--data", cifar, "--samples", 21, "--steps", 2, *TINY) == 2


def test_a_network_that_is_told_of_the_noise_removes_it():
    """On one Gaussian, whose spread must come out right; noise that nobody counts adds to it."""
    sampling = scripts_main.load("_targets_sampling")
    from tiny_flow import tiny_dit, tiny_pipeline

    from diffsteer import Kind, Level
    from diffsteer.core import from_denoised
    from diffsteer.samplers.pfgmpp_schedulers import PFGMPPHeunScheduler

    spread, network, seen = 0.5, tiny_dit(), []

    def forward(x, timestep, class_labels, **_):
        """The denoiser of pixels from N(0, 0.5^2)."""
        sigma = (timestep / 250).exp()
        noisy = x * (sigma**2 + 0.25).sqrt().reshape(-1, 1, 1, 1)
        seen.append(float(sigma[0]))
        best = noisy * (spread**2 / (spread**2 + sigma**2)).reshape(-1, 1, 1, 1)
        return (from_denoised(best, Kind.edm(0.5), noisy, Level.ve(sigma)),)

    network.forward = forward
    scheduler = PFGMPPHeunScheduler(augment_dim=64.0)
    pipe = tiny_pipeline("edm", network, scheduler=scheduler, augment_dim=64.0)
    labels = torch.zeros(40, dtype=torch.long)
    spreads = {}
    for name, options in {
        "quiet": {}, "noise": {"alpha": 0.3}, "told": {"alpha": 0.3, "told": True}
    }.items():  # fmt: skip
        seen.clear()
        generate = sampling.edm_sampler(pipe, math.inf, **options)
        spreads[name] = float(generate(list(range(40)), labels).std())
        assert len(seen) == 2 * sampling.STEPS - 1
        assert seen[0] == pytest.approx(80 * (1.09**0.5 if name == "told" else 1), rel=1e-4)
    assert spreads["quiet"] == pytest.approx(spread, rel=0.1)  # 18 steps
    assert spreads["told"] == pytest.approx(spreads["quiet"], rel=0.04)
    assert spreads["noise"] > 1.3 * spreads["quiet"]


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
    images, sampling = (scripts_main.load(f"_targets_{n}") for n in ("images", "sampling"))
    layer = torch.nn.Linear(30, 20)
    before = layer.weight.detach().clone()
    sampling.quantised(layer, 3)
    assert len(layer.weight.unique()) <= 8
    step = (before.max() - before.min()) / 7
    assert (layer.weight - before).abs().max() <= step * 1.001
    assert images.log_drift(3072, math.inf, 0.1) == pytest.approx(6.5, abs=0.1)  # the spec's
    assert images.log_drift(3072, 128.0, 0.1) == pytest.approx(1.3, abs=0.05)
