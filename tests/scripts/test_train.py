"""scripts/train.py from a parquet file to a pipeline folder, and its one-line errors."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import pytest
import scripts_main
import torch
from PIL import Image

from diffsteer.pipelines import ClassConditionalPipeline
from diffsteer.training import averaged_model

SMALL = "--resolution 8 --layers 1 --heads 2 --head-dim 8 --batch-size 4 --warmup 1".split()
PACE = "--steps 4 --checkpoint-every 2 --log-every 2 --preview-every 0 --precision fp32".split()


def png(value: int) -> dict[str, object]:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 128, 255 - value)).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve pictures of three classes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    kinds = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])}
    rows = {"img": [png(20 * i) for i in range(12)], "label": [i % 3 for i in range(12)]}
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(path)
    return path


def train(data: Path, out: Path, *options: str) -> int:
    return scripts_main.run("train", "--data", data, "--out", out, *SMALL, *PACE, *options)


def test_a_run_becomes_a_pipeline_folder_that_goes_on_and_samples(tmp_path, data, capsys):
    out = tmp_path / "run"
    assert train(data, out, "--weak-at", "2", "--save-dtype", "float32") == 0
    pipe = ClassConditionalPipeline.from_pretrained(out / "model")
    assert pipe.id2label == {0: "ant", 1: "bee", 2: "cat"}
    assert pipe.prediction_kind.name == "denoised"
    known = averaged_model(out).state_dict()
    assert all(torch.equal(known[k], v) for k, v in pipe.transformer.state_dict().items())
    assert (out / "weak" / "config.json").is_file()
    pipe.set_progress_bar_config(disable=True)
    assert pipe("bee", seeds=[0], num_inference_steps=2).images[0].size == (8, 8)
    assert train(data, out, "--weak-at", "2") == 0  # done already: nothing is trained again
    parts = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [part["from_step"] for part in parts] == [0, 4]


def test_the_newest_checkpoint_can_be_saved_without_training(tmp_path, data):
    assert train(data, tmp_path / "run") == 0
    history = (tmp_path / "run" / "history.jsonl").read_text()
    assert scripts_main.run("train", "--out", tmp_path / "run", "--save-only") == 0
    assert (tmp_path / "run" / "history.jsonl").read_text() == history
    assert scripts_main.run("train", "--out", tmp_path / "none", "--save-only") == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (("--seed", "7"), "seed=0, now it is 7; use the old value, another folder"),
        (("--batch-size", "0"), "batch_size must be at least 1, got 0"),
        (("--split", "test"), "split='train', now it is 'test'"),
        (("--allow-change", "pace"), "allow_change names 'pace'"),
        (("--objective", "kdiff"), "objective='flow', now it is 'kdiff'"),
        (("--k", "1.5"), "k must be learned, auto or a number in [0, 1], got '1.5'"),
        (("--augment-dim", "0"), "augment_dim must be a positive number, or inf"),
        (("--init", "nowhere", "--objective", "kdiff"), "now it is 'kdiff'"),
    ],
)
def test_errors_are_one_line_and_leave_the_run_as_it_was(tmp_path, data, capsys, options, message):
    assert train(data, tmp_path / "run") == 0
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert train(data, tmp_path / "run", *options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert files == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("options", "index"),
    [
        (["--objective", "kdiff", "--k", "learned", "--augment-dim", "64"], ("kdiff", 64.0)),
        (["--objective", "kdiff", "--k", "auto"], ("kdiff", None)),
        (["--objective", "pfgmpp", "--augment-dim", "128"], ("edm", 128.0)),
        (["--objective", "pfgmpp", "--augment-dim", "inf"], ("edm", None)),
    ],
)
def test_other_targets_become_pipelines_that_know_them(tmp_path, data, options, index):
    assert train(data, tmp_path / "run", *options) == 0
    saved = json.loads((tmp_path / "run" / "model" / "model_index.json").read_text())
    assert (saved["prediction"], saved["augment_dim"]) == index
    assert (saved["k"] is not None) == (index[0] == "kdiff")
    line = json.loads((tmp_path / "run" / "loss.jsonl").read_text().splitlines()[-1])
    assert ("k" in line) == ("learned" in options)
    pipe = ClassConditionalPipeline.from_pretrained(tmp_path / "run" / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("bee", seeds=[0], num_inference_steps=2).images[0].size == (8, 8)


def test_a_start_that_is_not_there_is_named_and_nothing_is_written(tmp_path, data, capsys):
    assert train(data, tmp_path / "run", "--init", str(tmp_path / "nowhere")) == 2
    assert "init: there is no pipeline in" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_data_that_is_not_there_is_named(tmp_path, capsys):
    assert train(tmp_path / "nothing", tmp_path / "run") == 2
    assert "does not exist; give a parquet file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_named(tmp_path, data, capsys):
    assert train(data, tmp_path / "run") == 0
    (tmp_path / "run" / "checkpoints" / "step-00000004" / "state.pt").write_bytes(b"")
    assert train(data, tmp_path / "run") == 2
    assert "is damaged" in capsys.readouterr().err
