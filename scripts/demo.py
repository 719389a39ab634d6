"""See what guidance does: the same seeds without guidance, and under CFG and APG at two scales.

    python scripts/demo.py                   out/demo/grid.png, images, metrics.json, run.json

Every setting draws the same images, from the same noise, with the embedded model. The classifier
that scores them has never been used to guide.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import _cli
from PIL import Image

from diffsteer import AdaptiveProjectedGuidance, ClassifierFreeGuidance, __version__
from diffsteer.core import Guidance
from diffsteer.eval import EvalResult, EvalSuite, evaluate
from diffsteer.eval.report import table
from diffsteer.pipelines import (
    ImageFolder,
    ImageRequest,
    files,
    generate_images,
    image_grid,
    load_pipeline,
    model_digest,
    plan_images,
)

METRICS = ("accuracy", "colour")
DISTANCES = ("fd", "pr")  # of few samples they say more about the number than about the model
ENOUGH = 1000


def parser() -> argparse.ArgumentParser:
    parser = _cli.new_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/demo"), help="folder to fill (default: out/demo)")
    add("--overwrite", action="store_true", help="begin anew what is there")
    add("--model", default="embedded", help="embedded (default), or a class-conditional folder")
    add("--scales", type=float, nargs=2, default=[3.0, 8.0], help="moderate and high (3 and 8)")
    add("--num", type=int, default=120, help="images of each setting that are scored (120)")
    add("--steps", type=int, default=20, help="solver steps (20)")
    add("--batch-size", type=int, default=50, help="images a call (50)")
    _cli.add_device_option(parser)
    return parser


def settings(scales: Sequence[float], latent_std: float) -> dict[str, Guidance | None]:
    """The rows of the picture."""
    rules: dict[str, Guidance | None] = {"no guidance": None}
    for scale in scales:
        rules[f"CFG {scale:g}"] = ClassifierFreeGuidance(scale)
        rules[f"APG {scale:g}"] = AdaptiveProjectedGuidance(scale, latent_std=latent_std)
    return rules


def score(folders: dict[str, Path], num: int) -> dict[str, EvalResult]:
    """The numbers of each setting, by the classifier that is kept for evaluation."""
    suite = EvalSuite([*METRICS, *(DISTANCES if num >= ENOUGH else ())])
    return {name: evaluate(folder, suite=suite) for name, folder in folders.items()}


def picture(
    folders: dict[str, Path], requests: Sequence[ImageRequest], scores: dict[str, EvalResult]
) -> Image.Image:
    """One row a setting, one column a class; the same noise all the way down a column."""
    shown = requests[: min(len({request.label for request in requests}), 10)]
    images = [image for f in folders.values() for image in ImageFolder(f).open(shown)]
    rows = []
    for name, result in scores.items():
        right, colour = (result.values.get(key) for key in ("accuracy", "saturation"))
        lines = [name] if right is None else [name, f"{right:.0%} recognised"]
        rows.append("\n".join([*lines, f"saturation {colour:.2f}"]))
    heads = [request.name or f"class {request.label}" for request in shown]
    return image_grid(images, len(shown), heads=heads, rows=rows)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    began = time.time()
    if args.num < 1:
        raise ValueError(f"--num must be at least 1, got {args.num}")
    pipe = load_pipeline(args.model, device=args.device or _cli.default_device())
    requests = plan_images(range(args.num), pipe=pipe)
    rules = settings(args.scales, getattr(pipe, "latent_std", 1.0))
    model = {"model": args.model, "model_digest": model_digest(args.model)}
    folders = {
        name: generate_images(
            pipe, requests, args.out / name.lower().replace(" ", "-"), rule=rule, steps=args.steps,
            batch_size=args.batch_size, config=model, overwrite=args.overwrite, title=name,
        )
        for name, rule in rules.items()
    }  # fmt: skip
    generated = time.time()
    scores = score(folders, args.num)
    files.write_png(args.out / "grid.png", picture(folders, requests, scores))
    files.write_json(args.out / "metrics.json", {n: s.as_dict() for n, s in scores.items()})
    run = {
        "command": ["scripts/demo.py", *(sys.argv[1:] if argv is None else argv)],
        "diffsteer": __version__,
        **model,
        "settings": {name: str(folder.relative_to(args.out)) for name, folder in folders.items()},
        "seconds": {
            "generate": round(generated - began, 1),
            "score": round(time.time() - generated, 1),
        },
    }
    files.write_json(args.out / "run.json", run)
    print(table(list(scores.items())))
    print(f"\n{args.out / 'grid.png'} shows them side by side ({time.time() - began:.0f} s)")


if __name__ == "__main__":
    raise SystemExit(_cli.run(main))
