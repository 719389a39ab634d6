"""Networks that turn images into features, under an identity that names all that shapes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ._weights import weights_digest
from .classifiers import load_classifier
from .resize import resized


@dataclass(frozen=True)
class Taps:
    """What one forward pass gives.

    Args:
        features: shape (B, d), float32.
        logits: shape (B, classes), or None.
        spatial: shape (B, s), flattened spatial features (sFID), or None.
    """

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None

    def __getitem__(self, rows: slice) -> Taps:
        return Taps(*(None if tap is None else tap[rows] for tap in self.all))  # type: ignore[arg-type]

    @property
    def all(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The three taps as a tuple."""
        return self.features, self.logits, self.spatial


class NotFinite(ValueError):
    """Features that are NaN or infinite; ``rows`` says of which images of the call."""

    def __init__(self, name: str, rows: list[int], count: int) -> None:
        super().__init__(
            f"{name} gives NaN or infinity for {len(rows)} of {count} images (first: number "
            f"{rows[0]} of its batch)"
        )
        self.name, self.rows = name, rows


class Extractor:
    """A frozen network behind a fixed resize, value range, precision and batch size.

    Every forward pass runs on ``micro_batch`` images (a last, smaller batch is padded), because a
    convolution may round differently at another batch size: so features depend on the image alone,
    as far as the network's own kernels allow.

    Args:
        network: any module; it is put in eval mode and frozen.
        forward: from float32 images (B, 3, side, side) in [0, 1], on the network's device, to
            ``Taps`` or a plain feature tensor; ``network`` itself by default.
        space: short name of the feature space, used in result names: ``fd-<space>``.
        side: of the square that the network takes.
        resize: a rule of ``resize.RESIZES``, for images of other sizes.
        name: of the network, for its identity; its weights are added as a digest.
        dtype: the network runs in; features that overflow are computed again in float32.
        device: the network runs on.
        micro_batch: images a forward pass.
        class_names: what the logits stand for, if they are classes of the data.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        space: str,
        side: int,
        forward: Callable[[Tensor], Taps | Tensor] | None = None,
        resize: str = "pil-bicubic",
        name: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        micro_batch: int = 64,
        class_names: tuple[str, ...] = (),
    ) -> None:
        self.network = network.eval().requires_grad_(False).to(device, dtype)
        self.forward = forward or network
        self.space, self.side, self.resize, self.dtype = space, side, resize, dtype
        self.device, self.micro_batch = torch.device(device), micro_batch
        self.class_names = class_names
        self.digest = weights_digest(network.state_dict())
        self.name = name or type(network).__name__

    @property
    def id(self) -> str:
        """Identity of the numbers: network, weights, size, resize, input, precision."""
        precision = str(self.dtype).removeprefix("torch.")
        return f"{self.name}@{self.digest[:16]}/{self.side}px-{self.resize}/uint8-255/{precision}"

    @torch.no_grad()
    def __call__(self, images: Tensor | list[Tensor]) -> Taps:
        """Features of uint8 images, (B, 3, H, W) or a list of (3, H, W) of any sizes.

        Raises:
            TypeError: if the images are not uint8.
            NotFinite: if a feature is NaN or infinite, also in float32.
        """
        for image in [images] if isinstance(images, Tensor) else images:
            if image.dtype != torch.uint8:
                raise TypeError(f"images must be uint8 in [0, 255], got {image.dtype}")
        parts = [
            self._micro(images[start : start + self.micro_batch])
            for start in range(0, len(images), self.micro_batch)
        ]
        taps = Taps(*(_joined([part.all[i] for part in parts]) for i in range(3)))  # type: ignore[arg-type]
        bad = (~torch.isfinite(taps.features).all(1)).nonzero().flatten().tolist()
        if bad:
            raise NotFinite(self.name, bad, len(images))
        return taps

    def _micro(self, images: Tensor | list[Tensor]) -> Taps:
        batch = resized(images, self.side, self.resize, device=self.device) / 255
        short = self.micro_batch - len(batch)
        padded = torch.cat([batch, batch.new_zeros(short, *batch.shape[1:])]) if short else batch
        taps = self._run(padded, self.dtype)[: len(batch)]
        if self.dtype != torch.float32 and not bool(torch.isfinite(taps.features).all()):
            self.network.float()
            taps = self._run(padded, torch.float32)[: len(batch)]
            self.network.to(self.dtype)
        return taps

    def _run(self, batch: Tensor, dtype: torch.dtype) -> Taps:
        out = self.forward(batch.to(dtype))
        taps = out if isinstance(out, Taps) else Taps(out)
        if taps.features.ndim != 2:
            raise ValueError(
                f"{self.name} must give features of shape (B, d), got "
                f"{tuple(taps.features.shape)}; pool or flatten them in `forward`"
            )
        return Taps(*(None if tap is None else tap.float() for tap in taps.all))  # type: ignore[arg-type]


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """All micro-batches on the CPU, copied at once: the device never waits between two of them."""
    present = [part for part in parts if part is not None]
    return torch.cat(present).cpu() if present else None


def cifar_extractor(which: str = "evaluation", *, device: torch.device | str = "cpu") -> Extractor:
    """The embedded CIFAR-10 classifier for evaluation: 144 features, 10 logits, no download.

    Distances in this space are called ``fd-cifar``; they are no FID and compare with nothing else.

    Args:
        which: "evaluation", or "guidance" for the classifier that steers samples.
        device: it runs on.

    Raises:
        ValueError: if there is no such classifier.
    """
    if which not in ("evaluation", "guidance"):
        raise ValueError(f"which must be 'evaluation' or 'guidance', got {which!r}")
    network = load_classifier("evaluation" if which == "evaluation" else "guidance")

    def forward(images: Tensor) -> Taps:
        features = network.features(images)
        # A float32 matrix product may round a row by its place in the batch; float64 hides that.
        head = network.head.weight.double() * network.config.logit_scale
        return Taps(features, (features.double() @ head.T).float())

    return Extractor(
        network,
        space="cifar" if which == "evaluation" else "cifar-guidance",
        side=32,
        forward=forward,
        # Two views or one is not in the weights, but it is in the numbers.
        name=type(network).__name__ + ("-mirrored" if network.config.mirrored else ""),
        device=device,
        micro_batch=128,
        class_names=tuple(network.config.class_names),
    )
