"""The study of guidance on the embedded model: images, scores with errors, plots, and the page.

    python scripts/reproduce_guidance.py --out out/guidance --samples 300 --parts a d e
    python scripts/reproduce_guidance.py --out out/guidance --samples 5000 --seeds 3 --device cuda

The same command goes on where it stopped. Parts: a APG, b GFCG-style, c EluCD, d CFG-MP,
e autoguidance, f compositions. Every score is by the evaluation classifier, which guides nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import _cli
import _science_page
import _science_plots
import torch
from _page import rewrite
from _science_coarse import CoarseDistance
from _science_points import PARTS, Tools, cfg_points, one_view, points_of
from _science_trace import gaps, honesty, pushes

from diffsteer.eval import EvalSuite, load_classifier, open_images
from diffsteer.eval.cache import FeatureCache
from diffsteer.eval.features import FeatureSet
from diffsteer.eval.half_samples import Estimate, HalfSampling, mean_of
from diffsteer.eval.reference import statistics_for
from diffsteer.eval.run import read_features
from diffsteer.pipelines import (
    ImageRequest,
    PointResult,
    SweepPoint,
    files,
    load_pipeline,
    load_weak,
    model_digest,
    plan_images,
    run_sweep,
)

Scores = dict[str, dict[str, Estimate]]


def parser() -> argparse.ArgumentParser:
    parser = _cli.new_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/guidance"), help="folder (default: out/guidance)")
    add("--samples", type=int, default=5000, help="images a point and seed (default: 5000)")
    add("--seeds", type=int, default=3, help="independent sets of images a point (default: 3)")
    add("--steps", type=int, default=20, help="solver steps, except in part d (default: 20)")
    add("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="default: all")
    add("--points", nargs="+", metavar="NAME", help="only these points; no page is written")
    add("--batch-size", type=int, default=250, help="images a call (default: 250)")
    add("--traced", type=int, default=50, help="images whose trajectories are watched (50)")
    add("--halves", type=int, default=200, help="half-samples for the errors (default: 200)")
    add("--real", help="real images, for their colours and coarse pixels: a folder or parquet file")
    add("--page", type=Path, help="rewrite the results of this page (docs/science/guidance.md)")
    add("--plots", type=Path, help="put plots here (default: OUT)")
    _cli.add_dtype_option(parser)
    _cli.add_device_option(parser)
    return parser


def chosen(args: argparse.Namespace, tools: Tools) -> list[SweepPoint]:
    """The points of the parts asked for, each once."""
    points = cfg_points(tools)
    for part in args.parts:
        points += points_of(part, tools)
    if args.points:
        unknown = sorted(set(args.points) - {point.name for point in points})
        if unknown:
            raise ValueError(f"--points {unknown[0]} is no point of the parts {args.parts}")
        points = [point for point in points if point.name in args.points]
    return points


def estimates(
    results: Sequence[PointResult], requests: Sequence[ImageRequest], sets: int, halves: int,
    suite: EvalSuite, cache: FeatureCache, real: str | None = None,
) -> Scores:  # fmt: skip
    """Scores with errors: each set of seeds by itself, then the mean over the sets."""
    extractor = suite.extractors[0]
    statistics, _ = statistics_for(extractor, None)
    sampling = HalfSampling(statistics.gaussian(), statistics.features, halves=halves)
    cuts = torch.arange(len(requests)).split(len(requests) // sets)
    coarse = None if real is None else CoarseDistance(real, halves)
    found: Scores = {}
    for result in results:
        features = ordered(result.folder, requests, suite, cache)
        parts = [sampling(features.rows(rows)) for rows in cuts]
        found[result.point.name] = {
            name: mean_of([part[name] for part in parts]) for name in parts[0]
        }
        if coarse is not None:
            found[result.point.name]["coarse"] = coarse(result.folder, requests, cuts)
    return found


def ordered(
    folder: Path, requests: Sequence[ImageRequest], suite: EvalSuite, cache: FeatureCache
) -> FeatureSet:
    """Features of a point's images in the order of the requests, with their labels."""
    source = open_images(folder / "images")
    features = read_features(source, suite.extractors, cache=cache).features
    place = {Path(name).name: row for row, name in enumerate(source.names)}
    rows = {int(index): row for row, index in enumerate(features.index.tolist())}
    wanted = [rows[place[Path(request.file).name]] for request in requests]
    labels = torch.tensor([request.label for request in requests])
    return replace(features.rows(torch.tensor(wanted)), labels=labels)


def real_colours(where: str | None, suite: EvalSuite, cache: FeatureCache) -> dict[str, float]:
    """Saturation, contrast and clipped share of real images, if there are any."""
    if where is None:
        return {}
    features = read_features(open_images(where), suite.extractors, cache=cache, title="real")
    means = features.features.colour.double().mean(0).tolist()
    return dict(zip(("saturation", "contrast", "clipped"), means, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    for name in ("samples", "seeds", "steps", "traced", "halves"):
        if getattr(args, name) < (2 if name == "halves" else 1):
            raise ValueError(f"--{name} must be larger, got {getattr(args, name)}")
    device = args.device or _cli.default_device()
    pipe = load_pipeline("embedded", dtype=_cli.dtype_for(args.dtype, device), device=device)
    weak = load_weak("embedded", pipe)
    tools = Tools(one_view(load_classifier("guidance")).to(device), pipe.latent_std, args.steps)
    requests = plan_images(range(args.samples * args.seeds), pipe=pipe)
    shown = requests[: args.traced]
    fitted = None
    if set(args.parts) & set("bcf"):
        fitted = honesty(pipe, shown, tools, args.out)
        high = float("inf") if fitted["high"] is None else fitted["high"]
        tools = replace(tools, temperature=fitted["temperature"], low=fitted["low"], high=high)
    suite, cache = EvalSuite(["fd", "pr", "accuracy", "colour"]), FeatureCache(args.out / "cache")
    points = chosen(args, tools)
    results = run_sweep(
        pipe, requests, args.out, points, suite=suite, cache=cache, weak=weak,
        batch_size=args.batch_size,
        config={"model": "embedded", "model_digest": model_digest("embedded")},
    )  # fmt: skip
    if args.points:
        return
    scores = estimates(results, requests, args.seeds, args.halves, suite, cache, args.real)
    study = _science_page.Study(
        args.samples, args.seeds, args.steps, tuple(args.parts), results, scores,
        pushes(pipe, shown, points, weak, args.out) if "a" in args.parts else {},
        gaps(pipe, shown, points, weak, args.out) if "d" in args.parts else {},
        fitted, real_colours(args.real, suite, cache), suite.extractors[0].id,
    )  # fmt: skip
    plots = _science_plots.write(study, args.plots or args.out)
    text = _science_page.results(study)
    files.write_bytes(args.out / "results.md", text.encode())
    files.write_bytes(args.out / "results.json", json.dumps(study.numbers(), indent=1).encode())
    if args.page:
        rewrite(args.page, "reproduce_guidance.py", text)
    print(text)
    print(f"{args.out / 'results.md'}, {', '.join(str(plot) for plot in plots)}")


if __name__ == "__main__":
    raise SystemExit(_cli.run(main))
