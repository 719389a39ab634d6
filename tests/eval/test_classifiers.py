"""The classifiers: their interface, their files, and the two that ship with the package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from diffsteer.eval import classifiers
from diffsteer.eval.classifiers import (
    CIFAR10_CLASSES,
    EMBEDDED_FOLDERS,
    CifarClassifier,
    CifarPlainNet,
    CifarResNet,
    PlainNetConfig,
    ResNetConfig,
    load_classifier,
)

EMBEDDED = Path(classifiers.__file__).parent / "embedded"
SMALL = [CifarResNet(ResNetConfig(width=4)), CifarPlainNet(PlainNetConfig(widths=(4, 6, 8)))]


@pytest.fixture(params=SMALL, ids=lambda network: type(network).__name__)
def network(request) -> CifarClassifier:
    """A small network with no weight and no statistic at its initial value."""
    fresh = type(request.param)(request.param.config)
    for value in fresh.state_dict().values():
        if value.is_floating_point() and value.ndim < 4:
            value.uniform_(0.5, 1.5)
    return fresh.eval()


def test_each_row_stands_alone(network):
    images = torch.rand(5, 3, 32, 32)
    rows = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(network(images), rows)
    assert rows.std(0).min() > 0, "all images get the same logits"


def test_features_are_what_the_logits_are_made_of(network):
    images = torch.rand(3, 3, 32, 32)
    features = network.features(images)
    assert features.shape == (3, network.feature_size)
    torch.testing.assert_close(network.logits(features), network(images))
    weight = network.head.weight * network.config.logit_scale
    torch.testing.assert_close(network(images), features @ weight.T)


def test_images_are_normalised_inside(network):
    images = torch.rand(2, 3, 32, 32)
    expected = network(images)
    network.mean.mul_(2).sub_(0.1)
    network.std.mul_(2)
    torch.testing.assert_close(network(2 * images - 0.1), expected)


def test_gradient_in_the_images(network):
    network.double()
    images = torch.rand(1, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(images)[0, 3], images)
    step = 1e-6 * torch.randn_like(images)
    change = (network(images + step) - network(images - step))[0, 3] / 2
    torch.testing.assert_close((gradient * step).sum(), change, rtol=1e-4, atol=0)


def test_a_residual_block_reuses_one_relu():
    """What calibrated guidance replaces: swapping modules must reach every activation."""
    network = CifarResNet(ResNetConfig(width=4)).eval()
    found = [name for name, module in network.named_modules() if isinstance(module, nn.ReLU)]
    calls = []
    for name, module in network.named_modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    network(torch.rand(1, 3, 32, 32))
    assert len(found) == 6 and len(calls) == 8


def test_saved_and_read_back(network, tmp_path):
    network.save_pretrained(tmp_path / "a")
    read = CifarClassifier.from_pretrained(tmp_path / "a")
    assert type(read) is type(network) and read.config == network.config and not read.training
    for name, value in network.state_dict().items():
        kernel = sum(side > 1 for side in value.shape) > 1
        stored = value.half().float() if kernel else value
        assert torch.equal(read.state_dict()[name], stored), name
    read.save_pretrained(tmp_path / "b")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_float32_files_are_exact(network, tmp_path):
    network.save_pretrained(tmp_path, dtype=torch.float32)
    assert CifarClassifier.from_pretrained(tmp_path).id == network.id


def test_id_names_family_and_weights(network):
    before = network.id
    assert before == f"{type(network).__name__}-{network.digest[:12]}"
    network.train().to(memory_format=torch.channels_last)
    assert network.id == before
    with torch.no_grad():
        network.head.weight[0, 0] += 1e-3
    assert network.id != before


def test_a_mirrored_network_averages_the_features_of_both_views(network, tmp_path):
    both = type(network)(replace(network.config, mirrored=True))
    both.load_state_dict(network.state_dict())
    images = torch.rand(3, 3, 20, 24)
    views = network.features(images), network.features(images.flip(-1))
    assert not torch.allclose(*views), "both views look alike: nothing is tested"
    torch.testing.assert_close(both.eval().features(images), sum(views) / 2)
    torch.testing.assert_close(both(images), both(images.flip(-1)))
    assert both.id != network.id and both.digest == network.digest
    both.save_pretrained(tmp_path, dtype=torch.float32)
    assert CifarClassifier.from_pretrained(tmp_path).id == both.id
    assert torch.equal(both.train().features(images), network.train().features(images))


def test_class_names(network):
    assert network.id2label[3] == "cat" and len(network.id2label) == 10
    pair = CifarResNet(ResNetConfig(width=2, class_names=("yes", "no")))
    assert pair(torch.rand(1, 3, 32, 32)).shape == (1, 2)
    assert pair.id2label == {0: "yes", 1: "no"}


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def flip_a_byte(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 0x40
    file.write_bytes(content)


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:99])


def swap_weights(folder: Path) -> None:
    CifarPlainNet(PlainNetConfig(widths=(3,))).save_pretrained(folder / "other")
    (folder / "other" / "model.safetensors").rename(folder / "model.safetensors")


BROKEN = {
    "no configuration": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "half a file": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:99]
        ),
        r"model.safetensors is damaged",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json is damaged"),
    "one bit": (flip_a_byte, "checksum differs; restore both files"),
    "other weights": (swap_weights, "checksum differs; restore both files"),
    "nine classes": (lambda f: edit_config(f, class_names=list("abcdefghi")), "with 9 classes"),
    "one class": (lambda f: edit_config(f, class_names=["a"]), "at least two class_names"),
    "other width": (lambda f: edit_config(f, width=8), "do not fit"),
    "other family": (lambda f: edit_config(f, **{"class": "VGG"}), "class 'VGG', expected one of"),
    "unknown option": (lambda f: edit_config(f, depth=3), "'depth'"),
}


@pytest.mark.parametrize("damage, message", BROKEN.values(), ids=BROKEN)
def test_broken_folders_say_what_is_wrong(damage, message, tmp_path):
    CifarResNet(ResNetConfig(width=4)).save_pretrained(tmp_path)
    CifarClassifier.from_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CifarClassifier.from_pretrained(tmp_path)


def test_the_wrong_family_is_refused(tmp_path):
    CifarResNet(ResNetConfig(width=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a CifarResNet, not a CifarPlainNet"):
        CifarPlainNet.from_pretrained(tmp_path)


def test_a_full_disk_leaves_the_saved_network(tmp_path, monkeypatch):
    CifarResNet(ResNetConfig(width=4)).save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        CifarResNet(ResNetConfig(width=5)).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "images, error, message",
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, r"torch.uint8; divide by 255"),
        (torch.zeros(3, 32, 32), ValueError, r"got \(3, 32, 32\)"),
        (torch.zeros(2, 1, 32, 32), ValueError, r"got \(2, 1, 32, 32\)"),
        (torch.zeros(2, 3, 32, 8), ValueError, "at least 16"),
    ],
)
def test_images_are_checked(network, images, error, message):
    with pytest.raises(error, match=message):
        network(images)


@pytest.mark.parametrize("width", [0, -1, 1.5, "32"])
def test_sizes_are_checked(width):
    with pytest.raises(ValueError, match="width must"):
        ResNetConfig(width=width)
    with pytest.raises(ValueError, match="widths must"):
        PlainNetConfig(widths=(4, width))


def test_the_configuration_must_be_of_the_family():
    with pytest.raises(TypeError, match="CifarResNet needs a ResNetConfig"):
        CifarResNet(PlainNetConfig())


@pytest.mark.parametrize("name", EMBEDDED_FOLDERS)
def test_embedded_classifiers(name):
    network = load_classifier(name)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert network.config.class_names == CIFAR10_CLASSES and network.feature_size <= 256
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(images).logsumexp(1).sum(), images)
    assert gradient.flatten(1).norm(dim=1).min() > 0


@pytest.mark.parametrize("name", EMBEDDED_FOLDERS)
def test_the_measured_accuracy_is_of_the_shipped_weights(name):
    result = json.loads((EMBEDDED / EMBEDDED_FOLDERS[name] / "train.json").read_text())
    assert result["id"] == load_classifier(name).id
    assert result["test"]["accuracy"] >= 0.90


def test_the_embedded_classifiers_are_of_two_families_and_small():
    assert type(load_classifier("guidance")) is not type(load_classifier("evaluation"))
    size = sum(file.stat().st_size for file in EMBEDDED.rglob("*.safetensors"))
    assert size <= 3e6


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"one of \['evaluation', 'guidance'\], got 'resnet'"):
        load_classifier("resnet")
