"""Off-the-shelf classifiers, made ready for guidance: right size, right normalisation, frozen.

    classifier = ImageClassifier(network, size=64, mean=(0.5,) * 3, std=(0.5,) * 3)

Each takes images in [0, 1], as every ``decode`` of this package gives them, and returns raw logits.
``classifier_loaders`` makes them from torchvision, timm and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..eval.scorers import CLIP_STATISTICS, ClipScorer

Interpolation = Literal["bicubic", "bilinear"]


class ImageClassifier(nn.Module):
    """Any classifier behind the resize and normalisation it was trained with; differentiable.

    Args:
        network: maps normalised images (B, C, h, w) to logits (B, K), or to an object with
            ``.logits``. It is frozen and put in evaluation mode.
        size: what it wants, a side or (height, width); None takes images as they come. The shorter
            side is resized to fit (with antialiasing), the rest of the longer one is cut off: the
            whole image is seen, without the zoom of evaluation protocols.
        mean: subtracted, one number a channel; this also says how many channels there are.
        std: divided by.
        signed: images come in [-1, 1] instead of [0, 1].
        interpolation: of the resize.
        id2label: class names by index.

    Raises:
        TypeError: if ``network`` is no module.
        ValueError: if mean and std differ in length, a std is not positive, or a side is less than
            one.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        size: int | Sequence[int] | None = None,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        signed: bool = False,
        interpolation: Interpolation = "bicubic",
        id2label: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be a torch module, got {type(network).__name__}")
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(
                f"mean and std must have one number a channel, std positive, got {mean}, {std}"
            )
        sides = (size, size) if isinstance(size, int) else size
        if sides is not None and (len(sides) != 2 or min(sides) < 1):
            raise ValueError(f"size must be a side or (height, width), got {size}")
        if interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation must be bicubic or bilinear, got {interpolation!r}")
        self.network = network.eval().requires_grad_(False)
        self.size = None if sides is None else (int(sides[0]), int(sides[1]))
        self.signed, self.interpolation = signed, interpolation
        self.id2label = {int(index): str(name) for index, name in (id2label or {}).items()}
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Raw logits of ``images``, (B, C, H, W) in [0, 1] (``signed``: in [-1, 1]).

        Raises:
            ValueError: for another number of channels, or integers.
            TypeError: if the network returns no logits.
        """
        channels = self.mean.shape[1]
        if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
            raise ValueError(
                f"expected float images (B, {channels}, H, W), got {images.dtype} "
                f"{tuple(images.shape)}"
            )
        images = (images + 1) / 2 if self.signed else images
        images = (self._fit(images.float()) - self.mean) / self.std
        first = next(self.network.parameters(), None)
        output = self.network(images if first is None else images.to(first.dtype))
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"{type(self.network).__name__} returned {type(output).__name__}, in which there "
                "are no logits: is it a feature extractor?"
            )
        return logits

    def _fit(self, images: Tensor) -> Tensor:
        if self.size is None or images.shape[2:] == self.size:
            return images
        (height, width), (rows, columns) = images.shape[2:], self.size
        factor = max(rows / height, columns / width)
        shape = max(rows, round(height * factor)), max(columns, round(width * factor))
        if shape != (height, width):
            images = F.interpolate(images, shape, mode=self.interpolation, antialias=True)
        top, left = (shape[0] - rows) // 2, (shape[1] - columns) // 2
        return images[:, :, top : top + rows, left : left + columns]


def latent_classifier(
    network: nn.Module,
    channels: int,
    *,
    size: int | Sequence[int] | None = None,
    id2label: Mapping[int, str] | None = None,
) -> ImageClassifier:
    """A classifier of latents: spares the decoder. Give its rule ``decode=latent_view(pipe)``.

    Args:
        network: maps latents (B, channels, h, w) to logits.
        channels: of the latents.
        size: as for ``ImageClassifier``.
        id2label: class names by index.

    Raises:
        TypeError: see ``ImageClassifier``.
        ValueError: likewise.
    """
    return ImageClassifier(
        network, size=size, mean=(0.0,) * channels, std=(1.0,) * channels,
        interpolation="bilinear", id2label=id2label,
    )  # fmt: skip


def clip_classifier(scorer: ClipScorer, texts: Sequence[str]) -> ImageClassifier:
    """Zero-shot: the logits are 100 times the cosine of CLIP's image and text embeddings.

    Args:
        scorer: see ``diffsteer.eval.scorers.load_scorer``.
        texts: one a class, e.g. ``[f"a photo of a {name}" for name in names]``.

    Raises:
        ValueError: for fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError(f"texts must name two classes or more, got {list(texts)}")
    mean, std = CLIP_STATISTICS
    network = _ClipHead(scorer.model, scorer.embed_texts(texts))
    names = dict(enumerate(texts))
    return ImageClassifier(network, size=scorer.side, mean=mean, std=std, id2label=names)


class _ClipHead(nn.Module):
    texts: Tensor

    def __init__(self, model: Any, texts: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("texts", texts)

    def forward(self, pixels: Tensor) -> Tensor:
        seen = self.model.visual_projection(
            self.model.vision_model(pixel_values=pixels).pooler_output
        )
        unit = F.normalize(seen.float(), dim=1)
        return 100 * unit @ self.texts.to(unit).T
