"""Train a small classifier on labelled images: `python scripts/train_classifier.py --help`."""

from __future__ import annotations

import argparse
import platform
from dataclasses import fields
from pathlib import Path

import torch

from diffsteer import __version__
from diffsteer.eval.classifiers import CifarClassifier
from diffsteer.training.classifier import ClassifierTraining, train_classifier
from diffsteer.training.data import load_images


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="uoft-cs/cifar10", help="parquet or image folder, or hub dataset")
    add("--train-split", default="train", help="split to train on")
    add("--test-split", default="test", help="split to report the accuracy of")
    add("--out", type=Path, required=True, help="folder for the result; an unfinished run goes on")
    add("--init", type=Path, help="folder of an earlier result to start from")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    for item in fields(ClassifierTraining):
        name = "--" + item.name.replace("_", "-")
        text = item.metadata["help"]
        if isinstance(item.default, bool):
            add(name, action="store_true", help=text)
            continue
        choices = item.metadata["choices"] or None
        add(name, type=type(item.default), default=item.default, choices=choices, help=text)
    return parser.parse_args()


def main() -> None:
    args = parse()
    try:
        config = ClassifierTraining(
            **{item.name: getattr(args, item.name) for item in fields(ClassifierTraining)}
        )
        train = load_images(args.data, split=args.train_split)
        test = load_images(args.data, split=args.test_split)
        versions = {"diffsteer": __version__, "python": platform.python_version()}
        init = CifarClassifier.from_pretrained(args.init) if args.init else None
        result = train_classifier(
            train, test, config, args.out, init=init, device=args.device, versions=versions
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"train_classifier: {error}") from error
    print(f"{result['id']}: {result['test']} in {result['seconds']:.0f} s, saved to {args.out}")


if __name__ == "__main__":
    main()
