"""Evaluation side by side with the programs it replaces: time, error, memory.

    python benchmarks/bench_eval.py                        the table at full size (minutes to hours)
    python benchmarks/bench_eval.py --dim 512 --count 2000 --memory-count 4000 --repeats 1
    python benchmarks/bench_eval.py --only frechet
    python benchmarks/bench_eval.py --device cuda --only frechet prdc moments suite

Every row runs ours and the peer in turns in one process, so that whatever else the machine does
hits both; medians of wall and processor time are printed, and ratios of the latter (on a busy
machine wall time measures the neighbours). With ``--device cuda`` ours and torchmetrics compute
there, after a turn that is not counted, and ratios are of wall time. Errors are relative, against
singular values of the two data factors in float64 (tests hold those against 60-digit arithmetic).
Memory is the growth of the peak resident size of a fresh process.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _probes import device_name
from PIL import Image
from torch import Tensor

from diffsteer.eval import (
    EvalSuite,
    Moments,
    Reading,
    cifar_extractor,
    evaluate,
    frechet_distance_from_features,
    prdc,
)
from diffsteer.eval.classifiers import CIFAR10_CLASSES
from diffsteer.eval.frechet import frechet_distance_of_moments


def features(count: int, dim: int, seed: int, scale: float = 1.0, device: str = "cpu") -> Tensor:
    """Rows with a decaying spectrum, as network features have."""
    random = torch.Generator().manual_seed(seed)
    decay = scale / (1 + torch.arange(dim) / 64)
    return (torch.randn(count, dim, generator=random) * decay + 0.5 * decay).float().to(device)


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall seconds, processor seconds, value."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    wall, processor = time.perf_counter(), time.process_time()
    value = call()
    wait()
    return time.perf_counter() - wall, time.process_time() - processor, value


Found = dict[str, tuple[float, float, Any]]


def in_turns(calls: dict[str, Callable[[], Any]], options: argparse.Namespace) -> Found:
    """Median wall and processor seconds and the last value of each call; the calls take turns."""
    runs: dict[str, list[tuple[float, float, Any]]] = {name: [] for name in calls}
    for call in calls.values() if options.device != "cpu" else ():
        call()  # libraries of the device are loaded
    for _ in range(options.repeats):
        for name, call in calls.items():
            runs[name].append(timed(call))
    return {
        name: (
            statistics.median(r[0] for r in run),
            statistics.median(r[1] for r in run),
            run[-1][2],
        )
        for name, run in runs.items()
    }


class Peers:
    """What the other programs do from features to distance; notes what the matrix root alone took.

    The root is all that they do once moments are known, so it is the peer of our distance of
    moments; the whole is the peer of our distance of features.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        import scipy.linalg  # noqa: F401  (loading them is not the metric's work)
        import torchmetrics.image.fid  # noqa: F401

        self.x, self.y = x, y
        self.roots: dict[str, list[float]] = {"scipy sqrtm": [], "torchmetrics": []}

    def scipy(self) -> float:
        """ADM, EDM, clean-fid and dgm-eval: numpy moments in float64, ``scipy.linalg.sqrtm``."""
        import scipy.linalg

        sides = [rows.cpu().numpy().astype(np.float64) for rows in (self.x, self.y)]
        means = [rows.mean(0) for rows in sides]
        covs = [np.cov(rows, rowvar=False) for rows in sides]
        _, spent, root = timed(lambda: scipy.linalg.sqrtm(covs[0] @ covs[1]).real)
        self.roots["scipy sqrtm"].append(spent)
        gap = means[0] - means[1]
        return float(gap @ gap + np.trace(covs[0] + covs[1] - 2 * root))

    def torchmetrics(self) -> float:
        """The metric itself in float64, with an identity for a network, in batches."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        class Identity(torch.nn.Module):
            num_features = self.x.shape[1]

            def forward(self, rows: Tensor) -> Tensor:
                return rows.flatten(1)

        size = (1, 1, self.x.shape[1])
        metric = FrechetInceptionDistance(feature=Identity(), input_img_size=size)
        metric.set_dtype(torch.float64).to(self.x.device)
        for rows, real in ((self.x, True), (self.y, False)):
            for batch in rows.double().split(1024):
                metric.update(batch[:, None, None], real=real)
        _, spent, value = timed(lambda: float(metric.compute()))
        self.roots["torchmetrics"].append(spent)
        return float(value)


def exact_distance(x: Tensor, y: Tensor) -> float:
    """From singular values of the product of both centred data matrices' triangular factors."""
    factors, means = [], []
    for rows in (x.double(), y.double()):
        means.append(rows.mean(0))
        factors.append(torch.linalg.qr((rows - means[-1]) / (len(rows) - 1) ** 0.5)[1])
    root = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    traces = sum(f.square().sum() for f in factors)
    return float((means[0] - means[1]).square().sum() + traces - 2 * root)


