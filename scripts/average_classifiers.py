"""Average the weights (and the views) of trainings of one classifier, and report the result.

python scripts/average_classifiers.py runs/first runs/second --mirrored --out runs/mean
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import _run
import torch

from diffsteer import __version__
from diffsteer.eval.classifiers import CifarClassifier
from diffsteer.training.checkpoint import write_json
from diffsteer.training.classifier import RESULT_FILE, classification_report, predict
from diffsteer.training.data import load_images
from diffsteer.training.weight_average import average_classifiers, measure_statistics


def record(folder: Path) -> object:
    """What a training left in ``folder``, so that the average carries its whole history."""
    file = folder / RESULT_FILE
    return json.loads(file.read_text()) if file.exists() else str(folder.name)


def parser() -> argparse.ArgumentParser:
    parser = _run.new_parser(__doc__)
    add = parser.add_argument
    add("folders", type=Path, nargs="+", help="results of train_classifier.py")
    add("--shares", type=float, nargs="*", help="one a folder (default: equal ones)")
    add("--data", default="uoft-cs/cifar10",
        help="parquet or image folder, or hub dataset (default: %(default)s)")  # fmt: skip
    add("--mirrored", action="store_true", help="average over mirror images too")
    add("--images", type=int, default=10_000, help="that set the statistics (default: 10000)")
    add("--out", type=Path, required=True, help="folder for the result")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if (args.out / RESULT_FILE).exists():
        raise FileExistsError(f"{args.out} holds a finished run; choose another folder")
    parts = [CifarClassifier.from_pretrained(folder) for folder in args.folders]
    network = average_classifiers(parts, args.shares, mirrored=args.mirrored or None)
    train = load_images(args.data, split="train")
    test = load_images(args.data, split="test")
    if len(parts) > 1:  # the mean of one network is itself, and so are its statistics
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        measure_statistics(network, train.pixels[order[: args.images]])
    network.save_pretrained(args.out)
    stored = CifarClassifier.from_pretrained(args.out)
    result = {
        "id": stored.id,
        "parameters": sum(p.numel() for p in stored.parameters()),
        "test": classification_report(predict(stored, test.pixels), test.labels),
        "average_of": [part.id for part in parts],
        "shares": args.shares,
        "images": args.images if len(parts) > 1 else None,
        "parents": [record(folder) for folder in args.folders],
        "versions": {"torch": torch.__version__, "diffsteer": __version__},
    }
    write_json(args.out / RESULT_FILE, result)
    print(f"{result['id']}: {result['test']}, saved to {args.out}")


if __name__ == "__main__":
    raise SystemExit(_run.run(main))
