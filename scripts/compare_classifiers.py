"""Compare the two embedded classifiers on labelled images: accuracy, calibration, agreement.

python scripts/compare_classifiers.py --data my/photos
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _run
import torch
from torch import Tensor

from diffsteer.eval.classifiers import CifarClassifier, load_classifier
from diffsteer.eval.report import write_text
from diffsteer.training.classifier import classification_report, predict
from diffsteer.training.data import LabelledImages, load_images


def noisy(pixels: Tensor, level: float) -> Tensor:
    """The uint8 images with seeded Gaussian noise of deviation ``level``, in [0, 1] units."""
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (pixels + 255 * level * noise).round().clamp(0, 255).to(torch.uint8)


def compare(
    first: CifarClassifier, second: CifarClassifier, data: LabelledImages, levels: list[float]
) -> list[dict[str, Any]]:
    """One row a noise level: the reports of both, and how often they name the same class."""
    rows = []
    for level in levels:
        pixels = noisy(data.pixels, level) if level else data.pixels
        logits = [predict(network, pixels) for network in (first, second)]
        reports = [classification_report(part, data.labels) for part in logits]
        if not level:  # two views an image: reported beside, never instead
            for network, part, report in zip((first, second), logits, reports, strict=True):
                both = part.softmax(1) + predict(network, pixels.flip(-1)).softmax(1)
                report["accuracy_with_mirror"] = classification_report(both.log(), data.labels)[
                    "accuracy"
                ]
        named = [part.argmax(1) for part in logits]
        agreement = (named[0] == named[1]).double().mean().item()
        rows.append({"noise": level, first.id: reports[0], second.id: reports[1]})
        rows[-1]["agreement"] = agreement
    return rows


def table(rows: list[dict[str, Any]], ids: tuple[str, str]) -> str:
    lines = ["| noise | network | accuracy | NLL | ECE | agreement |", "|---|---|---|---|---|---|"]
    for row in rows:
        for name in ids:
            report = row[name]
            cells = [f"{100 * report['accuracy']:.2f} %", f"{report['nll']:.3f}"]
            cells += [f"{report['ece']:.3f}", f"{100 * row['agreement']:.2f} %"]
            lines.append(f"| {row['noise']:g} | `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    parser = _run.new_parser(__doc__)
    add = parser.add_argument
    add("--data", default="uoft-cs/cifar10",
        help="parquet or image folder, or hub dataset (default: %(default)s)")  # fmt: skip
    add("--split", default="test", help="split to compare on (default: test)")
    add("--noise", type=float, nargs="*", default=[0.0, 0.05, 0.1],
        help="deviations, pixels being in [0, 1] (default: 0 0.05 0.1)")  # fmt: skip
    add("--out", type=Path, help="JSON file for the numbers")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    data = load_images(args.data, split=args.split)
    guidance, evaluation = load_classifier("guidance"), load_classifier("evaluation")
    known = guidance.config.class_names
    named = not all(name.isdigit() for name in data.names)  # a file of numbers alone is believed
    if named and tuple(data.names) != known:
        raise ValueError(
            f"the classes of {args.data} are {', '.join(data.names)}; the classifiers know "
            f"{', '.join(known)}, in that order: give data with these class names"
        )
    rows = compare(guidance, evaluation, data, args.noise)
    print(table(rows, (guidance.id, evaluation.id)))
    if args.out:
        write_text(args.out, json.dumps(rows, indent=2) + "\n", overwrite=True)


if __name__ == "__main__":
    raise SystemExit(_run.run(main))
