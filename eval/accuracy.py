"""How often a classifier recognises the class that a sample was asked to show."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassAccuracy:
    """Top-1, top-5, macro precision, and accuracy of each class (NaN where a class has no sample).

    Args:
        top1: share of samples whose label is the first guess.
        top5: share of samples whose label is among the first five guesses.
        macro_precision: mean over classes of ``TP / (TP + FP)``; a class never predicted counts 0.
        never_predicted: how many classes that are.
        per_class: shape (classes,), top-1 accuracy.
        stderr: binomial standard error of ``top1``.
    """

    top1: float
    top5: float
    macro_precision: float
    never_predicted: int
    per_class: Tensor
    stderr: float


def class_accuracy(logits: Tensor, labels: Tensor) -> ClassAccuracy:
    """Agreement of a classifier with the labels that the samples were conditioned on.

    Macro precision is the classification precision that classifier-guidance papers report; it has
    nothing to do with the nearest-neighbour precision of ``prdc``.

    Args:
        logits: shape (N, classes).
        labels: shape (N,), integer, in [0, classes).

    Raises:
        ValueError: if there is no sample, the shapes do not fit, or a label is out of range.
    """
    count, classes = logits.shape
    if labels.shape != (count,) or count == 0:
        raise ValueError(f"expected one label for each of {count} samples, got {labels.shape}")
    labels = labels.to(logits.device, torch.int64)
    if bool(((labels < 0) | (labels >= classes)).any()):
        bad = labels[(labels < 0) | (labels >= classes)][0]
        raise ValueError(
            f"labels must be in [0, {classes}), got {int(bad)}; is it the right classifier?"
        )
    guesses = logits.topk(min(5, classes), dim=1).indices
    hit = guesses == labels[:, None]
    right, first = hit[:, 0], guesses[:, 0]
    predicted = torch.bincount(first, minlength=classes).double()
    correct = torch.bincount(labels[right], minlength=classes).double()
    asked = torch.bincount(labels, minlength=classes).double()
    top1 = float(right.double().mean())
    return ClassAccuracy(
        top1=top1,
        top5=float(hit.any(1).double().mean()),
        macro_precision=float((correct / predicted.clamp_min(1)).mean()),
        never_predicted=int((predicted == 0).sum()),
        per_class=correct / asked,
        stderr=(top1 * (1 - top1) / count) ** 0.5,
    )
