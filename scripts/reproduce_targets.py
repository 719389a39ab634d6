"""Reproduce docs/science/targets.md: what k-Diff and PFGM++ do, in four parts.

python scripts/reproduce_targets.py --out runs/targets                     (all of it)
python scripts/reproduce_targets.py --out runs/targets --parts a d         (minutes on a CPU)
python scripts/reproduce_targets.py --out runs/big --parts b c --resolution 32 --layers 8 --heads 6
    --head-dim 64 --steps 50000 --samples 10000 --seeds 3                  (one line; on a GPU)

The same command goes on where it was stopped. OUT/report.md holds the tables, OUT/<part> the
points they were made of.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import _cli
import torch
from _page import rewrite
from _targets_images import Study, kdiff_part, pfgmpp_part
from _targets_points import Points
from _targets_toy import atoms_part, learned_part, linear_part

from diffsteer.eval import cifar_extractor
from diffsteer.pipelines import files
from diffsteer.training import TrainConfig

PICTURES = {
    "a": ("learned",), "b": ("curves", "samples"), "c": ("robustness", "samples"), "d": ()
}  # fmt: skip
TITLES = {
    "a": "Linear predictor, and a learned k on data of known dimension",
    "b": "CIFAR-10 at every k",
    "c": "CIFAR-10 at every D",
    "d": "Three atoms in the plane",
}


def parser() -> argparse.ArgumentParser:
    parser = _cli.new_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results; finished points are kept")
    add("--parts", nargs="+", choices=list(TITLES), default=list(TITLES), help="which parts")
    add("--seeds", type=int, default=1, help="training runs of an image model (default: 1)")
    add("--toy-seeds", type=int, default=3, help="runs on toy data (default: 3)")
    add("--toy-steps", type=int, default=2500, help="updates on toy data (default: 2500)")
    add("--points", type=int, default=100_000, help="samples of part d (default: 100000)")
    add("--samples", type=int, default=1000, help="images a model is scored on (default: 1000)")
    add("--steps", type=int, default=3000, help="updates of an image model (default: 3000)")
    add("--data", default="uoft-cs/cifar10", help="CIFAR-10: a folder of parquet, or the hub name")
    for name, value in (("resolution", 16), ("patch-size", 4), ("layers", 3), ("heads", 2)):
        add(f"--{name}", type=int, default=value, help=f"of the image models (default: {value})")
    add("--head-dim", type=int, default=32, help="of the image models (default: 32)")
    add("--batch-size", type=int, default=64, help="of the image models (default: 64)")
    add("--precision", default="bf16", choices=("bf16", "fp32"), help="of their training")
    add("--page", type=Path, help="put the tables into this page, between its marks")
    add("--plots", type=Path, help="copy the pictures there, as targets_*.png")
    return parser


def study_of(args: argparse.Namespace) -> Study:
    sizes = ("resolution", "patch_size", "layers", "heads", "head_dim", "batch_size", "precision")
    config = TrainConfig(
        data=args.data,
        steps=args.steps,
        warmup=min(200, args.steps // 10),
        ema=0.995,
        weak_at=0,
        preview_every=0,
        checkpoint_every=max(args.steps // 4, 1),
        save_dtype="float32",
        **{name: getattr(args, name) for name in sizes},
    )
    return Study(config, args.out, args.samples)


def run_part(part: str, args: argparse.Namespace) -> str:
    """The tables of one part."""
    folder = args.out / part
    if part == "a":
        settings = {"steps": args.toy_steps}
        learned = Points(folder / "learned", settings)
        linear = linear_part(Points(folder / "linear", {}))
        return f"{linear}\n\n{learned_part(learned, args.toy_seeds, args.toy_steps)}"
    if part == "d":
        return atoms_part(Points(folder, {"points": args.points}), args.points)
    study = study_of(args)
    free = ("data", "checkpoint_every", "preview_every")
    settings = {k: v for k, v in asdict(study.config).items() if k not in free}
    judge = cifar_extractor().id
    points = Points(folder, {**settings, "samples": args.samples, "judge": judge})
    return (kdiff_part if part == "b" else pfgmpp_part)(study, points, args.seeds)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    counts = ("seeds", "toy_seeds", "toy_steps", "points", "samples", "steps")
    low = [name for name in counts if getattr(args, name) < 1]
    if low:
        raise ValueError(f"--{low[0].replace('_', '-')} must be at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        text = run_part(part, args)
        files.write_bytes(
            args.out / f"{part}.md", f"## ({part}) {TITLES[part]}\n\n{text}\n".encode()
        )
    publish(args.out, args.page, args.plots)
    print(args.out / "report.md")


def publish(out: Path, page: Path | None, plots: Path | None) -> None:
    """Join the tables of all parts that are done, and put them and the pictures where wanted."""
    parts = []
    for part, names in PICTURES.items():
        if (out / f"{part}.md").is_file():
            parts.append((out / f"{part}.md").read_text())
        for name in names:
            picture = out / part / f"{name}.png"
            if plots is not None and picture.is_file():
                plots.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(picture, plots / f"targets_{part}_{name}.png")
    made = f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)\n"
    files.write_bytes(
        out / "report.md", "\n".join(["# Targets: measured\n", made, *parts]).encode()
    )
    if page is not None:
        rewrite(page, "reproduce_targets.py", "\n".join(parts))


if __name__ == "__main__":
    raise SystemExit(_cli.run(main))
