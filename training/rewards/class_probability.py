"""How surely a classifier sees what an image was meant to show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...eval.classifiers import EMBEDDED_FOLDERS, CifarClassifier, load_classifier
from .protocol import Metadata

__all__ = ["ClassProbability"]

MODES = ("probability", "log", "correct")


class ClassProbability:
    """The probability that a classifier gives to the class an image should show.

    Args:
        classifier: "guidance" or "evaluation", one of the two in the package; the folder of one
            that was trained here; or any callable from images in [0, 1] to logits (B, classes), or
            to an output that has ``logits``.
        label: the class, by index or by name where the classifier has names; None takes
            ``metadata[i]["label"]``, and an image without one gets no score.
        mode: "probability"; "log", its logarithm; or "correct", 1 where the class is the most
            probable one and else 0, which has no gradient.
        resolution: images are resized to this side first (bilinear, antialiased); None does not for
            a callable, and to the 32 pixels they were trained on for the package's own.
        device: moves a classifier that is a module.

    Raises:
        ValueError: unknown classifier, mode or label.
        FileNotFoundError: there is no such folder.
    """

    def __init__(
        self,
        classifier: str | Path | Callable[[Tensor], Any] = "evaluation",
        *,
        label: int | str | None = None,
        mode: Literal["probability", "log", "correct"] = "probability",
        resolution: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.classifier: Callable[[Tensor], Any] = _open(classifier)
        own = isinstance(self.classifier, CifarClassifier)
        self.mode, self.resolution = mode, resolution or (32 if own else None)
        if isinstance(self.classifier, nn.Module):
            self.classifier.eval()
            if device is not None:
                self.classifier.to(device)
        self.label = None if label is None else self._index(label)

    def __call__(
        self, images: Tensor, prompts: Sequence[str] = (), metadata: Sequence[Metadata] = ()
    ) -> Sequence[float | None] | Tensor:
        """Scores (B,); one pass of the classifier."""
        if self.label is not None:
            return self._scores(images, [self.label] * len(images))
        labels = [item.get("label") for item in metadata] or [None] * len(images)
        known = [index for index, label in enumerate(labels) if label is not None]
        if not known:
            return [None] * len(images)
        found = self._scores(images[known], [self._index(labels[index]) for index in known])
        if len(known) == len(images):
            return found
        scores: list[float | None] = [None] * len(images)
        for index, score in zip(known, found.tolist(), strict=True):
            scores[index] = score
        return scores

    def _scores(self, images: Tensor, labels: list[int]) -> Tensor:
        size = self.resolution
        if size is not None and images.shape[2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        if isinstance(self.classifier, nn.Module):
            first = next(self.classifier.parameters(), images)
            images = images.to(first.device, first.dtype)
        output = self.classifier(images)
        logits: Tensor = getattr(output, "logits", output).float()
        index = torch.tensor(labels, device=logits.device)
        if int(max(labels)) >= logits.shape[1]:
            raise ValueError(
                f"the label {max(labels)} is out of range: the classifier knows "
                f"{logits.shape[1]} classes"
            )
        if self.mode == "correct":
            return (logits.argmax(1) == index).float()
        chosen = logits.log_softmax(1).gather(1, index[:, None])[:, 0]
        return chosen if self.mode == "log" else chosen.exp()

    def _index(self, label: Any) -> int:
        if not isinstance(label, str):
            if int(label) < 0:
                raise ValueError(f"label must be a class index from 0 up, got {label}")
            return int(label)
        names = getattr(self.classifier, "id2label", None) or getattr(
            getattr(self.classifier, "config", None), "id2label", {}
        )
        index = {name: int(number) for number, name in names.items()}
        if label not in index:
            known = ", ".join(index) or "none: give the index"
            raise ValueError(f"label: unknown class name {label!r}; the classifier knows {known}")
        return index[label]


def _open(classifier: str | Path | Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    if not isinstance(classifier, str | Path):
        return classifier
    if classifier in EMBEDDED_FOLDERS:
        return load_classifier("guidance" if classifier == "guidance" else "evaluation")
    if not Path(classifier).is_dir():
        raise FileNotFoundError(
            f"classifier must be one of {', '.join(sorted(EMBEDDED_FOLDERS))} or a folder, got "
            f"{str(classifier)!r}"
        )
    return CifarClassifier.from_pretrained(classifier)
