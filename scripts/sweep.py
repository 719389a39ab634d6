"""Many guidance settings over the same seeds: generate, score, compare; goes on where it stopped.

    python scripts/sweep.py --num 500 --out out/sweep --rule none --rule cfg --scale 1.5 2 4 8
    python scripts/sweep.py --num 500 --out out/apg --rule apg --scale 4 8 --eta 0 0.5
    python scripts/sweep.py --num 500 --out out/equal --budget-nfe 60 --grid grid.yaml

OUT/sweep.csv and OUT/sweep.json are the table, OUT/grid.png shows every point on the same seeds,
and the plots show fd against accuracy, precision against recall, saturation against scale.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import _cli
import _grid
import generate

from diffsteer.eval import EvalSuite, Reading
from diffsteer.eval.pretrained import EXTRACTORS, load_extractor
from diffsteer.eval.scores import METRICS
from diffsteer.eval.settings import PROTOCOLS, protocol
from diffsteer.pipelines import PointResult, at_budget, run_sweep
from diffsteer.pipelines.sweep_report import distance

SHOWN = ("accuracy", "precision", "recall", "saturation")


def parser() -> argparse.ArgumentParser:
    parser = _cli.new_parser(__doc__, usage="--out OUT [options] --rule METHOD [its options] ...")
    generate.add_image_options(parser)
    add = parser.add_argument
    add("--budget-nfe", type=int, help="network evaluations an image; decides the steps of each")
    add("--metrics", nargs="+", default=["fd", "pr", "accuracy", "colour"], choices=list(METRICS),
        metavar="NAME", help="default: fd pr accuracy colour")  # fmt: skip
    add("--extractor", nargs="+", default=["cifar"], choices=sorted(EXTRACTORS),
        help="feature networks; all but cifar need weights (default: cifar)")  # fmt: skip
    add("--protocol", default="default", choices=sorted(PROTOCOLS), help="default: %(default)s")
    add("--reference", help="real images or statistics (default: the embedded CIFAR-10 test set)")
    _grid.add_grid_options(parser)
    return parser


def text_table(results: Sequence[PointResult]) -> str:
    """One line a point: price and main scores, with standard errors where they are known."""
    rows = [["point", "steps", "nfe", "s/image", "distance", *SHOWN]]
    for found in results:
        seconds, fd = found.seconds_per_image, distance(found)
        cells = [found.point.name, str(found.point.steps), str(found.cost.nfe)]
        cells.append("-" if seconds is None else f"{seconds:.3f}")
        cells.append("-" if fd is None else f"{fd.value:.2f}")
        for name in SHOWN:
            score = found.result.scores.get(name)
            error = "" if score is None or not score.stderr else f" ± {score.stderr:.3f}"
            cells.append("-" if score is None else f"{score.value:.3f}{error}")
        rows.append(cells)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    groups = _grid.groups_of(args)
    if args.budget_nfe is not None and any("steps" in group for group in groups):
        raise ValueError("--budget-nfe decides the number of steps; leave --steps out")
    # Whatever can be checked without the model is checked before it is loaded.
    _grid.points_of(groups)
    load = generate.read_options(args)
    setup = load()
    pipe, settings = setup.pipe, protocol(args.protocol)
    points = _grid.points_of(groups, latent_std=getattr(pipe, "latent_std", 1.0))
    if args.budget_nfe is not None:
        points = at_budget(
            pipe, setup.requests[0], points, args.budget_nfe, weak=setup.weak, call=setup.call
        )
    extractors = [load_extractor(name, settings, device=pipe.device) for name in args.extractor]
    results = run_sweep(
        pipe, setup.requests, args.out, points,
        suite=EvalSuite(args.metrics, extractors=extractors, settings=settings),
        reference=args.reference, reading=Reading(), weak=setup.weak, batch_size=args.batch_size,
        config=setup.model, call=setup.call, overwrite=args.overwrite, state=setup.state,
    )  # fmt: skip
    if setup.state.is_main_process:
        print(text_table(results))
        skipped = {reason for found in results for reason in found.result.skipped.items()}
        for metric, reason in sorted(skipped):
            print(f"no {metric}: {reason}")
        pictures = ", ".join(sorted(path.name for path in args.out.glob("*.png")))
        print(f"\n{args.out / 'sweep.csv'}; beside it {pictures}")


if __name__ == "__main__":
    raise SystemExit(_cli.run(main))
