"""Evaluation side by side with the programs it replaces: time, error, memory.

    python benchmarks/bench_eval.py                        the table at full size (minutes to hours)
    python benchmarks/bench_eval.py --dim 512 --count 2000 --repeats 1      smaller, says so
    python benchmarks/bench_eval.py --only frechet

Every row runs ours and the peer in turns in one process, so that whatever else the machine does
hits both; medians of wall and processor time are printed, and ratios of the latter (on a busy
machine wall time measures the neighbours). Errors are relative, against singular values of the
two data factors in float64 (tests hold those against 60-digit arithmetic). Memory is the growth of
the peak resident size of a fresh process.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsteer.eval import Moments, frechet_distance, prdc
from diffsteer.eval.extractors import cifar_extractor
from diffsteer.eval.suite import EvalSuite


def features(count: int, dim: int, seed: int, scale: float = 1.0) -> Tensor:
    """Rows with a decaying spectrum, as network features have."""
    random = torch.Generator().manual_seed(seed)
    decay = scale / (1 + torch.arange(dim) / 64)
    return (torch.randn(count, dim, generator=random) * decay + 0.5 * decay).float()


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall seconds, processor seconds, value."""
    wall, processor = time.perf_counter(), time.process_time()
    value = call()
    return time.perf_counter() - wall, time.process_time() - processor, value


Found = dict[str, tuple[float, float, Any]]


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> Found:
    """Median wall and processor seconds and the last value of each call; the calls take turns."""
    runs: dict[str, list[tuple[float, float, Any]]] = {name: [] for name in calls}
    for _ in range(repeats):
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


def scipy_distance(a: Moments, b: Moments) -> float:
    """What ADM, EDM, clean-fid and dgm-eval compute."""
    import scipy.linalg

    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    gap = (a.mean - b.mean).numpy()
    return float(gap @ gap + np.trace((a.covariance + b.covariance).numpy() - 2 * root))


def torchmetrics_distance(a: Moments, b: Moments) -> float:
    from torchmetrics.image.fid import _compute_fid

    return float(_compute_fid(a.mean, a.covariance, b.mean, b.covariance))


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
        x = features(count, options.dim, 1)
        y = features(count + count // 5, options.dim, 2, 1.1)
        a, b = Moments.of(x), Moments.of(y)
        truth = exact_distance(x, y)
        calls: dict[str, Callable[[], float]] = {
            "ours": lambda a=a, b=b: frechet_distance(a.mean, a.covariance, b.mean, b.covariance),
            "scipy sqrtm": lambda a=a, b=b: scipy_distance(a, b),
            "torchmetrics": lambda a=a, b=b: torchmetrics_distance(a, b),
        }
        title = f"Fréchet distance, d = {options.dim}, N = {count}"
        report(title, in_turns(calls, options.repeats), truth)


def bench_prdc(options: argparse.Namespace) -> None:
    count, dim = options.count, options.dim
    real, fake = features(count, dim, 1), features(count, dim, 2, 0.95)

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
    found = in_turns(calls, options.repeats)
    report(f"precision, recall, density, coverage, {count} x {count} x {dim}", found, None)
    if "prdc" in found:
        same = all(
            abs(getattr(found["ours"][2], name) - value) < 1e-12
            for name, value in found["prdc"][2].items()
        )
        print(f"  the same counts as prdc: {same}")


def peer_prdc(real: Tensor, fake: Tensor) -> dict[str, float]:
    import prdc as package

    with contextlib.redirect_stdout(io.StringIO()):
        found: dict[str, float] = package.compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    return found


def bench_memory(options: argparse.Namespace) -> None:
    """Peak resident memory beyond the features themselves, each program in a process of its own."""
    context = multiprocessing.get_context("spawn")
    for count in sorted({options.count, options.memory_count}):
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
    rows = features(options.memory_count, options.dim, 1)
    batch = 256

    def streamed() -> Moments:
        merged = Moments.zero(options.dim)
        for start in range(0, len(rows), batch):
            merged = merged + Moments.of(rows[start : start + batch])
        return merged

    calls: dict[str, Callable[[], Any]] = {
        f"streamed by {batch}": streamed,
        "in one go": lambda: Moments.of(rows),
        "numpy.cov float64": lambda: np.cov(rows.numpy().astype(np.float64), rowvar=False),
    }
    report(f"moments, {len(rows)} x {options.dim}", in_turns(calls, options.repeats), None)


def bench_suite(options: argparse.Namespace) -> None:
    """All metrics in one pass against torchmetrics' FID alone, through the same network."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    images = (torch.rand(options.images, 3, 32, 32) * 255).to(torch.uint8)
    network = cifar_extractor().network.features

    class Features(torch.nn.Module):
        num_features = 128

        def forward(self, x: Tensor) -> Tensor:
            return network(x.float() / 255)

    def theirs() -> float:
        metric = FrechetInceptionDistance(feature=Features(), input_img_size=(3, 32, 32))
        metric.set_dtype(torch.float64)
        for real in (True, False):
            for batch in images.split(128):
                metric.update(batch, real=real)
        return float(metric.compute())

    def ours() -> float:
        suite = EvalSuite(("fd", "kid", "pr", "dc", "is", "accuracy", "colour"))
        for real in (True, False):
            for batch in images.split(128):
                suite.update(batch, labels=[0] * len(batch), real=real)
        return suite.compute().values["fd-cifar"]

    calls: dict[str, Callable[[], Any]] = {
        "all metrics, ours": ours,
        "FID alone, torchmetrics": theirs,
    }
    found = in_turns(calls, options.repeats)
    report(f"2 x {options.images} images of 32 px through the embedded network", found, None)
    for name, (_, processor, _) in found.items():
        print(f"  {name:24s} {2 * options.images / processor:8.0f} images a processor second")


def report(title: str, found: Found, truth: float | None) -> None:
    print(f"\n{title}")
    ours = next(iter(found.values()))[1]
    for name, (wall, processor, value) in found.items():
        line = f"  {name:24s} {wall:8.2f} s wall {processor:8.2f} s cpu {processor / ours:7.2f} x"
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
    parser.add_argument("--no-prdc", action="store_true", help="leave out the slow peer")
    parser.add_argument("--only", nargs="+", choices=sorted(BENCHES), default=list(BENCHES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {options.threads} threads, {options.repeats} repeats")
    for name in options.only:
        BENCHES[name](options)


if __name__ == "__main__":
    main()
