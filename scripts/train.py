"""Train a class-conditional model on labelled images and save it as a pipeline folder.

python scripts/train.py --out runs/cifar10                          (the embedded model)
python scripts/train.py --objective kdiff --k learned --out runs/kdiff
python scripts/train.py --objective pfgmpp --augment-dim 128 --out runs/pfgmpp
accelerate launch scripts/train.py --data my/folder --resolution 64 --out runs/mine

The same command goes on where a stopped run was. OUT/model is the pipeline, OUT/weak the early
weights that --weak-at asks for.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import _cli

from diffsteer.training import TrainConfig, Trainer, averaged_pipeline, load_images
from diffsteer.training.checkpoint import list_checkpoints
from diffsteer.training.network import with_dtype
from diffsteer.training.run_folder import read_run


def parser() -> argparse.ArgumentParser:
    parser = _cli.new_parser(__doc__, usage="--out OUT [options]")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the run; an unfinished run goes on")
    add("--save-only", action="store_true", help="save the newest checkpoint, train nothing")
    more = {"nargs": "+", "default": [], "metavar": "FIELD"}
    add("--allow-change", **more, help="settings that may differ from the run's: steps ...")
    for item in fields(TrainConfig):
        flag, kind = "--" + item.name.replace("_", "-"), type(item.default)
        shown = "none" if item.default == "" else item.default
        text = {"help": f"{item.metadata['help']} (default: {shown})"}
        if kind is bool:
            add(flag, action=argparse.BooleanOptionalAction, default=item.default, **text)
        else:
            choices = item.metadata["choices"] or None
            add(flag, type=kind, default=item.default, choices=choices, **text)
    return parser


def save_pipeline(out: Path) -> None:
    """Write OUT/model from the newest checkpoint."""
    from diffsteer.pipelines.files import whole_folder  # diffusers takes seconds; --help has none

    pipe = averaged_pipeline(out)
    with_dtype(pipe.transformer, read_run(out)[0].save_dtype)
    with whole_folder(out / "model") as aside:
        pipe.save_pretrained(aside)
    step = int(list_checkpoints(out / "checkpoints")[-1].name.rpartition("-")[2])
    print(f"{out / 'model'} is the pipeline, after {step} updates")


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.save_only:
        save_pipeline(args.out)
        return
    config = TrainConfig(**{item.name: getattr(args, item.name) for item in fields(TrainConfig)})
    images = load_images(config.data, split=config.split, resolution=config.resolution)
    trainer = Trainer(config, images, args.out, allow_change=tuple(args.allow_change))
    if not trainer.run():
        raise KeyboardInterrupt  # stopped by a signal: reported as every script does
    if trainer.accelerator.is_main_process:
        save_pipeline(args.out)


if __name__ == "__main__":
    raise SystemExit(_cli.run(main))
