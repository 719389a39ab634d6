"""Train a small classifier on labelled images, such as the two in the package.

python scripts/train_classifier.py --out runs/guidance
python scripts/train_classifier.py --data my/photos --arch plainnet --out runs/evaluation

The same command goes on where a stopped run was.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import _run
import torch
from _device import device_name

from diffsteer import __version__
from diffsteer.eval.classifiers import CifarClassifier
from diffsteer.training.classifier import ClassifierTraining, train_classifier
from diffsteer.training.data import load_images


def parser() -> argparse.ArgumentParser:
    parser = _run.new_parser(__doc__, usage="--out OUT [options]")
    add = parser.add_argument
    add("--data", default="uoft-cs/cifar10",
        help="parquet or image folder, or hub dataset (default: %(default)s)")  # fmt: skip
    add("--train-split", default="train", help="split to train on (default: train)")
    add("--test-split", default="test", help="split to report the accuracy of (default: test)")
    add("--out", type=Path, required=True, help="folder for the result; an unfinished run goes on")
    add("--init", type=Path, help="folder of an earlier result to start from")
    add("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to train (default: %(default)s)")  # fmt: skip
    for item in fields(ClassifierTraining):
        name = "--" + item.name.replace("_", "-")
        text = f"{item.metadata['help']} (default: %(default)s)"
        if isinstance(item.default, bool):
            add(name, action="store_true", help=item.metadata["help"])
            continue
        choices = item.metadata["choices"] or None
        add(name, type=type(item.default), default=item.default, choices=choices, help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    config = ClassifierTraining(
        **{item.name: getattr(args, item.name) for item in fields(ClassifierTraining)}
    )
    init = CifarClassifier.from_pretrained(args.init) if args.init else None
    train = load_images(args.data, split=args.train_split)
    test = load_images(args.data, split=args.test_split)
    versions = {"diffsteer": __version__, "python": platform.python_version()}
    result = train_classifier(
        train, test, config, args.out, init=init, device=args.device, versions=versions
    )
    print(f"{result['id']}: {result['test']} in {result['seconds']:.0f} s, saved to {args.out}")


if __name__ == "__main__":
    raise SystemExit(_run.run(main))
