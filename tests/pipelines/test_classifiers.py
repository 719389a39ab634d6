"""Off-the-shelf classifiers behind the right resize and normalisation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny_clip import tiny_clip
from torch import Tensor, nn
from torch.nn import functional as F

from diffsteer.eval.scorers import ClipScorer, clip_pixels
from diffsteer.pipelines import (
    ImageClassifier,
    clip_classifier,
    latent_classifier,
    load_image_classifier,
    timm_classifier,
    torchvision_classifier,
    transformers_classifier,
)


class Seen(nn.Module):
    """Keeps what it was given; its logits are the channel means."""

    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        return images.mean((2, 3))


def test_resizes_and_normalises() -> None:
    network, images = Seen(), torch.rand(2, 3, 10, 14)
    classifier = ImageClassifier(network, size=5, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    classifier(images)
    whole = F.interpolate(images, (5, 7), mode="bicubic", antialias=True)[..., 1:6]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    torch.testing.assert_close(network.images, (whole - mean) / std)


def test_the_value_range_is_one_switch() -> None:
    images = torch.rand(2, 3, 8, 8)
    unit = ImageClassifier(Seen(), size=4, mean=(0.5,) * 3, std=(0.25,) * 3)
    signed = ImageClassifier(Seen(), size=4, mean=(0.5,) * 3, std=(0.25,) * 3, signed=True)
    torch.testing.assert_close(signed(2 * images - 1), unit(images))


def test_is_differentiable_and_frozen() -> None:
    classifier = ImageClassifier(nn.Sequential(nn.Conv2d(3, 4, 3), Seen()), size=6).train()
    classifier.eval()
    images = torch.rand(1, 3, 12, 12, requires_grad=True)
    classifier(images).sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0
    assert not any(p.requires_grad for p in classifier.parameters())


def test_the_network_is_given_its_own_dtype() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Seen()).bfloat16()
    assert ImageClassifier(network)(torch.rand(1, 3, 8, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ImageClassifier(lambda x: x), TypeError, "torch module"),
        (lambda: ImageClassifier(Seen(), size=(1, 2, 3)), ValueError, "size"),
        (lambda: ImageClassifier(Seen(), mean=(0.0,)), ValueError, "mean and std"),
        (lambda: ImageClassifier(Seen(), std=(1.0, 0.0, 1.0)), ValueError, "std positive"),
        (lambda: ImageClassifier(Seen(), interpolation="cubic"), ValueError, "bilinear"),
        (lambda: ImageClassifier(Seen())(torch.zeros(1, 4, 8, 8)), ValueError, "3, H, W"),
        (lambda: ImageClassifier(Seen())(torch.zeros(1, 3, 8, 8).int()), ValueError, "float"),
        (lambda: load_image_classifier("nowhere"), FileNotFoundError, "no folder 'nowhere'"),
        (lambda: transformers_classifier("/nowhere/at/all"), ValueError, "cannot load"),
        (lambda: torchvision_classifier(Seen()), (ImportError, ValueError), "weights|extra|pip"),
        (lambda: clip_classifier(None, ["one"]), ValueError, "two classes"),
    ],
)
def test_bad_input_is_named(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_a_classifier_of_latents() -> None:
    network = Seen()
    classifier = latent_classifier(network, 16, size=4)
    latents = torch.randn(2, 16, 8, 8)
    assert classifier(latents).shape == (2, 16)
    torch.testing.assert_close(
        network.images, F.interpolate(latents, (4, 4), mode="bilinear", antialias=True)
    )


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A tiny real image classifier of transformers, saved with its preprocessing."""
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=12, patch_size=4, num_labels=3, id2label={0: "cat", 1: "dog", 2: "fox"},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    note = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 12, "width": 12},
        "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 2,
        "do_normalize": True,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(note))
    return tmp_path


