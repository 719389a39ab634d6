"""Generate images from the embedded model, a pipeline folder or a hub id, under any guidance.

python scripts/generate.py --num 100 --guidance apg --scale 6 --out out/apg6
python scripts/generate.py --model my/sd3.5 --prompt "a red fox in snow" --out out/fox
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import _cli
import _steering
from accelerate import PartialState

from diffsteer.pipelines import (
    ImageRequest,
    generate_images,
    load_pipeline,
    load_weak,
    model_digest,
    plan_images,
    takes_classes,
)


def parser() -> argparse.ArgumentParser:
    parser = _cli.new_parser(__doc__, usage="--out OUT [options]")
    parser.add_argument("--steps", type=int, default=20, help="solver steps (default: 20)")
    add_image_options(parser)
    _cli.add_rule_options(parser)
    _steering.add_setting_options(parser)
    _steering.add_classifier_options(parser)
    return parser


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add everything that says which images to make, by which model, and where."""
    add = parser.add_argument
    add("--model", default="embedded", help="embedded (default), a pipeline folder, or a hub id")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--weak", help="a weaker model: embedded, a folder, skip:LAYERS, or perturb:LAYERS")
    add("--out", type=Path, required=True, help="folder to fill; an unfinished run is continued")
    add("--overwrite", action="store_true", help="remove the run that is in the folder")
    add("--classes", default="all", help="class indices or names, dealt out in turn: 0,3,cat")
    add("--prompt", action="append", default=[], help="a prompt; may be given several times")
    add("--prompt-file", type=Path, help="a text file, one prompt a line")
    add("--negative-prompt", help="what the unconditional branch is given")
    add("--num", type=int, help="how many images (default: as many as seeds, or 16)")
    add("--seeds", help="numbers and ranges: 0-9,20, or 100- with --num (default: from 0)")
    add("--batch-size", type=int, default=16, help="images a call (default: 16)")
    add("--height", type=int, help="of the image, where the pipeline takes it")
    add("--width", type=int, help="of the image, where the pipeline takes it")
    add("--call", action="append", default=[], metavar="NAME=JSON", help="further call arguments")
    _cli.add_dtype_option(parser)
    _cli.add_device_option(parser)


@dataclass(frozen=True)
class Setup:
    """What the image options come to: a pipeline, what to make of it, and how to call it."""

    pipe: Any
    requests: list[ImageRequest]
    call: dict[str, Any]
    weak: Any
    state: PartialState
    model: dict[str, Any]


def read_options(args: argparse.Namespace) -> Callable[[], Setup]:
    """Check what can be checked without the model; the function returned loads it.

    Raises:
        ValueError: if seeds, prompts or further call arguments are no good.
    """
    seeds, prompts, call = seeds_from(args), prompts_from(args), call_from(args)
    return lambda: _load(args, seeds, prompts, call)


def _load(
    args: argparse.Namespace, seeds: list[int], prompts: list[str], call: dict[str, Any]
) -> Setup:
    # A rank may wait for the slowest one much longer than the ten minutes NCCL would grant it.
    # On CPUs alone the ranks find each other only if it is said that they are on CPUs.
    on_cpu = (args.device or _cli.default_device()) == "cpu"
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
    device = args.device if args.device and state.num_processes == 1 else state.device
    dtype = _cli.dtype_for(args.dtype, device)
    pipe = load_pipeline(args.model, dtype=dtype, device=device, revision=args.revision)
    if not prompts and not takes_classes(pipe):
        raise ValueError(f"--model {args.model} makes images from text; give --prompt")
    if prompts:
        requests = plan_images(seeds, prompts=prompts)
    else:
        classes = None if args.classes == "all" else _labels(args.classes)
        requests = plan_images(seeds, pipe=pipe, classes=classes)
    weak = None if args.weak is None else load_weak(args.weak, pipe)
    model = {
        "model": args.model,
        "weak": args.weak,
        "revision": args.revision,
        "model_digest": model_digest(args.model),
    }
    return Setup(pipe, requests, call, weak, state, model)


def seeds_from(args: argparse.Namespace) -> list[int]:
    if args.num is not None and args.num < 1:
        raise ValueError(f"--num must be at least 1, got {args.num}")
    if args.seeds is None:
        return list(range(args.num or 16))
    seeds = _cli.integers(args.seeds, count=args.num)
    if args.num is not None and len(seeds) != args.num:
        raise ValueError(f"--seeds gives {len(seeds)} seeds, but --num is {args.num}; drop one")
    return seeds


def prompts_from(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompt_file is not None:
        lines = args.prompt_file.read_text(encoding="utf-8").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"--prompt-file {args.prompt_file} holds no prompt")
    return prompts


def call_from(args: argparse.Namespace) -> dict[str, Any]:
    call = {"negative_prompt": args.negative_prompt, "height": args.height, "width": args.width}
    call = {name: value for name, value in call.items() if value is not None}
    for item in args.call:
        name, equals, text = item.partition("=")
        try:
            call[name] = json.loads(text)
        except ValueError:
            call[name] = text  # a plain word
        if not (equals and name.isidentifier()):
            raise ValueError(f"--call must look like NAME=JSON, got {item!r}")
    return call


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    load = read_options(args)
    settings = _steering.settings_from(args)
    _cli.build_rule(args, **settings)
    setup = load()
    found = {"latent_std": getattr(setup.pipe, "latent_std", 1.0)}
    found |= _steering.classifier_for(args, setup.pipe) | settings
    rule = _cli.build_rule(args, **found)
    generate_images(
        setup.pipe, setup.requests, args.out, rule=rule, weak=setup.weak, steps=args.steps,
        batch_size=args.batch_size, config=setup.model, call=setup.call, overwrite=args.overwrite,
        state=setup.state,
    )  # fmt: skip
    if setup.state.is_main_process:
        count, grid = len(setup.requests), args.out / "grid.png"
        print(f"{count} images in {args.out}, seen together in {grid}")


def _labels(text: str) -> list[int | str]:
    words = [word.strip() for word in text.split(",")]
    return [int(word) if word.lstrip("-").isdigit() else word for word in words]


if __name__ == "__main__":
    raise SystemExit(_cli.run(main))
