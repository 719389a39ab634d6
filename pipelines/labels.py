"""Class labels, seeds and generators of a class-conditional pipeline, checked and counted."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..core.noise import seeded_generators
from .observe import parameters_of, plain


def label_ids(labels: Any, num_classes: int, ids: Mapping[str, int]) -> list[int]:
    """Class indices of ``labels``: an index, a class name, or any sequence or tensor of these.

    Args:
        labels: what the user gave.
        num_classes: indices run from 0 to ``num_classes - 1``.
        ids: index of each class name; may be empty.

    Raises:
        ValueError: if an index is out of range or a name is unknown.
        TypeError: if a label is neither an integer nor a string.
    """
    if hasattr(labels, "tolist"):  # tensors and arrays
        labels = labels.tolist()
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        labels = [labels]
    return [_label_id(label, num_classes, ids) for label in labels]


def _label_id(label: Any, num_classes: int, ids: Mapping[str, int]) -> int:
    if isinstance(label, str):
        if label not in ids:
            known = ", ".join(ids) if ids else f"none; use the indices 0 to {num_classes - 1}"
            raise ValueError(f"class_labels: unknown class name {label!r}; the names are {known}")
        return ids[label]
    if isinstance(label, bool) or not hasattr(label, "__index__"):
        raise TypeError(f"class_labels: expected class indices or names, got {label!r}")
    index = operator.index(label)
    if not 0 <= index < num_classes:
        raise ValueError(
            f"class_labels: {index} is out of range; this model has {num_classes} classes, "
            f"0 to {num_classes - 1}"
        )
    return index


def match_counts(
    labels: list[int], generator: Any, seeds: Any, latents: Any
) -> tuple[list[int], Any]:
    """Repeat a single label for every seed, and turn seeds into generators.

    Returns:
        One label an image, and the generator, the list of generators or None.

    Raises:
        ValueError: if the counts of labels and of seeds or generators differ, or seeds come with
            another source of noise.
    """
    if seeds is not None:
        if generator is not None or latents is not None:
            other = "latents" if generator is None else "generator"
            raise ValueError(f"give either seeds or {other}, not both")
        seeds = seeds.tolist() if hasattr(seeds, "tolist") else seeds
        generator = seeded_generators([seeds] if isinstance(seeds, int) else list(seeds))
    if not labels:
        raise ValueError("class_labels is empty; give at least one label")
    if isinstance(generator, list | tuple):
        if len(labels) == 1:
            labels = labels * len(generator)
        if len(generator) != len(labels):
            raise ValueError(
                f"{'generator' if seeds is None else 'seeds'}: got {len(generator)} for "
                f"{len(labels)} class_labels; give one for each image"
            )
    elif generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected torch.Generator or a list of them, got {generator!r}")
    return labels, generator


def count_classes(network: Any) -> int:
    """The number of classes of a stock DiT or UNet, without the null class.

    Raises:
        ValueError: if the network takes no class labels, or its output has not the channels of its
            input.
    """
    config = network.config
    channels = config["in_channels"]
    if config.get("out_channels") not in (None, channels):
        raise ValueError(
            f"transformer: expected as many output as input channels ({channels}), got "
            f"{config['out_channels']}; learned variances have no meaning in flow matching"
        )
    known = known_classes(network)
    if known is not None:
        return known
    raise ValueError(
        f"transformer: {type(network).__name__} takes no class labels; set num_embeds_ada_norm "
        "(DiTTransformer2DModel) or num_class_embeds = classes + 1 (UNet2DModel)"
    )


def known_classes(network: Any) -> int | None:
    """The number of class labels of a DiT or UNet, without the null class; None for any other."""
    network = plain(network)
    config = getattr(network, "config", None) or {}
    if "class_labels" not in parameters_of(network):
        return None  # PixArt has DiT's embeddings, and no classes
    if config.get("num_embeds_ada_norm"):
        return int(config["num_embeds_ada_norm"])
    # The embeddings of a UNet2DConditionModel may be of anything, e.g. of a noise level.
    if type(network).__name__ == "UNet2DModel" and config.get("num_class_embeds"):
        return int(config["num_class_embeds"]) - 1  # the last row is the null class
    return None


def check_names(id2label: Mapping[Any, str] | None, num_classes: int) -> dict[int, str]:
    """The class names by integer index (JSON turns the keys to strings).

    Raises:
        ValueError: if an index is out of range or a name occurs twice.
    """
    names = {int(index): str(name) for index, name in (id2label or {}).items()}
    outside = [index for index in names if not 0 <= index < num_classes]
    if outside:
        raise ValueError(
            f"id2label: {outside[0]} is out of range; the model has {num_classes} classes"
        )
    if len(set(names.values())) != len(names):
        raise ValueError("id2label: a class name occurs twice")
    return dict(sorted(names.items()))
