"""The classifier training: augmentation, schedule, whitening, resumption, and that it learns."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffsteer.eval.classifiers import CifarClassifier, CifarPlainNet, CifarResNet
from diffsteer.training import classifier as training
from diffsteer.training.classifier import (
    ClassifierTraining,
    build_classifier,
    classification_report,
    make_optimizer,
    predict,
    train_classifier,
    train_epoch,
)
from diffsteer.training.classifier_recipe import (
    augment,
    cut_out,
    epoch_batches,
    learning_rate,
    whitening_filters,
)
from diffsteer.training.data import LabelledImages

SMALL = ClassifierTraining(
    width=4, epochs=4, batch_size=24, lr=0.1, small_size=16, precision="fp32", translate=1
)


def striped(count: int = 96, side: int = 20) -> LabelledImages:
    """Noisy images: stripes across, stripes down, none; no mirror image is of another class."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 3
    wave = ((torch.arange(side) // 2) % 2 * 120.0).expand(side, side)
    pattern = torch.stack([wave, wave.T, torch.full_like(wave, 60.0)])[labels]
    noise = torch.randint(0, 100, (count, 3, side, side), generator=generator)
    pixels = (pattern[:, None] + noise).clamp(0, 255).to(torch.uint8)
    return LabelledImages(pixels, labels, ("across", "down", "none"))


def shifted(image: Tensor, rows: int, columns: int, by: int) -> Tensor:
    padded = torch.nn.functional.pad(image[None], (by,) * 4, mode="reflect")[0]
    height, width = image.shape[1:]
    return padded[:, rows : rows + height, columns : columns + width]


def test_augmented_images_are_shifts_of_the_mirrored_ones():
    images = torch.rand(12, 3, 8, 8)
    flip = torch.arange(12) % 2 == 0
    result = augment(images, translate=2, flip=flip, generator=torch.Generator().manual_seed(3))
    seen = set()
    for image, mirrored, out in zip(images, flip, result, strict=True):
        start = image.flip(-1) if mirrored else image
        matches = [
            (r, c) for r in range(5) for c in range(5) if torch.equal(shifted(start, r, c, 2), out)
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 4, "all images moved alike"


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_the_loss_has_smoothed_labels(smoothing):
    data, config = striped(), replace(SMALL, batch_size=96, label_smoothing=smoothing)
    network = build_classifier(config, data.names, data.pixels).train()
    ((images, labels),) = epoch_batches(data.pixels, data.labels, config, 0)
    loss = train_epoch(copy.deepcopy(network), make_optimizer(network, config), data, config, 0)
    soft = torch.nn.functional.one_hot(labels, 3) * (1 - smoothing) + smoothing / 3
    expected = -(soft * network(images).log_softmax(1)).sum(1).mean()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)


def test_cutout_greys_one_square():
    images = torch.rand(200, 3, 12, 12)
    result = cut_out(images, 5, generator=torch.Generator().manual_seed(0))
    changed = (result != images).all(1)
    assert torch.equal((result != images).any(1), changed)
    means = images.mean((2, 3))
    heights, widths = changed.any(2).sum(1), changed.any(1).sum(1)
    assert torch.equal(changed.sum((1, 2)), heights * widths), "not a rectangle"
    assert heights.min() == widths.min() == 3 and heights.max() == widths.max() == 5
    assert changed.float().mean(0).min() > 0, "some pixel is never covered"
    for image, mask, mean in zip(result, changed, means, strict=True):
        torch.testing.assert_close(image[:, mask], mean[:, None].expand(-1, int(mask.sum())))


def test_an_image_is_mirrored_in_every_other_epoch():
    data = striped(48)
    config = replace(SMALL, translate=0, small_fraction=0.0, epochs=8)
    mirrored = {}
    for epoch in range(2):
        for batch, _ in epoch_batches(data.pixels, data.labels, config, epoch):
            for image in batch.mul(255).round().to(torch.uint8):
                plain = (data.pixels == image).flatten(1).all(1)
                (row,) = torch.nonzero(plain | (data.pixels == image.flip(-1)).flatten(1).all(1))
                mirrored.setdefault(int(row), []).append(not bool(plain[row]))
    assert len(mirrored) == 48
    assert all(first != second for first, second in mirrored.values())
    assert 8 < sum(first for first, _ in mirrored.values()) < 40


def test_an_epoch_is_a_function_of_seed_and_number():
    data = striped()
    for epoch in (0, 3):
        first, again = (list(epoch_batches(data.pixels, data.labels, SMALL, epoch)) for _ in "ab")
        assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    other = next(epoch_batches(data.pixels, data.labels, replace(SMALL, seed=1), 3))
    assert not torch.equal(first[0][0], other[0])


def test_the_first_part_of_a_run_is_small_and_short_batches_are_left_out():
    data = striped(50)
    sizes = [
        [batch.shape for batch, _ in epoch_batches(data.pixels, data.labels, SMALL, epoch)]
        for epoch in range(4)
    ]
    assert sizes[0] == sizes[1] == [(24, 3, 16, 16)] * 2
    assert sizes[2] == sizes[3] == [(24, 3, 20, 20)] * 2


def test_fewer_images_than_a_batch_still_train():
    data = striped(6)
    batches = list(epoch_batches(data.pixels, data.labels, SMALL, 0))
    assert [len(labels) for _, labels in batches] == [6]


def test_learning_rate_is_a_triangle():
    config = ClassifierTraining(lr=0.5, peak=0.2)
    rates = [learning_rate(config, p) for p in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([0.1, 0.3, 0.5, 0.25, 0.0])


def test_whitening_filters_whiten():
    mixing = torch.randn(3, 3)
    images = torch.einsum("ij,njhw->nihw", mixing, torch.randn(400, 3, 9, 9)).cumsum(-1) / 3
    filters = whitening_filters(images, 2, eps=0.0)
    answers = torch.nn.functional.conv2d(images.double(), filters[:12].double())
    covariance = answers.transpose(0, 1).flatten(1).cov()
    torch.testing.assert_close(covariance, torch.eye(12).double(), atol=1e-3, rtol=0)
    assert torch.equal(filters[12:], -filters[:12])


def test_the_whitening_layer_of_a_plain_net_is_frozen():
    data = striped()
    network = build_classifier(replace(SMALL, arch="plainnet"), data.names, data.pixels)
    assert isinstance(network, CifarPlainNet)
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert frozen == ["trunk.0.weight"]


def test_report_in_closed_form():
    sure, torn = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.6, 0.4]).log()
    logits = torch.stack([sure, sure, torn, torn])
    report = classification_report(logits, torch.tensor([0, 0, 0, 1]))
    assert report["accuracy"] == 0.75
    assert report["ece"] == pytest.approx((2 * 0.1 + 2 * abs(0.6 - 0.5)) / 4)
    expected = -torch.tensor([0.9, 0.9, 0.6, 0.4]).log().mean().item()
    assert report["nll"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("arch, family", [("resnet", CifarResNet), ("plainnet", CifarPlainNet)])
def test_training_learns_and_stores_what_it_measured(arch, family, tmp_path):
    data, config = striped(192), replace(SMALL, arch=arch, epochs=6)
    result = train_classifier(data, striped(60), config, tmp_path, versions={"diffsteer": "x"})
    network = CifarClassifier.from_pretrained(tmp_path)
    assert isinstance(network, family) and network.id == result["id"]
    assert result["test"]["accuracy"] > 0.9
    accuracy = (predict(network, striped(60).pixels).argmax(1) == striped(60).labels).double()
    assert accuracy.mean().item() == result["test"]["accuracy"]
    assert json.loads((tmp_path / "train.json").read_text()) == result
    assert result["config"]["arch"] == arch and result["versions"]["diffsteer"] == "x"
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    data = striped()
    whole = train_classifier(data, data, SMALL, tmp_path / "whole")
    checkpoint, calls = training._checkpoint, []

    def killed(*args):
        checkpoint(*args)
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(data, data, SMALL, tmp_path / "parts")
    assert not (tmp_path / "parts" / "train.json").exists()
    monkeypatch.undo()
    parts = train_classifier(data, data, SMALL, tmp_path / "parts")
    assert parts["id"] == whole["id"]
    assert [line["loss"] for line in parts["log"]] == [line["loss"] for line in whole["log"]]


def test_a_run_may_start_from_another_and_says_so(tmp_path):
    data, still = striped(), replace(SMALL, epochs=1, lr=1e-30)
    first = train_classifier(data, data, SMALL, tmp_path / "first")
    start = CifarClassifier.from_pretrained(tmp_path / "first")
    second = train_classifier(data, data, still, tmp_path / "second", init=start)
    assert second["init"] == first["id"] and first["init"] is None
    reached = CifarClassifier.from_pretrained(tmp_path / "second")
    assert torch.equal(reached.head.weight, start.head.weight)
    with pytest.raises(ValueError, match="weights to start from are of a CifarResNet"):
        train_classifier(data, data, replace(SMALL, width=5), tmp_path / "third", init=start)


def test_a_run_does_not_go_on_with_other_options(tmp_path, monkeypatch):
    data = striped()
    monkeypatch.setattr(training, "_finish", lambda *args: {})
    train_classifier(data, data, SMALL, tmp_path)
    with pytest.raises(ValueError, match=r"other options.*'lr': \(0.1, 0.2\)"):
        train_classifier(data, data, replace(SMALL, lr=0.2), tmp_path)


def test_a_finished_run_is_not_overwritten(tmp_path):
    (tmp_path / "train.json").write_text("precious")
    with pytest.raises(FileExistsError, match="finished run"):
        train_classifier(striped(), striped(), SMALL, tmp_path)
    assert (tmp_path / "train.json").read_text() == "precious"


def test_classes_must_agree(tmp_path):
    other = replace(striped(), names=("a", "b", "c"))
    with pytest.raises(ValueError, match="classes differ"):
        train_classifier(striped(), other, SMALL, tmp_path)


def test_a_full_disk_leaves_no_result(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train_classifier(striped(24), striped(24), replace(SMALL, epochs=1), tmp_path)
    assert [path for path in Path(tmp_path).rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "change",
    [{"epochs": 0}, {"lr": float("nan")}, {"peak": 1.5}, {"arch": "vgg"}, {"translate": -1}],
)
def test_options_are_checked(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(SMALL, **change)
