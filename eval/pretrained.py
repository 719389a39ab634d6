"""The extractors that have names: one is embedded, the others need a library and its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .extractors import Extractor, Taps, cifar_extractor
from .settings import Settings

# In this order from the image to the pooled features; the names are torch-fidelity's.
INCEPTION_STAGES = (
    "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1",
    "Conv2d_4a_3x3", "MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b",
    "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool",
)  # fmt: skip
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def inception_taps(network: nn.Module, images: Tensor) -> Taps:
    """Pool features, logits without bias and ADM's sFID features, in one pass.

    Args:
        network: with the stages of torch-fidelity's ``FeatureExtractorInceptionV3`` and ``fc``.
        images: shape (B, 3, 299, 299), in [0, 1], already resized.

    Returns:
        (B, 2048), (B, 1008), and (B, 2023): the first seven channels of ``Mixed_6d.branch1x1``,
        flattened with channels last as TensorFlow does.
    """
    x = images * (255 / 128) - 1
    spatial = None
    for name in INCEPTION_STAGES:
        stage = getattr(network, name)
        if name == "Mixed_6d":
            spatial = stage.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = stage(x)
    pool = x.flatten(1)
    weight: Tensor = network.fc.weight  # type: ignore[union-attr,assignment]
    return Taps(pool, pool @ weight.T, spatial)


def inception_extractor(settings: Settings, device: torch.device | str) -> Extractor:
    """FID's Inception-v3, from torch-fidelity's conversion of the TensorFlow weights.

    Raises:
        ImportError: if torch-fidelity is missing or does not import.
        ValueError: if its weights can neither be found nor downloaded.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # a broken torchvision makes this a RuntimeError
        raise ImportError(
            f"the inception extractor needs torch-fidelity and a torchvision that fits torch "
            f"({error}): pip install diffsteer[inception], both from the same index as torch"
        ) from error
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    except OSError as error:
        raise ValueError(f"the weights of inception cannot be loaded: {error}") from error
    return Extractor(
        network,
        space="inception",
        side=299,
        forward=lambda images: inception_taps(network, images),
        resize=settings.fid_resize,
        name="inception-v3-compat",
        device=device,
        micro_batch=32,
    )


def hub_position_table(table: Tensor, grid: int, *, offset: float = 0.1) -> Tensor:
    """Interpolate a square table of position embeddings as DINOv2's own code does.

    The hub model samples at a scale of ``(grid + offset) / side``, transformers at ``grid / side``:
    points move by up to 0.22 patches, and published FD-DINOv2 values are the hub's.

    Args:
        table: shape (1, 1 + side * side, dim), the class token's embedding first.
        grid: patches a side of the images that will be seen.
        offset: of DINOv2's code.

    Returns:
        Shape (1, 1 + grid * grid, dim).
    """
    token, patches = table[:, :1], table[:, 1:].float()
    side = round(patches.shape[1] ** 0.5)
    if side == grid:
        return table
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (grid + offset) / side
    resized = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([token, resized.flatten(2).transpose(1, 2).to(table.dtype)], 1)


def dinov2_extractor(
    settings: Settings, device: torch.device | str, model: str = "facebook/dinov2-large"
) -> Extractor:
    """DINOv2's class token at 224 px, with the hub's position interpolation.

    Raises:
        ImportError: if transformers is missing.
        ValueError: if the weights can neither be found nor downloaded.
    """
    network = _from_transformers("Dinov2Model", model)
    side = 16 * network.config.patch_size
    table = network.embeddings.position_embeddings
    # Once, for the one size that is ever seen: transformers then leaves the table alone.
    fixed = hub_position_table(table.detach(), 16)
    network.embeddings.position_embeddings = nn.Parameter(fixed)

    def forward(images: Tensor) -> Tensor:
        out: Tensor = network(pixel_values=_normalised(images, _IMAGENET)).pooler_output
        return out

    return Extractor(
        network, space="dinov2", side=side, forward=forward, resize=settings.dino_resize,
        name=f"{model}-hub-positions", device=device, micro_batch=32,
    )  # fmt: skip


def clip_extractor(
    settings: Settings,
    device: torch.device | str,
    model: str = "openai/clip-vit-large-patch14-336",
) -> Extractor:
    """CLIP's projected image embeddings, for CMMD, resized as CLIP's own processor does.

    Raises:
        ImportError: if transformers is missing.
        ValueError: if the weights can neither be found nor downloaded.
    """
    network = _from_transformers("CLIPVisionModelWithProjection", model)

    def forward(images: Tensor) -> Tensor:
        out: Tensor = network(pixel_values=_normalised(images, _CLIP)).image_embeds
        return out

    return Extractor(
        network, space="clip", side=network.config.image_size, forward=forward,
        resize="pil-bicubic", name=model, device=device, micro_batch=32,
    )  # fmt: skip


def _from_transformers(class_name: str, model: str) -> Any:
    try:
        import transformers
    except Exception as error:
        raise ImportError(
            f"the extractor {model} needs transformers ({error}): pip install diffsteer[text]"
        ) from error
    try:
        return getattr(transformers, class_name).from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"the weights of {model} cannot be loaded: {error}") from error


def _normalised(images: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in statistics)
    return (images - mean) / std


def _cifar(settings: Settings, device: torch.device | str) -> Extractor:
    return cifar_extractor(device=device)


EXTRACTORS: dict[str, Callable[[Settings, torch.device | str], Extractor]] = {
    "cifar": _cifar,
    "inception": inception_extractor,
    "dinov2": dinov2_extractor,
    "clip": clip_extractor,
}


def load_extractor(
    name: str, settings: Settings, *, device: torch.device | str = "cpu"
) -> Extractor:
    """A named extractor, resizing as the protocol says.

    Raises:
        ImportError: if a library that it needs is missing; the message says how to install it.
        ValueError: if there is none of that name, or its weights cannot be had.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"extractor must be one of {', '.join(EXTRACTORS)}, got {name!r}")
    return EXTRACTORS[name](settings, device)
