"""Between the classes of a pipeline and those of a classifier: maps, merged classes, checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.tensors import widen
from .checks import check_classifier

Classifier = Callable[[Tensor], Tensor]


def check_table(label_map: Tensor | None) -> None:
    """Refuse a label map that is no list of different labels.

    Raises:
        TypeError: if it is no integer tensor.
        ValueError: if it has another shape than (K,), a negative entry, or one entry twice.
    """
    if label_map is None:
        return
    if not isinstance(label_map, Tensor) or label_map.is_floating_point():
        raise TypeError(f"label_map must be an integer tensor (K,), got {label_map!r}")
    labels = label_map.tolist() if label_map.ndim == 1 else []
    if not labels or min(labels) < 0:
        raise ValueError(
            f"label_map must hold the pipeline's label of each class of the classifier, (K,), from "
            f"0 up; got {label_map!r}. Leave classes out with match_classes"
        )
    if doubles := _doubles(labels):
        raise ValueError(
            f"label_map names a label twice ({doubles[0]}): one class would stand for two; join "
            "the classifier's classes first: MergedClasses(classifier, groups)"
        )


def check_logits(logits: Tensor, samples: int, *, least: int = 2) -> None:
    """Refuse what is not one row of logits an image.

    Raises:
        ValueError: naming the shape.
    """
    if logits.ndim != 2 or logits.shape[0] != samples or logits.shape[1] < least:
        raise ValueError(
            f"classifier must return logits ({samples}, K), one row an image, K > {least - 1}, got "
            f"{tuple(logits.shape)}"
        )


def classify(classifier: Classifier, images: Tensor, *, least: int = 2) -> Tensor:
    """``classifier(images)`` in float32 or wider, (B, K) with K of at least ``least``.

    Raises:
        TypeError: if it returns no tensor.
        ValueError: if the classifier cannot take these images, or returns no row of logits each.
    """
    try:
        logits = classifier(images)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"classifier failed on images of shape {tuple(images.shape)}: {reason}. If it wants "
            "another size, wrap it: diffsteer.pipelines.ImageClassifier(network, size=224); for "
            "latents give the rule decode=image_decoder(pipe)"
        ) from error
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"classifier must return logits, a tensor, got {type(logits).__name__}; for a "
            "transformers model use diffsteer.pipelines.transformers_classifier(model)"
        )
    check_logits(logits, images.shape[0], least=least)
    return widen(logits)


def own_labels(
    labels: Tensor, classes: int, label_map: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The pipeline's labels in the classifier's numbering.

    Args:
        labels: in the pipeline's numbering, (B,).
        classes: K, how many classes the classifier has.
        label_map: the pipeline's label of each class, (K,), on the device of ``labels``; None if
            both count alike.

    Returns:
        The labels, clamped to [0, K), and which of them the classifier knows, both (B,). Nothing
        waits for the device.

    Raises:
        ValueError: if the map has another length than K.
    """
    if label_map is None:
        return labels.clamp(0, classes - 1), (labels >= 0) & (labels < classes)
    if len(label_map) != classes:
        raise ValueError(f"label_map has {len(label_map)} entries for {classes} classes")
    same = labels[:, None] == label_map[None]
    return same.long().argmax(1), same.any(1)


def check_classes(classes: int, label_map: Tensor | None, model: int | None) -> None:
    """Refuse a classifier whose classes are not those of the model. Waits for the device.

    Args:
        classes: K, how many classes the classifier has.
        label_map: the model's label of each, (K,); None if both count alike.
        model: how many classes the model has; nothing is checked where it is None.

    Raises:
        ValueError: if the numbers differ and there is no map, or it leads out of the model.
    """
    if model is None:
        return
    if label_map is None and classes != model:
        raise ValueError(
            f"the classifier has {classes} classes, the model {model}; pass label_map, the model's "
            "label of each class (match_classes pairs them by name), or join and leave out "
            "classes with MergedClasses"
        )
    if label_map is not None and int(label_map.max()) >= model:
        raise ValueError(
            f"label_map names label {int(label_map.max())}, but the model has {model} classes, "
            f"0 to {model - 1}"
        )


def require_sound(labels: Tensor, known: Tensor, logits: Tensor) -> None:
    """Refuse labels that are no classes, and logits that are no numbers. Waits for the device.

    Raises:
        ValueError: naming the labels, or the classifier.
    """
    if not bool(known.all()):
        raise ValueError(
            f"labels {labels[~known].tolist()} are no classes of the classifier, which has "
            f"{logits.shape[1]}; pass label_map"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            "classifier returned NaN or infinity for the first images it saw; try float32 or "
            "bfloat16, and check what decode gives it"
        )


