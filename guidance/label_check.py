"""Whether a classifier names real images as the pipeline does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_classifier
from .labels import Classifier, check_table, classify, own_labels, require_sound


@dataclass(frozen=True)
class LabelCheck:
    """How a classifier names labelled images.

    Attributes:
        accuracy: share of images that are named as their label.
        count: images.
        confused: ``(label, named, share)``: labels of which more than half are named as one other
            class; a permuted label map shows here.
    """

    accuracy: float
    count: int
    confused: tuple[tuple[int, int, float], ...]


def check_label_map(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    label_map: Tensor | None = None,
    least: float = 0.5,
    batch_size: int = 64,
) -> LabelCheck:
    """Check a label map against real images whose labels are known.

    Args:
        classifier: images to logits (B, K).
        images: as the classifier takes them, (N, ...), N of a few per class.
        labels: in the pipeline's numbering, (N,).
        label_map: the pipeline's label of each class of the classifier, (K,); None if both count
            alike.
        least: smallest accuracy that is accepted.
        batch_size: images a call.

    Returns:
        The accuracy, to be compared with the one published for the classifier.

    Raises:
        TypeError: if the classifier is not callable, or gives no logits.
        ValueError: if the accuracy is below ``least``: the text says which labels are named as
            which; also for labels that are no classes, logits that are no numbers, and a classifier
            in training mode.
    """
    check_table(label_map)
    check_classifier(classifier)
    if not len(images) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"expected images (N, ...) and labels (N,), N > 0, got {tuple(images.shape)} and "
            f"{tuple(labels.shape)}"
        )
    with torch.inference_mode():
        logits = torch.cat(
            [classify(classifier, part).cpu() for part in torch.split(images, batch_size)]
        )
    labels, table = labels.cpu().long(), None if label_map is None else label_map.cpu()
    require_sound(labels, own_labels(labels, logits.shape[1], table)[1], logits)
    named = logits.argmax(1) if table is None else table[logits.argmax(1)]
    accuracy = float((named == labels).double().mean())
    result = LabelCheck(accuracy, len(labels), _confused(labels, named))
    if accuracy < least:
        seen = "; ".join(f"{a} is named {b} in {s:.0%}" for a, b, s in result.confused[:5])
        raise ValueError(
            f"the classifier names {accuracy:.1%} of {len(labels)} labelled images right, less "
            f"than {least:.0%}: the label map, the input size or the value range is wrong"
            + (f" ({seen})" if seen else "")
        )
    return result


def _confused(labels: Tensor, named: Tensor) -> tuple[tuple[int, int, float], ...]:
    found = []
    for label in torch.unique(labels).tolist():
        given, counts = torch.unique(named[labels == label], return_counts=True)
        top = int(counts.argmax())
        share = float(counts[top]) / int(counts.sum())
        if share > 0.5 and int(given[top]) != label:
            found.append((label, int(given[top]), share))
    return tuple(found)
