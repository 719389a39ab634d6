"""How the number of samples changes the scores of one and the same distribution.

    python benchmarks/sample_size.py test.parquet              one half against the other
    python benchmarks/sample_size.py train.parquet --reference test.parquet --sizes 500 1000 2000
    python benchmarks/sample_size.py train.parquet --reference test.parquet --plot size.png

Real images are scored against other real images. Without a reference, a random half of the images
is the reference of the other half, so the true distance is 0. For each N the images are dealt into
separate sets of N (at most ``--draws``); printed are mean and standard deviation over the sets.
Precision and recall compare N with N; the kernel distance takes 5,000 rows of the reference.
Features are extracted once and cached; ``--plot`` draws the table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffsteer.eval import (
    Moments,
    Reading,
    fd_infinity,
    frechet_distance_to,
    kernel_distance,
    open_images,
    prdc,
)
from diffsteer.eval.cache import FeatureCache
from diffsteer.eval.features import FeatureSet
from diffsteer.eval.pretrained import EXTRACTORS, load_extractor
from diffsteer.eval.reading import read_features
from diffsteer.eval.reference import statistics_of
from diffsteer.eval.settings import PROTOCOLS, protocol
from diffsteer.eval.stats import Statistics

KERNEL_ROWS = 5000  # of the reference, for the kernel distance: it is unbiased, and quadratic
# Of one N: how many sets, and mean and spread of each column that has a value.
Row = tuple[int, int, dict[str, tuple[float, float]]]

COLUMNS = ("fd", "fd x N / 1000", "fd_infinity", "kid", "precision", "recall")


def scores(real: Statistics, rows: Tensor) -> dict[str, float]:
    """All columns for one set of feature rows, (N, d)."""
    reference, count, sums = real.gaussian(), len(rows), Moments.of(rows)
    fd = frechet_distance_to(reference, sums.mean, sums.covariance, rank=count - 1)
    found = {"fd": fd, "fd x N / 1000": fd * count / 1000}
    if count >= 4 * rows.shape[1]:
        found["fd_infinity"] = fd_infinity(reference, rows).value
    if real.features is not None:
        others = real.features.float()[:count]
        found["kid"] = kernel_distance(real.features[:KERNEL_ROWS].float(), rows).value
        if len(others) == count:
            both = prdc(others, rows, 3)
            found["precision"], found["recall"] = both.precision, both.recall
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("images", help="real images: folder, .zip, .npz, .parquet or hub dataset")
    add("--reference", help="other real images; default: a random half of the images")
    add("--sizes", type=int, nargs="+", default=[100, 250, 500, 1000, 2500, 5000, 10_000, 25_000])
    add("--draws", type=int, default=10, help="sets of each size at most (default: %(default)s)")
    add("--extractor", default="cifar", choices=sorted(EXTRACTORS))
    add("--protocol", default="default", choices=sorted(PROTOCOLS))
    add("--device", default="cpu")
    add("--plot", type=Path, help="draw the table into this file (needs matplotlib)")
    options = parser.parse_args()
    net = load_extractor(options.extractor, protocol(options.protocol), device=options.device)

    def features_of(where: str) -> FeatureSet:
        found = read_features(open_images(where), [net], Reading(), cache=FeatureCache()).features
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
        return found.canonical().rows(order)

    samples = features_of(options.images)
    if options.reference is None:
        half = torch.arange(len(samples)) < len(samples) // 2
        samples, others = samples.rows(half), samples.rows(~half)
    else:
        others = features_of(options.reference)
    real, everything = statistics_of(others, net, rows=None), samples.taps[f"{net.space}/features"]
    print(f"{len(everything)} images against {real.count}; {net.id}", file=sys.stderr)
    print("| N | sets | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    rows: list[Row] = []
    for size in options.sizes:
        sets = torch.arange(len(everything) // size * size).view(-1, size)[: options.draws]
        if len(sets) == 0:
            continue
        found = [scores(real, everything[chosen]) for chosen in sets]
        rows.append((size, len(found), summary(found)))
        print(line(rows[-1]), flush=True)
    if options.plot is not None:
        draw(options.plot, rows)


def summary(found: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation (0 of a single set) of each column over the sets."""
    values = {name: [f[name] for f in found if name in f] for name in COLUMNS}
    return {
        name: (statistics.mean(known), statistics.stdev(known) if len(known) > 1 else 0.0)
        for name, known in values.items()
        if known
    }


def line(row: Row) -> str:
    """A row of the table."""
    size, count, columns = row
    cells = []
    for name in COLUMNS:
        mean, spread = columns.get(name, (None, 0.0))
        cells.append(
            "-" if mean is None else f"{mean:.4g}" + (f" ± {spread:.2g}" if spread else "")
        )
    return f"| {size} | {count} | " + " | ".join(cells) + " |"


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Three panels over N: the Fréchet distance and its limit, kernel distance, the shares."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    shown = (("fd", "fd_infinity"), ("kid",), ("precision", "recall"))
    for panel, names in zip(panels, shown, strict=True):
        for name in names:
            points = [(size, *columns[name]) for size, _, columns in rows if name in columns]
            x, mean, spread = ([p[i] for p in points] for i in range(3))
            panel.errorbar(x, mean, spread, marker="o", markersize=4, capsize=2, label=name)
        panel.set(xscale="log", xlabel="samples N")
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.legend(frameon=False)
    panels[0].set_yscale("symlog", linthresh=0.1)
    panels[2].set_ylim(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