def bench_frechet(options: argparse.Namespace) -> None:
    for count in (options.count, options.dim // 2):
        x = features(count, options.dim, 1, device=options.device)
        y = features(count + count // 5, options.dim, 2, 1.1, options.device)
        a, b, peers = Moments.of(x), Moments.of(y), Peers(x, y)
        truth = exact_distance(x, y)
        calls: dict[str, Callable[[], float]] = {
            "ours, from features": lambda x=x, y=y: frechet_distance_from_features(x, y),
            "scipy sqrtm": peers.scipy,
            "torchmetrics": peers.torchmetrics,
            "ours, from moments": lambda a=a, b=b: frechet_distance_of_moments(a, b),
        }
        found = in_turns(calls, options)
        report(f"Fréchet distance, d = {options.dim}, N = {count}", found, truth, options)
        alone = found["ours, from moments"][1]
        for name, spent in peers.roots.items():
            root = statistics.median(spent)
            print(f"  {name:24s} {root:19.2f} s cpu of it once moments are known: "
                  f"{root / alone:.1f} x ours from moments")  # fmt: skip


def bench_prdc(options: argparse.Namespace) -> None:
    count, dim, device = options.count, options.dim, options.device
    real = features(count, dim, 1, device=device)
    fake = features(count, dim, 2, 0.95, device)

    def products() -> None:
        """The three passes' matrix products alone, in the same tiles: the floor."""
        for x, y in ((real, real), (fake, fake), (fake, real)):
            for start in range(0, len(x), 1024):
                x[start : start + 1024] @ y.T

    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: prdc(real, fake, 5, strict=True),
        "three matrix products": products,
    }
    if not options.no_prdc:
        calls["prdc"] = lambda: peer_prdc(real, fake)
    found = in_turns(calls, options)
    report(f"precision, recall, density, coverage, {count} x {count} x {dim}", found, None, options)
    if "prdc" in found:
        # prdc takes distances in float32, ours are exact: pairs within rounding may differ.
        gaps = {name: abs(getattr(found["ours"][2], name) - value)
                for name, value in found["prdc"][2].items()}  # fmt: skip
        print("  difference from prdc: " + ", ".join(f"{n} {gap:.1e}" for n, gap in gaps.items()))


def peer_prdc(real: Tensor, fake: Tensor) -> dict[str, float]:
    import prdc as package

    with contextlib.redirect_stdout(io.StringIO()):
        found: dict[str, float] = package.compute_prdc(
            real.cpu().numpy(), fake.cpu().numpy(), nearest_k=5
        )
    return found


def bench_memory(options: argparse.Namespace) -> None:
    """Peak resident memory beyond the features themselves, each program in a process of its own."""
    context = multiprocessing.get_context("spawn")
    for count in sorted({options.count, options.memory_count} - {0}):
        print(f"\nmemory of precision .. coverage, {count} x {count} x {options.dim}")
        for name in ("ours", "prdc"):
            if name == "prdc" and (options.no_prdc or count > options.count):
                continue
            queue: Any = context.Queue()
            process = context.Process(target=measure_memory, args=(name, count, options.dim, queue))
            process.start()
            extra, spent = queue.get()
            process.join()
            print(f"  {name:22s} {extra / 2**30:6.2f} GiB extra  {spent:8.1f} s")


def measure_memory(name: str, count: int, dim: int, queue: Any) -> None:
    call = (lambda x, y: prdc(x, y, 5)) if name == "ours" else peer_prdc
    real, fake = features(count, dim, 1), features(count, dim, 2, 0.95)
    call(real[:64], fake[:64])  # imports and work spaces are not the metric's
    before = resident("VmRSS")
    # A process starts with its parent's peak: forget it (Linux).
    Path("/proc/self/clear_refs").write_text("5")
    spent = timed(lambda: call(real, fake))[0]
    queue.put((resident("VmHWM") - before, spent))


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def bench_moments(options: argparse.Namespace) -> None:
    rows = features(options.memory_count, options.dim, 1, device=options.device)
    batch = 256

    def streamed() -> Moments:
        merged = Moments.zero(options.dim, rows.device)
        for start in range(0, len(rows), batch):
            merged = merged + Moments.of(rows[start : start + batch])
        return merged

    calls: dict[str, Callable[[], Any]] = {
        f"streamed by {batch}": streamed,
        "in one go": lambda: Moments.of(rows),
        "numpy.cov float64": lambda: np.cov(rows.cpu().numpy().astype(float), rowvar=False),
    }
    report(f"moments, {len(rows)} x {options.dim}", in_turns(calls, options), None, options)


def bench_suite(options: argparse.Namespace) -> None:
    """Folders of PNG files to all metrics, against torchmetrics' FID alone from the same files."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / side for side in ("real", "fake")]
        random = np.random.default_rng(0)
        for place in places:
            place.mkdir()
            for i in range(options.images):
                label = place / CIFAR10_CLASSES[i % 10]
                label.mkdir(exist_ok=True)
                coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                picture = Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)
                picture.save(label / f"{i:05d}.png")
        calls: dict[str, Callable[[], Any]] = {
            "all metrics, ours": lambda: all_metrics(places, options.device),
            "FID alone, torchmetrics": lambda: fid_alone(places, options.device),
        }
        found = in_turns(calls, options)
    title = f"2 x {options.images} PNG files of 32 px: decode, embedded network, metrics"
    report(title, found, None, options)
    print(f"  metrics: {', '.join(found['all metrics, ours'][2])}")
    for name, (_, processor, _) in found.items():
        print(f"  {name:24s} {2 * options.images / processor:8.0f} images a processor second")


def all_metrics(places: list[Path], device: str) -> list[str]:
    metrics = ("fd", "kid", "pr", "dc", "is", "accuracy", "colour", "diversity")
    suite = EvalSuite(metrics, extractors=cifar_extractor(device=device))
    reading = Reading(workers=0, progress=False)
    return list(evaluate(places[1], places[0], suite=suite, reading=reading).values)


def fid_alone(places: list[Path], device: str) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    classifier = cifar_extractor().network
    network, network_size = classifier.features, classifier.feature_size

    class Features(torch.nn.Module):
        num_features = network_size

        def forward(self, x: Tensor) -> Tensor:
            return network(x.float() / 255)

    metric = FrechetInceptionDistance(feature=Features(), input_img_size=(3, 32, 32))
    metric.set_dtype(torch.float64).to(device)
    for place, real in zip(places, (True, False), strict=True):
        files = sorted(place.rglob("*.png"))
        for start in range(0, len(files), 128):
            pictures = [np.array(Image.open(f).convert("RGB")) for f in files[start : start + 128]]
            batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
            metric.update(batch.to(device), real=real)
    return float(metric.compute())


def report(title: str, found: Found, truth: float | None, options: argparse.Namespace) -> None:
    print(f"\n{title}")
    clock = 1 if options.device == "cpu" else 0
    ours = next(iter(found.values()))[clock]
    for name, (wall, processor, value) in found.items():  # ratios are to the first row
        share = (wall, processor)[clock] / ours
        line = f"  {name:24s} {wall:8.2f} s wall {processor:8.2f} s cpu {share:7.2f} x"
        if truth is not None:
            line += f"   error {abs(value - truth) / abs(truth):.1e}"
        print(line, flush=True)


BENCHES = {"frechet": bench_frechet, "prdc": bench_prdc, "memory": bench_memory,
           "moments": bench_moments, "suite": bench_suite}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="samples a side")
    parser.add_argument("--dim", type=int, default=2048, help="features")
    parser.add_argument("--memory-count", type=int, default=50_000, help="samples, memory run")
    parser.add_argument("--images", type=int, default=2_000, help="images of the end-to-end run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="of ours and of torchmetrics")
    parser.add_argument("--no-prdc", action="store_true", help="leave out the slow peer")
    parser.add_argument("--only", nargs="+", choices=sorted(BENCHES), default=list(BENCHES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    where = device_name(options.device)
    print(
        f"{where}, torch {torch.__version__}, {options.threads} threads, {options.repeats} repeats"
    )
    for name in options.only:
        BENCHES[name](options)


if __name__ == "__main__":
    main()
