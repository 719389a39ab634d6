"""Label maps, merged classes, and their check against labelled images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffsteer.guidance import (
    CalibratedClassifierGuidance,
    GradientFreeClassifierGuidance,
    MergedClasses,
    check_label_map,
    match_classes,
)
from diffsteer.guidance.labels import classify, own_labels


def brightest(images: Tensor) -> Tensor:
    """Names the channel that is brightest."""
    return 9 * images.mean((2, 3))


def examples(count: int = 30, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Images whose brightest channel is their class."""
    labels = torch.arange(count) % classes
    images = 0.5 * torch.rand(count, classes, 4, 4)
    images[torch.arange(count), labels] += 0.5
    return images, labels


def test_the_map_is_read_backwards_for_labels() -> None:
    table = torch.tensor([5, 3, 8])
    own, known = own_labels(torch.tensor([8, 5, 7, 3]), 3, table)
    assert own[known].tolist() == [2, 0, 1] and known.tolist() == [True, True, False, True]
    own, known = own_labels(torch.tensor([0, 2, 3, -1]), 3)
    assert known.tolist() == [True, True, False, False] and own[:2].tolist() == [0, 2]


def test_a_right_map_gives_the_accuracy_of_the_classifier() -> None:
    images, labels = examples()
    found = check_label_map(brightest, images, labels, batch_size=7)
    assert found.accuracy == 1.0 and found.count == 30 and not found.confused
    order = torch.tensor([2, 0, 3, 1])  # the pipeline's label of each class
    assert check_label_map(brightest, images, order[labels], label_map=order).accuracy == 1.0


def test_a_permuted_map_is_found_and_named() -> None:
    images, labels = examples()
    swapped = torch.tensor([1, 0, 2, 3])
    with pytest.raises(ValueError, match=r"less than 90%.*0 is named 1 in 100%"):
        check_label_map(brightest, images, labels, label_map=swapped, least=0.9)
    found = check_label_map(brightest, images, labels, label_map=swapped, least=0.2)
    assert {pair[:2] for pair in found.confused} == {(0, 1), (1, 0)}


def test_merged_classes_have_the_probability_of_the_group() -> None:
    logits = torch.randn(5, 6)
    merged = MergedClasses(lambda _: logits, [[3], [0, 5], [1, 2, 4]])(logits).softmax(1)
    p = logits.softmax(1)
    want = torch.stack([p[:, 3], p[:, [0, 5]].sum(1), p[:, [1, 2, 4]].sum(1)], 1)
    torch.testing.assert_close(merged, want)
    kept = MergedClasses(lambda _: logits, [[3], [0]])(logits)
    assert torch.equal(kept, logits[:, [3, 0]])


def test_names_pair_the_classes_that_both_have() -> None:
    names = {0: "goldfish, Carassius auratus", 1: "tabby", 2: "crane", 3: "crane", 4: "Dog"}
    pipeline = {0: "dog", 1: "Carassius_Auratus", 2: "crane"}
    classifier, table = match_classes(lambda x: x, names, pipeline)
    logits = torch.randn(2, 5)
    assert torch.equal(classifier(logits), logits[:, [0, 4]])
    assert table is not None and table.tolist() == [1, 0]
    same, none = match_classes(brightest, names, dict(names))
    assert same is brightest and none is None


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: MergedClasses(nn.Linear(2, 2), [[0], [1]]), "training mode"),
        (lambda: MergedClasses(brightest, [[0]]), "two or more"),
        (lambda: MergedClasses(brightest, [[0], []]), "none empty"),
        (lambda: MergedClasses(brightest, [[0], [0, 1]]), "class 0 is in two groups"),
        (lambda: MergedClasses(brightest, [[0], [9]])(torch.rand(1, 3, 2, 2)), "has 3"),
        (lambda: match_classes(brightest, {0: "a", 1: "b"}, {0: "c", 1: "a"}), "fewer than two"),
        (lambda: match_classes(brightest, {}, {0: "c"}), "has no class names"),
        (lambda: match_classes(brightest, {0: "a", 1: "b, c"}, {0: "a", 1: "b", 2: "c"}), "two p"),
        (lambda: check_label_map(brightest, torch.rand(0, 3, 2, 2), torch.zeros(0)), "N > 0"),
        (lambda: check_label_map(brightest, *examples(classes=3)[:1], torch.tensor([0])), "labels"),
        (lambda: check_label_map(brightest, examples()[0], examples()[1] + 1), "no classes"),
        (lambda: check_label_map(nn.Linear(2, 2), *examples()), "training mode"),
    ],
)
def test_bad_input_is_named(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


RULES = (GradientFreeClassifierGuidance, CalibratedClassifierGuidance)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "table, error, words",
    [
        (torch.tensor([1, 1, 0]), ValueError, "twice"),
        (torch.tensor([[1, 0]]), ValueError, "label_map must hold"),
        (torch.tensor([-1, 0]), ValueError, "from 0 up"),
        (torch.tensor([1.0, 0.0]), TypeError, "integer"),
        ([1, 0], TypeError, "integer"),
    ],
)
def test_rules_refuse_label_maps_that_are_none(
    rule: Any, table: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        rule(brightest, label_map=table)


def test_a_classifier_of_another_size_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 3, 8, 8\).*ImageClassifier\(network"):
        classify(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.rand(1, 3, 8, 8))
    with pytest.raises(TypeError, match="transformers_classifier"):
        classify(lambda images: {"logits": images}, torch.rand(1, 3))