def test_transformers_models_bring_their_preprocessing(vit: Path) -> None:
    classifier = transformers_classifier(vit)
    assert classifier.size == (12, 12) and classifier.interpolation == "bilinear"
    assert classifier.id2label == {0: "cat", 1: "dog", 2: "fox"}
    images = torch.rand(2, 3, 12, 12)
    mean, std = classifier.mean, classifier.std
    want = classifier.network(pixel_values=(images - mean) / std).logits
    torch.testing.assert_close(classifier(images), want)
    assert not torch.allclose(want[0], want[1])
    loaded = transformers.ViTForImageClassification.from_pretrained(vit)
    torch.testing.assert_close(transformers_classifier(loaded)(images), want)
    by_word = load_image_classifier(f"transformers:{vit}")
    torch.testing.assert_close(by_word(images), want)


def test_transformers_models_without_preprocessing_ask_for_it(vit: Path) -> None:
    (vit / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="size=, mean= and std="):
        transformers_classifier(vit)
    given = transformers_classifier(vit, size=12, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert given(torch.rand(1, 3, 24, 24)).shape == (1, 3)


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_timm_models_bring_their_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm is no dependency: a stand-in with the two functions that are used of it."""
    network = Seen()
    found = {
        "input_size": (3, 20, 24), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6),
        "interpolation": "bicubic", "crop_pct": 0.9,
    }  # fmt: skip
    data = SimpleNamespace(resolve_model_data_config=lambda model: found)
    made: list[tuple[str, bool]] = []

    def create_model(name: str, pretrained: bool) -> nn.Module:
        made.append((name, pretrained))
        return network

    fake(monkeypatch, "timm", create_model=create_model, data=data)
    classifier = timm_classifier("resnet50.a1_in1k")
    assert made == [("resnet50.a1_in1k", True)] and classifier.size == (20, 24)
    assert classifier.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert timm_classifier(network, size=8).size == (8, 8)


def test_torchvision_models_bring_their_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision is no dependency: a stand-in with the two functions that are used of it."""
    transform = SimpleNamespace(
        crop_size=[24], mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear"
    )
    entry = SimpleNamespace(
        transforms=lambda: transform, meta={"categories": ["tench", "goldfish"]}
    )
    asked: list[Any] = []

    def get_model(name: str, weights: Any) -> nn.Module:
        asked.append((name, weights))
        return Seen()

    members = {"get_model": get_model, "get_model_weights": lambda name: {"IMAGENET1K_V2": entry}}
    fake(monkeypatch, "torchvision")
    fake(monkeypatch, "torchvision.models", **members)
    classifier = load_image_classifier("torchvision:resnet50@IMAGENET1K_V2")
    assert asked == [("resnet50", entry)]
    assert isinstance(classifier, ImageClassifier) and classifier.size == (24, 24)
    assert classifier.id2label == {0: "tench", 1: "goldfish"}
    assert torchvision_classifier(Seen(), weights=entry).interpolation == "bilinear"
    with pytest.raises(ValueError, match="torchvision has no"):
        torchvision_classifier("resnet50", weights="V9")


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_a_missing_library_is_named_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{name}.models", None)
    with pytest.raises(ImportError, match=rf"needs {name}.*diffsteer\[classifiers\]"):
        load_image_classifier(f"{name}:resnet50")


def test_zero_shot_logits_are_the_cosines_of_the_scorer() -> None:
    model, tokenizer = tiny_clip()
    scorer = ClipScorer(model, tokenizer, scale="cosine")
    texts = ["a red fox", "two blue birds", "a boat"]
    classifier = clip_classifier(scorer, texts)
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    want = torch.stack([scorer(pixels, [text]) for text in texts], 1)
    torch.testing.assert_close(classifier(pixels / 255), 100 * want, rtol=1e-3, atol=1e-3)
    assert clip_pixels(pixels[0], 16).shape == (3, 16, 16)


def test_the_embedded_classifier_by_its_word() -> None:
    classifier = load_image_classifier("embedded")
    assert not classifier.training and classifier(torch.rand(1, 3, 32, 32)).shape == (1, 10)
