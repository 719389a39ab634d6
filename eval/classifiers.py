"""Small CIFAR-10 classifiers of two families, and the two trained ones that ship with the package.

`CifarResNet` (shortcuts, BatchNorm, ReLU) is meant for guidance; `CifarPlainNet` (no shortcuts, a
whitening first layer, GELU) is meant for evaluation only, so that no score is computed by the
network that steered the samples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from ._weights import read_folder, rounded, weights_digest, write_folder

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
EMBEDDED_FOLDERS = {"guidance": "guidance_resnet", "evaluation": "evaluation_plainnet"}
_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_SMALLEST_SIDE = 16  # three poolings must leave something

Classifier = TypeVar("Classifier", bound="CifarClassifier")


@dataclass(frozen=True)
class ClassifierConfig:
    """What both families share: one name a class, and a factor that keeps early logits small.

    With ``mirrored`` the network looks at every image and at its mirror image and averages the
    features (in eval mode; in training the augmentation shows both). It costs two passes.
    """

    class_names: tuple[str, ...] = CIFAR10_CLASSES
    logit_scale: float = 0.125
    mirrored: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if len(self.class_names) < 2:
            raise ValueError(f"a classifier needs at least two class_names, got {self.class_names}")
        if not self.logit_scale > 0:
            raise ValueError(f"logit_scale must be positive, got {self.logit_scale}")


@dataclass(frozen=True)
class ResNetConfig(ClassifierConfig):
    """Sizes of a `CifarResNet`: ``width`` channels in the stem, then 2, 4 and 4 times as many."""

    width: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("width", self.width)


@dataclass(frozen=True)
class PlainNetConfig(ClassifierConfig):
    """Sizes of a `CifarPlainNet`: the channels of its stages; the last is that of the features."""

    widths: tuple[int, ...] = (32, 128, 128)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "widths", tuple(self.widths))
        if not 1 <= len(self.widths) <= 3:
            raise ValueError(f"widths must name one to three stages, got {self.widths}")
        for width in self.widths:
            _positive("widths", width)


class CifarClassifier(nn.Module):
    """Float images in [0, 1], (B, 3, H, W), to logits (B, classes); trained at H = W = 32.

    The images are normalised inside. The result is differentiable in the images, also where they
    leave [0, 1] a little, as denoised predictions do. Subclasses build ``trunk`` and ``head``.
    """

    config_class: ClassVar[type[ClassifierConfig]]
    config: ClassifierConfig
    trunk: nn.Sequential
    head: nn.Linear
    mean: Tensor
    std: Tensor

    def __init__(self, config: ClassifierConfig) -> None:
        if type(config) is not self.config_class:
            raise TypeError(
                f"{type(self).__name__} needs a {self.config_class.__name__}, got {config!r}"
            )
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.tensor(_CIFAR10_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_CIFAR10_STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of ``images``."""
        return self.logits(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The features before the last layer, (B, `feature_size`): the space of ``fd-cifar``."""
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < _SMALLEST_SIDE:
            raise ValueError(
                f"images must be (B, 3, H, W) with H and W at least {_SMALLEST_SIDE}, "
                f"got {tuple(images.shape)}"
            )
        if not images.is_floating_point():
            raise TypeError(f"images must be floats in [0, 1], got {images.dtype}; divide by 255")
        images = (images - self.mean) / self.std
        if self.training or not self.config.mirrored:
            return self._pooled(images)
        return (self._pooled(images) + self._pooled(images.flip(-1))) / 2

    def _pooled(self, images: Tensor) -> Tensor:
        maps: Tensor = self.trunk(images)
        return maps.amax((2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, classes) of `features`, so that one pass gives both."""
        logits: Tensor = self.head(features) * self.config.logit_scale
        return logits

    @property
    def feature_size(self) -> int:
        """Number of features before the last layer."""
        return self.head.in_features

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by index."""
        return dict(enumerate(self.config.class_names))

    @property
    def digest(self) -> str:
        """The sha256 of all weights and buffers as they are now, 64 hex digits."""
        return weights_digest(self.state_dict())

    @property
    def id(self) -> str:
        """The family, ``mirrored`` if so, and the first 12 digits of `digest`."""
        views = "-mirrored" if self.config.mirrored else ""
        return f"{type(self).__name__}{views}-{self.digest[:12]}"

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write ``config.json`` and ``model.safetensors``; each is written aside, then renamed.

        Matrices and kernels are stored in ``dtype``, vectors (BatchNorm) as they are. A network
        read back computes in float32 with the rounded weights, and its `id` is that of the file.
        """
        note = {"class": type(self).__name__, **asdict(self.config)}
        write_folder(Path(folder), note, rounded(self.state_dict(), dtype))

    @classmethod
    def from_pretrained(cls: type[Classifier], folder: str | Path) -> Classifier:
        """Read a network back, in float32 and eval mode; ``CifarClassifier`` reads either family.

        Raises:
            FileNotFoundError: The folder or one of its two files is not there.
            ValueError: A file is damaged, is of another network, or does not fit the other file.
        """
        note, weights = read_folder(Path(folder))
        network = _build(note, Path(folder))
        if not isinstance(network, cls):
            raise ValueError(f"{folder} holds a {type(network).__name__}, not a {cls.__name__}")
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"the weights in {folder} do not fit {network.config} "
                f"with {len(network.config.class_names)} classes: {error}"
            ) from error
        return network.eval()


