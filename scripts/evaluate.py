"""Score folders of samples: Fréchet and kernel distance, precision, recall, accuracy, colours.

    python scripts/evaluate.py out/apg                       against the embedded CIFAR-10 test set
    python scripts/evaluate.py out/cfg out/apg --reference real/      several folders, one table
    python scripts/evaluate.py out/apg --json -              JSON alone on standard output
    python scripts/evaluate.py stats real/ --out real.npz --features 5000
    python scripts/evaluate.py convert edm2.pkl out.npz      statistics of another program to ours
    python scripts/evaluate.py compare a/metrics.json b/metrics.json

Exit codes: 0 done, 2 bad input, 3 done with warnings under --strict.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _device import device_name

from diffsteer.eval.cache import FeatureCache
from diffsteer.eval.images import open_images
from diffsteer.eval.labels import find_labels
from diffsteer.eval.pages import grids_of, write_page, write_plots
from diffsteer.eval.pretrained import EXTRACTORS, load_extractor
from diffsteer.eval.reference import statistics_of
from diffsteer.eval.report import EvalResult, read_results, table, write_text
from diffsteer.eval.run import Reading, environment, evaluate, read_features, set_reference
from diffsteer.eval.scorers import SCORERS, load_scorer
from diffsteer.eval.scores import DEFAULT_METRICS, METRICS
from diffsteer.eval.settings import PROTOCOLS, protocol
from diffsteer.eval.stats import read_statistics, write_statistics
from diffsteer.eval.suite import EvalSuite


def main(arguments: list[str]) -> int:
    commands = {"stats": run_stats, "convert": run_convert, "compare": run_compare}
    command = commands.get(arguments[0]) if arguments else None
    try:
        return command(arguments[1:]) if command else run_evaluate(arguments)
    except KeyboardInterrupt:
        print("stopped; no result was written", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2


def run_evaluate(arguments: list[str]) -> int:
    options = evaluate_parser().parse_args(arguments)
    folders = [*options.samples, *options.more]
    if not folders:
        raise ValueError("no samples given: name at least one folder, .zip, .npz or dataset")
    out = None if options.out is None else metrics_file(options.out)
    if options.plots and out is None:
        raise ValueError("--plots writes beside metrics.json: pass --out too")
    if (options.plots or options.html) and find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib: pip install diffsteer[plots]")
    text = Path(options.json) if options.json and options.json != "-" else None
    for path in (out, text, options.html):
        if path is not None and path.exists() and not options.overwrite:
            raise FileExistsError(f"{path} exists; choose another place or pass --overwrite")
    with ranks():
        return score_folders(folders, out, options)


def score_folders(folders: list[str], out: Path | None, options: argparse.Namespace) -> int:
    """Score every folder with one suite; rank 0 writes. The exit code."""
    suite = make_suite(options)
    reading = make_reading(options)
    cache = None if options.no_cache else FeatureCache(verify=options.cache_verify)
    remarks: list[str] = []
    if options.reference is not None:
        remarks = set_reference(suite, options.reference, reading, cache=cache, force=options.force)
    results, grids = {}, []
    for folder in folders:
        found = evaluate(folder, suite=suite, reading=reading, labels=options.labels,
                         prompts=options.prompts, cache=cache)  # fmt: skip
        meta = {**found.meta, "versions": environment()}
        results[folder] = replace(found, meta=meta, warnings=[*remarks, *found.warnings])
        if options.html:
            grids += grids_of(suite, folder, options.reference)
    if int(os.environ.get("RANK", "0")) == 0:
        show(results, options)
        if out is not None:
            write_text(out, as_json(results) + "\n", overwrite=options.overwrite)
        names = suite.extractors[0].class_names
        if options.plots and out is not None:
            write_plots(out.parent, results, class_names=names)
        if options.html:
            write_page(options.html, results, grids, class_names=names, overwrite=options.overwrite)
    warned = any(result.warnings or result.skipped for result in results.values())
    return 3 if warned and options.strict else 0


def run_stats(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("evaluate.py stats", description="Write reference statistics.")
    parser.add_argument("data", help="folder, .zip, .npz, .parquet or hub dataset of real images")
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    parser.add_argument(
        "--features", type=int, nargs="?", const=-1, default=0, metavar="N",
        help="also keep N feature rows (all without N) for precision, recall and kernel distance",
    )  # fmt: skip
    add_reading_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.overwrite:
        raise FileExistsError(f"{options.out} exists; choose another --out or pass --overwrite")
    if len(options.extractor) > 1:
        raise ValueError("--extractor: statistics are of one space; write a file for each")
    extractor = load_extractor(
        options.extractor[0], protocol(options.protocol), device=options.device
    )
    source = open_images(options.data)
    read = read_features(source, [extractor], make_reading(options), title="statistics")
    labels = find_labels(source, class_names=extractor.class_names)
    features = read.features
    if labels is not None:
        features = replace(features, labels=labels[features.index])
    rows = None if options.features < 0 else options.features
    name = Path(options.data).name  # the file may be given away: no path of this machine in it
    warnings = [warning.replace(source.where, name) for warning in read.warnings()]
    made = statistics_of(features, extractor, rows=rows, data=name,
                         warnings=warnings, versions=environment())  # fmt: skip
    write_statistics(options.out, made, overwrite=options.overwrite)
    print(f"{options.out}: {made.count} images, {made.dim} features ({extractor.id})",
          file=sys.stderr)  # fmt: skip
    return 0


def run_convert(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "evaluate.py convert", description="Turn statistics of ADM, EDM, EDM2, ... into ours."
    )
    parser.add_argument("source", type=Path, help=".npz, .pkl (read without running it) or .pt")
    parser.add_argument("out", type=Path, help="the .npz to write; its mu and sigma suit the peers")
    parser.add_argument(
        "--space", help="which of several spaces in the file (EDM2: fid, fd_dinov2)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    options = parser.parse_args(arguments)
    found = read_statistics(options.source, space=options.space)
    header = {**found.header, "converted_from": options.source.name}
    write_statistics(options.out, replace(found, header=header), overwrite=options.overwrite)
    return 0


def run_compare(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("evaluate.py compare", description="Results side by side.")
    parser.add_argument("results", nargs="+", type=Path, help="metrics.json files or their folders")
    options = parser.parse_args(arguments)
    found = [pair for path in options.results for pair in read_results(metrics_file(path))]
    for name in ("settings", "extractors", "reference"):
        if len({json.dumps(result.meta.get(name), sort_keys=True) for _, result in found}) > 1:
            print(f"warning: the results differ in {name}; their numbers do not compare",
                  file=sys.stderr)  # fmt: skip
    print(table(found))
    return 0


def evaluate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("samples", nargs="*", help="folders (or .zip, .npz, .parquet, dataset ids) of samples")
    add("--samples", nargs="+", default=[], dest="more", metavar="SAMPLES", help="the same")
    add("--reference", help="real images or statistics; the embedded CIFAR-10 test set by default")
    add("--metrics", default=",".join(DEFAULT_METRICS),
        help=f"comma-separated, or all: {', '.join(METRICS)} (default: %(default)s)")  # fmt: skip
    add("--k", type=int, help="neighbour of precision, recall, density, coverage")
    add("--labels", help="'from-dirs', or a CSV of file and label; run.json is found by itself")
    add("--prompts", help="text or .jsonl of file and prompt; run.json is found by itself")
    known = ", ".join(SCORERS)
    add("--scorer", nargs="+", default=[], metavar="NAME",
        help=f"scores of images under prompts: {known}; NAME=FOLDER for other weights")  # fmt: skip
    add("--max-rows", type=int, help="features kept for what needs rows; bounds the memory")
    add("--out", type=Path, help="folder for metrics.json (or a .json file)")
    add("--overwrite", action="store_true", help="replace an existing result")
    add("--json", metavar="FILE", help="write JSON here; '-' is standard output, and nothing else")
    add("--plots", action="store_true", help="figures beside metrics.json (needs matplotlib)")
    add("--html", type=Path, metavar="FILE", help="a page with table, figures and image grids")
    add("--strict", action="store_true", help="exit with 3 if there were warnings")
    add("--force", action="store_true", help="accept statistics of another extractor")
    add("--no-cache", action="store_true", help="extract features even if they are known")
    add("--cache-verify", action="store_true", help="recognise images by their bytes, not by date")
    add_reading_options(parser)
    return parser


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--extractor", nargs="+", default=["cifar"], choices=sorted(EXTRACTORS),
        help="feature networks; all but cifar need weights (default: cifar)")  # fmt: skip
    add("--protocol", default="default", choices=sorted(PROTOCOLS), help="default: %(default)s")
    add("--num", type=int, help="score a random subset of so many images")
    add("--seed", type=int, default=0, help="of that subset (default: %(default)s)")
    add("--batch-size", type=int, default=256, help="images decoded at once; changes no result")
    add("--workers", type=int, default=4, help="decoding threads (default: %(default)s)")
    add(
        "--device",
        type=device_name,
        default="cpu",
        help="the networks run on (default: %(default)s)",
    )
    add("--on-error", choices=["fail", "skip"], default="fail", help="unreadable images")
    add("--alpha", choices=["white", "error"], default="white", help="transparent images")


def make_suite(options: argparse.Namespace) -> EvalSuite:
    settings = protocol(options.protocol)
    if options.k is not None:
        settings = replace(settings, k=options.k)
    metrics = [name.strip() for name in options.metrics.split(",")]
    if "all" in metrics:  # but over_k, which takes a pass for each k, only where it is named
        metrics = [m for m in METRICS if m != "over_k" or m in metrics]
    extractors = [load_extractor(n, settings, device=options.device) for n in options.extractor]
    scorers = {}
    for given in options.scorer:
        name, _, model = given.partition("=")
        if name in scorers:
            raise ValueError(f"--scorer {name} is given twice; score the second time by itself")
        scorers[name] = load_scorer(name, model=model or None, device=options.device)
    return EvalSuite(
        metrics, extractors=extractors, settings=settings, scorers=scorers,
        max_rows=options.max_rows,
    )  # fmt: skip


def make_reading(options: argparse.Namespace) -> Reading:
    return Reading(
        num=options.num, seed=options.seed, batch_size=options.batch_size, workers=options.workers,
        on_error=options.on_error, alpha=options.alpha,
    )  # fmt: skip


@contextmanager
def ranks() -> Iterator[None]:
    """Inside, the process group that ``accelerate launch`` described, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    import torch
    from accelerate import PartialState

    # Without cpu=True accelerate takes every process of a CPU-only machine for the only one.
    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        yield
        state.wait_for_everyone()  # rank 0 may still be writing: nobody may end the group under it
    finally:
        # Left to the interpreter's end, gloo's threads abort the process now and then.
        state.destroy_process_group()


def show(results: dict[str, EvalResult], options: argparse.Namespace) -> None:
    """The table on standard error; JSON where it was asked for."""
    titles = [("" if len(results) == 1 else name, result) for name, result in results.items()]
    print(table(titles), file=sys.stderr)
    for name, result in results.items():
        for metric, reason in result.skipped.items():
            print(f"{name}: no {metric}: {reason}", file=sys.stderr)
        for warning in dict.fromkeys(result.warnings):
            print(f"{name}: warning: {warning}", file=sys.stderr)
    if options.json == "-":
        print(as_json(results))
    elif options.json:
        write_text(Path(options.json), as_json(results) + "\n", overwrite=options.overwrite)


def as_json(results: dict[str, EvalResult]) -> str:
    """One result as it is; several under ``results``, by folder."""
    if len(results) == 1:
        return next(iter(results.values())).to_json()
    several: dict[str, Any] = {name: result.as_dict() for name, result in results.items()}
    return json.dumps({"results": several}, indent=2, allow_nan=False)


def metrics_file(path: Path) -> Path:
    return path if path.suffix == ".json" else path / "metrics.json"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