@dataclass(frozen=True, eq=False)
class MergedClasses:
    """A classifier over groups of another one's classes; classes in no group are left out.

    The logit of a group is the logsumexp of its members, so that softmax gives the probability of
    the group among all that are kept.

    Args:
        classifier: images to logits (B, K).
        groups: class indices of each group, e.g. ``[[3], [5, 6]]``.

    Raises:
        TypeError: if the classifier is not callable.
        ValueError: for fewer than two groups, an empty one, a class in two of them, or a classifier
            in training mode.
    """

    classifier: Classifier
    groups: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        """Check the groups."""
        check_classifier(self.classifier)
        members = [index for group in self.groups for index in group]
        if len(self.groups) < 2 or not all(self.groups):
            raise ValueError(f"groups must be two or more, none empty, got {self.groups}")
        doubles = _doubles(members)
        if doubles or min(members) < 0:
            wrong = f"class {doubles[0]} is in two groups" if doubles else "an index is negative"
            raise ValueError(f"groups: {wrong}")

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of the groups, (B, len(groups)).

        Raises:
            ValueError: if a group names a class that the classifier does not have.
        """
        logits = self.classifier(images)
        largest, widest = max(map(max, self.groups)), max(map(len, self.groups))
        if largest >= logits.shape[1]:
            raise ValueError(
                f"groups name class {largest}, but the classifier has {logits.shape[1]}"
            )
        rows = [[*group, *[group[0]] * (widest - len(group))] for group in self.groups]
        picked = logits[:, torch.tensor(rows, device=logits.device)]
        if widest == 1:
            return picked[..., 0]
        sizes = torch.tensor([len(group) for group in self.groups], device=logits.device)
        padding = torch.arange(widest, device=logits.device) >= sizes[:, None]
        return picked.masked_fill(padding, -torch.inf).logsumexp(-1)


def match_classes(
    classifier: Classifier, names: Mapping[int, str], pipeline: Mapping[int, str]
) -> tuple[Classifier, Tensor | None]:
    """The classifier's classes that the pipeline has too, paired by name.

    Args:
        classifier: images to logits.
        names: the classifier's class names, ``classifier.id2label``.
        pipeline: the pipeline's, ``pipe.id2label``.

    Returns:
        The classifier, restricted to the shared classes, and the label map of rules. If both lists
        are equal they are taken to count alike, and the map is None. Names are compared without
        case and by each of their synonyms ("great white shark, white shark").

    Raises:
        ValueError: if fewer than two names are shared, or one name stands for two classes.
    """
    ours, theirs = _by_synonym(names, "classifier"), _by_synonym(pipeline, "pipeline")
    if [_plain(n) for n in names.values()] == [_plain(n) for n in pipeline.values()]:
        return classifier, None
    pairs = sorted({(ours[name], theirs[name]) for name in ours.keys() & theirs.keys()})
    for side, word in ((0, "classifier"), (1, "pipeline")):
        if doubles := _doubles(pair[side] for pair in pairs):
            raise ValueError(
                f"class {doubles[0]} of the {word} has two partners by name: {pairs}; write the "
                "label map yourself, or join classes with MergedClasses"
            )
    if len(pairs) < 2:
        raise ValueError(
            f"the classifier ({_few(names)}) and the pipeline ({_few(pipeline)}) share fewer than "
            "two class names; write the label map yourself"
        )
    kept = MergedClasses(classifier, [[own] for own, _ in pairs])
    return kept, torch.tensor([label for _, label in pairs])


def _doubles(values: Iterable[int]) -> list[int]:
    """What occurs more than once, in order."""
    return sorted(value for value, count in Counter(values).items() if count > 1)


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def _by_synonym(names: Mapping[int, str], whose: str) -> dict[str, int]:
    if not names:
        raise ValueError(f"the {whose} has no class names; write the label map yourself")
    found: dict[str, int] = {}
    ambiguous: set[str] = set()
    for index, text in names.items():
        for word in {_plain(word) for word in text.split(",")}:
            if found.setdefault(word, int(index)) != int(index):
                ambiguous.add(word)  # "crane" is a bird and a machine: it pairs nothing
    return {word: index for word, index in found.items() if word not in ambiguous}


def _few(names: Mapping[int, str]) -> str:
    shown = ", ".join(list(names.values())[:3])
    return f"{len(names)} classes: {shown}, ..."