class CifarResNet(CifarClassifier):
    """A residual net after ResNet-9 (Page 2018): one ReLU module serves a whole residual block."""

    config_class = ResNetConfig

    def __init__(self, config: ResNetConfig | None = None) -> None:
        config = config or ResNetConfig()
        super().__init__(config)
        w = config.width
        self.trunk = nn.Sequential(
            _conv_norm(3, w), nn.ReLU(),
            _conv_norm(w, 2 * w, pool=True), nn.ReLU(), _Residual(2 * w),
            _conv_norm(2 * w, 4 * w, pool=True), nn.ReLU(),
            _conv_norm(4 * w, 4 * w, pool=True), nn.ReLU(), _Residual(4 * w),
        )  # fmt: skip
        self.head = nn.Linear(4 * w, len(config.class_names), bias=False)


class CifarPlainNet(CifarClassifier):
    """A plain net after Jordan 2024 (arXiv 2404.00498): whitened 2x2 patches, GELU, no shortcuts.

    ``trunk[0]`` is the whitening layer.
    """

    config_class = PlainNetConfig

    def __init__(self, config: PlainNetConfig | None = None) -> None:
        config = config or PlainNetConfig()
        super().__init__(config)
        width = 2 * 3 * 2 * 2
        layers: list[nn.Module] = [nn.Conv2d(3, width, 2), nn.GELU(approximate="tanh")]
        for wider in config.widths:
            layers += [_conv_norm(width, wider, pool=True), nn.GELU(approximate="tanh")]
            layers += [_conv_norm(wider, wider), nn.GELU(approximate="tanh")]
            width = wider
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(width, len(config.class_names), bias=False)

    def set_whitening(self, filters: Tensor) -> None:
        """Set and freeze the first filters, (24, 3, 2, 2), and set their bias to zero."""
        self.trunk[0].load_state_dict({"weight": filters, "bias": torch.zeros(len(filters))})
        self.trunk[0].get_parameter("weight").requires_grad_(False)


_FAMILIES: dict[str, type[CifarClassifier]] = {
    family.__name__: family for family in (CifarResNet, CifarPlainNet)
}


def load_classifier(name: Literal["guidance", "evaluation"]) -> CifarClassifier:
    """A trained CIFAR-10 classifier of the package: eval mode, weights frozen, no network access.

    "guidance" is a `CifarResNet`, "evaluation" a `CifarPlainNet`; both have seen clean training
    images only. ``docs/embedded_classifiers.md`` says how they were made and how good they are.

    Raises:
        ValueError: ``name`` is neither of the two.
    """
    if name not in EMBEDDED_FOLDERS:
        raise ValueError(f"name must be one of {sorted(EMBEDDED_FOLDERS)}, got {name!r}")
    folder = Path(__file__).resolve().parent / "embedded" / EMBEDDED_FOLDERS[name]
    return CifarClassifier.from_pretrained(folder).requires_grad_(False)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _conv_norm(width, width), _conv_norm(width, width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.relu(self.second(self.relu(self.first(x))))
        return out


def _conv_norm(width_in: int, width_out: int, *, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(width_in, width_out, 3, padding=1, bias=False)]
    if pool:  # before the norm: a quarter of the elementwise work
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.BatchNorm2d(width_out))


def _positive(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be positive integers, got {value!r}")


def _build(note: dict[str, Any], folder: Path) -> CifarClassifier:
    """An untrained network of the family and sizes that ``note`` names."""
    family = _FAMILIES.get(note.get("class", ""))
    if family is None:
        raise ValueError(
            f"{folder} holds a network of class {note.get('class')!r}, expected one of "
            f"{sorted(_FAMILIES)}"
        )
    values = {name: value for name, value in note.items() if name != "class"}
    known = {item.name for item in fields(family.config_class)}
    if set(values) != known:
        raise ValueError(f"the configuration in {folder} has {sorted(values)}, not {sorted(known)}")
    return family(family.config_class(**values))
