"""Where a method's numbers and its classifier come from: presets, calibrations, class names."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import _cli
from torch import Tensor

from diffsteer.guidance import PRESETS, match_classes, smooth_activations
from diffsteer.pipelines import image_decoder, load_image_classifier


def add_classifier_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--classifier`` and ``--softplus``: the one that steers."""
    parser.add_argument(
        "--classifier", default="embedded",
        help="for gfcg and elucd: embedded (CIFAR-10, default), a folder, or LIBRARY:NAME with "
        "transformers, timm or torchvision",
    )  # fmt: skip
    parser.add_argument(
        "--softplus", type=float, metavar="BETA",
        help="replace the classifier's ReLUs by softplus of this sharpness (elucd: 3 to 5)",
    )  # fmt: skip


def add_setting_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--preset`` and ``--calibration``: where a method's numbers may come from."""
    parser.add_argument("--preset", choices=sorted(PRESETS), help="numbers for a model family")
    parser.add_argument("--calibration", type=Path, help="what calibrate.py wrote: folder or file")


def settings_from(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the method that ``--preset`` and ``--calibration`` give; options go before both.

    Raises:
        ValueError: if one of them says nothing on the method, or was made for another classifier.
        OSError: if the calibration cannot be read.
    """
    found: dict[str, Any] = {}
    if args.preset:
        known = PRESETS[args.preset]
        if args.guidance not in known:
            raise ValueError(
                f"--preset {args.preset} has no numbers for --guidance {args.guidance}, only for "
                f"{', '.join(known)}"
            )
        found |= known[args.guidance].settings
    return found | (_calibrated(args) if args.calibration else {})


def _calibrated(args: argparse.Namespace) -> dict[str, float]:
    path = args.calibration
    path = path / "calibration.json" if path.is_dir() else path
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--calibration {path} is damaged ({error}); calibrate again") from error
    if args.guidance not in saved.get("settings", {}):
        raise ValueError(f"--calibration {path} says nothing on --guidance {args.guidance}")
    for name in ("classifier", "softplus"):
        if saved.get(name) != getattr(args, name):
            raise ValueError(
                f"--calibration {path} was made with {name} {saved.get(name)}, not with "
                f"{getattr(args, name)}; calibrate again, or give the same --{name}"
            )
    return {name: float(value) for name, value in saved["settings"][args.guidance].items()}


def chosen_classifier(args: argparse.Namespace, device: Any) -> tuple[Any, dict[int, str]]:
    """The classifier of the command line and its class names, if it has any."""
    classifier = load_image_classifier(args.classifier).to(device)
    names = dict(getattr(classifier, "id2label", None) or {})
    return (smooth_activations(classifier, args.softplus) if args.softplus else classifier), names


def matched_classifier(
    args: argparse.Namespace, pipe: Any, classifier: Any, names: dict[int, str]
) -> tuple[Any, Tensor | None]:
    """The classifier over the classes that the pipeline has too, and the label map.

    Raises:
        ValueError: if they do not share their classes.
    """
    own = getattr(pipe, "id2label", None)
    if not own and hasattr(pipe, "labels"):  # DiTPipeline
        own = {index: name for name, index in pipe.labels.items()}
    return match_classes(classifier, names, own) if own else (classifier, None)


def classifier_for(args: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    """Classifier, label map and decoder for this pipeline, as arguments of the method.

    Empty for methods without a classifier.

    Raises:
        ValueError: if the classifier and the pipeline do not share their classes.
    """
    method = _cli.rule_choices().get(args.guidance)
    if method is None or "classifier" not in {item.name for item in fields(method)}:
        return {}
    chosen, table = matched_classifier(args, pipe, *chosen_classifier(args, pipe.device))
    found = {"classifier": chosen, "label_map": table}
    if getattr(pipe, "vae", None) is not None:
        found["decode"] = image_decoder(pipe, height=args.height, width=args.width)
    return found
