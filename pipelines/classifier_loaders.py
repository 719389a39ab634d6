"""Classifiers of torchvision, timm and transformers, with the preprocessing they were trained with.

    classifier = transformers_classifier("google/vit-base-patch16-224")
    classifier = timm_classifier("convnextv2_tiny.fcmae_ft_in1k")
    classifier = torchvision_classifier("resnet50")

The libraries are optional, ``pip install diffsteer[classifiers]``, and imported when asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..eval.classifiers import CifarClassifier, load_classifier
from .classifiers import ImageClassifier


def load_image_classifier(text: str) -> nn.Module:
    """A classifier by a word of a command line.

    Args:
        text: "embedded" (the CIFAR-10 classifier for guidance), a folder written by
            ``CifarClassifier.save_pretrained``, or ``LIBRARY:NAME`` with the library transformers,
            timm or torchvision, e.g. "transformers:google/vit-base-patch16-224". A torchvision
            name may carry its weights: "torchvision:resnet50@IMAGENET1K_V2".

    Raises:
        ImportError: if the library is not installed.
        FileNotFoundError: if there is no such folder.
        ValueError: if there is no such classifier.
    """
    library, colon, name = text.partition(":")
    if colon and library == "transformers":
        return transformers_classifier(name)
    if colon and library == "timm":
        return timm_classifier(name)
    if colon and library == "torchvision":
        model, _, weights = name.partition("@")
        return torchvision_classifier(model, weights=weights or "DEFAULT")
    if text == "embedded":
        return load_classifier("guidance")
    if not Path(text).is_dir():
        raise FileNotFoundError(
            f"classifier: there is no folder {text!r}; give 'embedded', a folder, or "
            "LIBRARY:NAME with the library transformers, timm or torchvision"
        )
    return CifarClassifier.from_pretrained(text).requires_grad_(False)


def transformers_classifier(model: Any, **changes: Any) -> ImageClassifier:
    """An image classifier of transformers, with the preprocessing that its files name.

    Args:
        model: a folder, a hub id, or a loaded ``...ForImageClassification`` (whose preprocessing is
            read from where it was loaded).
        **changes: arguments of ``ImageClassifier`` to take the place of what the files say.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if the model cannot be loaded, or its preprocessing is not known and ``mean``,
            ``std`` and ``size`` are not given.
    """
    transformers = _library("transformers", "text")
    if not isinstance(model, nn.Module):
        name = str(model)
        try:
            model = transformers.AutoModelForImageClassification.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"classifier: cannot load {name!r}: {_line(error)}") from error
    else:
        name = str(getattr(model.config, "_name_or_path", ""))
    settings = _transformers_preprocessing(transformers, name, changes)
    names = getattr(model.config, "id2label", None)
    return ImageClassifier(model, **{"id2label": names, **settings, **changes})


def timm_classifier(model: Any, **changes: Any) -> ImageClassifier:
    """An image classifier of timm, with the preprocessing of its pretrained configuration.

    Args:
        model: a name such as "resnet50.a1_in1k" (pretrained), or a loaded model.
        **changes: arguments of ``ImageClassifier`` to take the place of the configuration's.

    Raises:
        ImportError: if timm is not installed.
        ValueError: if timm cannot give a model of that name.
    """
    timm = _library("timm", "classifiers")
    if not isinstance(model, nn.Module):
        try:
            model = timm.create_model(str(model), pretrained=True)
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"classifier: timm cannot give {model!r}: {_line(error)}") from error
    found = timm.data.resolve_model_data_config(model)
    settings = {
        "size": tuple(found["input_size"][1:]),
        "mean": found["mean"],
        "std": found["std"],
        "interpolation": "bilinear" if found["interpolation"] == "bilinear" else "bicubic",
    }
    return ImageClassifier(model, **{**settings, **changes})


def torchvision_classifier(
    model: Any, *, weights: Any = "DEFAULT", **changes: Any
) -> ImageClassifier:
    """An image classifier of torchvision, with the preprocessing of its weights.

    Args:
        model: a name such as "resnet50", or a loaded model (then give its ``weights`` too).
        weights: of ``torchvision.models``: a name such as "IMAGENET1K_V2", or an entry of the enum.
        **changes: arguments of ``ImageClassifier`` to take the place of the weights' own.

    Raises:
        ImportError: if torchvision is not installed.
        ValueError: if there is no such model, or a loaded one comes without its weights' entry.
    """
    models = _library("torchvision.models", "classifiers")
    if isinstance(model, nn.Module):
        if isinstance(weights, str):
            raise ValueError(
                "weights: a loaded model does not say how its images were prepared; give the entry "
                "it was loaded with, e.g. weights=ResNet50_Weights.IMAGENET1K_V2"
            )
        network, entry = model, weights
    else:
        try:
            entry = weights
            if isinstance(weights, str):
                entry = models.get_model_weights(str(model))[weights]
            network = models.get_model(str(model), weights=entry)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"classifier: torchvision has no {model!r} with weights {weights!r}: {_line(error)}"
            ) from error
    prepare = entry.transforms()
    settings = {
        "size": prepare.crop_size[0],
        "mean": prepare.mean,
        "std": prepare.std,
        "interpolation": "bicubic" if "bicubic" in str(prepare.interpolation) else "bilinear",
        "id2label": dict(enumerate(entry.meta.get("categories", ()))),
    }
    return ImageClassifier(network, **{**settings, **changes})


def _transformers_preprocessing(
    transformers: Any, name: str, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Size, mean, std and interpolation from ``preprocessor_config.json``."""
    if {"mean", "std", "size"} <= changes.keys():
        return {}
    mixin = transformers.image_processing_utils.ImageProcessingMixin
    try:
        found, _ = mixin.get_image_processor_dict(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"classifier: {name!r} does not say how its images were prepared ({_line(error)}); "
            "give size=, mean= and std="
        ) from error
    size = found.get("crop_size") if found.get("do_center_crop") else found.get("size")
    if isinstance(size, Mapping):
        side = size.get("shortest_edge")
        size = side if side is not None else (size["height"], size["width"])
    plain = not found.get("do_normalize", True)
    return {
        "size": size,
        "mean": (0.0,) * 3 if plain else found["image_mean"],
        "std": (1.0,) * 3 if plain else found["image_std"],
        "interpolation": "bilinear" if found.get("resample") == 2 else "bicubic",
    }


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a torchvision of another torch raises RuntimeError
        raise ImportError(
            f"this classifier needs {name.split('.')[0]}, which cannot be imported "
            f"({_line(error)}); pip install diffsteer[{extra}]"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
