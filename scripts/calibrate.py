"""Is a classifier honest along the trajectory of a pipeline, and at which temperature?

python scripts/calibrate.py --num 500 --out out/calibration
python scripts/generate.py --guidance gfcg --calibration out/calibration --out out/gfcg

Samples the pipeline, asks the classifier at every step what it sees in the denoised prediction, and
writes calibration.json (calibration error a stage and its mean, fitted temperature, interval) and
reliability.png. An unfinished run is continued.
"""

from __future__ import annotations

import argparse
import inspect
import io
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _cli
import _steering
import generate
import torch
from torch import Tensor

from diffsteer.guidance import MergedClasses, check_label_map
from diffsteer.guidance.calibration import Calibration, calibrate
from diffsteer.guidance.probe import ClassifierProbe
from diffsteer.pipelines import image_decoder, run_settings
from diffsteer.pipelines.calibrate import record_stages, summary
from diffsteer.pipelines.calibration_figure import reliability_figure
from diffsteer.pipelines.files import write_bytes, write_json


def parser() -> argparse.ArgumentParser:
    parser = _cli.new_parser(__doc__, usage="--out OUT [options]")
    add = parser.add_argument
    add("--steps", type=int, default=20, help="solver steps, one stage each (default: 20)")
    add("--prompt-classes", help="the classifier's class of each prompt, in order: 207,281")
    add("--data", help="labelled real images to check the label map on: a folder, or a hub id")
    add("--split", default="test", help="split of --data (default: test)")
    add("--data-size", type=int, default=32, help="their size in pixels (default: 32)")
    add("--data-num", type=int, default=500, help="how many of them (default: 500)")
    add("--bins", type=int, default=15, help="bins of the reliability diagrams (default: 15)")
    add("--noisy", action="store_true", help="classify the noisy sample, not the prediction")
    generate.add_image_options(parser)
    _cli.add_rule_options(parser)
    _steering.add_classifier_options(parser)
    return parser


def classes_of(
    args: argparse.Namespace, setup: generate.Setup
) -> tuple[Any, list[int], Tensor | None]:
    """The classifier over the classes in question, a label for each request, and the label map."""
    classifier, names = _steering.chosen_classifier(args, setup.pipe.device)
    prompts = list(dict.fromkeys(request.prompt for request in setup.requests))
    if prompts != [None]:
        if not args.prompt_classes:
            raise ValueError(
                "--prompt-classes is missing: give the classifier's class of each prompt, in order"
            )
        groups = [[index] for index in _cli.integers(args.prompt_classes)]
        if len(groups) != len(prompts):
            raise ValueError(f"--prompt-classes gives {len(groups)} for {len(prompts)} prompts")
        labels = [prompts.index(request.prompt) for request in setup.requests]
        return MergedClasses(classifier, groups), labels, None
    matched, table = _steering.matched_classifier(args, setup.pipe, classifier, names)
    return matched, [request.label for request in setup.requests], table


def check_data(
    args: argparse.Namespace, classifier: Any, table: Tensor | None, device: Any
) -> dict[str, Any]:
    """Accuracy on real images, which says whether classes, size and value range are right."""
    from diffsteer.training.data import load_images

    data = load_images(args.data, split=args.split, resolution=args.data_size, memory=math.inf)
    chosen = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))
    chosen = chosen[: args.data_num]
    images = data.pixels[chosen].float().div(255).to(device)
    found = check_label_map(classifier, images, data.labels[chosen], label_map=table)
    return {"data": args.data, "count": found.count, "accuracy": found.accuracy}


def prepare_folder(out: Path, settings: dict[str, Any], overwrite: bool) -> Path:
    """The folder of the parts; refuses to mix two runs."""
    note = out / "run.json"
    if overwrite and note.is_file() and "calibration" in json.loads(note.read_text()):
        shutil.rmtree(out)
    if note.is_file():
        if json.loads(note.read_text()) != settings:
            raise ValueError(
                f"{out} holds another run (see {note}); give another --out, or --overwrite"
            )
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no calibration; give another --out")
    else:
        write_json(note, settings)
    return out / "parts"


def table_of(result: Calibration) -> str:
    lines = [
        "| sigma | accuracy | confidence | ECE | ECE at T | T of the stage |",
        "|---" * 6 + "|",
    ]
    for stage in result.stages:
        lines.append(
            f"| {stage.ratio:.3g} | {100 * stage.accuracy:.1f} % | {stage.confidence:.3f} "
            f"| {stage.error:.3f} | {stage.error_fitted:.3f} | {stage.temperature:.2f} |"
        )
    lines += [
        "",
        f"mean ECE {result.error:.3f}; at T = {result.temperature:.3f} it is "
        f"{result.error_fitted:.3f}; interval ({result.low:.3g}, {result.high:.3g}]",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    load = generate.read_options(args)
    _cli.build_rule(args)
    setup = load()
    if setup.state.num_processes > 1:
        raise ValueError("calibrate.py runs in one process; leave accelerate launch out")
    pipe = setup.pipe
    matched, labels, table = classes_of(args, setup)
    checked = None if args.data is None else check_data(args, matched, table, pipe.device)
    found = {"latent_std": getattr(pipe, "latent_std", 1.0)}
    rule = _cli.build_rule(args, **found, **_steering.classifier_for(args, pipe))
    if args.noisy and getattr(pipe, "vae", None) is not None:
        raise ValueError("--noisy shows the classifier pixels, but this pipeline works on latents")
    sides = {"height": args.height, "width": args.width}
    decode = None if args.noisy else image_decoder(pipe, **sides)
    shown = {k: v for k, v in vars(args).items() if k not in ("out", "overwrite", "traceback")}
    config = run_settings(pipe, repr(rule), args.steps, setup.call)
    note = {"calibration": {**config, **setup.model, "options": json.loads(_plain(shown))}}
    parts = prepare_folder(args.out, json.loads(_plain(note)), args.overwrite)
    classes = "class_labels" in inspect.signature(pipe.__call__).parameters

    def probe(given: Tensor) -> ClassifierProbe:
        return ClassifierProbe(
            matched, rule, given.to(pipe.device), table, decode=decode, noisy=args.noisy,
            contrast=classes and not args.noisy,
        )  # fmt: skip

    stages = record_stages(
        pipe, setup.requests, probe, labels=labels, parts=parts, weak=setup.weak,
        steps=args.steps, batch_size=args.batch_size, call=setup.call,
    )  # fmt: skip
    result = calibrate(stages, bins=args.bins)
    by = {"classifier": args.classifier, "softplus": args.softplus, "real_images": checked}
    found = {**summary(result), **by}
    write_json(args.out / "calibration.json", found)
    figure = reliability_figure(result)
    _save(figure, args.out / "reliability.png")
    print(table_of(result), f"\n{args.out / 'calibration.json'}, {args.out / 'reliability.png'}")


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    write_bytes(path, buffer.getvalue())


def _plain(value: Any) -> str:
    return json.dumps(value, default=str, sort_keys=True)


if __name__ == "__main__":
    raise SystemExit(_cli.run(main))
