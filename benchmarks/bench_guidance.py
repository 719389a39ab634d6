"""Guidance arithmetic side by side with diffusers: time of one call, and error against float64.

    python benchmarks/bench_guidance.py [--device cuda] [--threads 1] [--clock cpu] [--rules]

Both sides do the whole method (momentum, clipping, projection with eta 0, the paper's combination)
on the same predictions. Calls are interleaved, so that whatever else the machine does hits both
alike; the table gives medians. Errors are of the third step of a trajectory, relative in norm.
``--clock cpu`` counts processor time, for machines that are busy with something else. ``--rules``
tells instead what every rule adds to a step of SD3 at 1024 pixels.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import bench_rules
import torch
from _probes import device_name
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from torch import Tensor

from diffsteer.guidance import adaptive_projected

SHAPES = {
    "SD3 1024 px": (1, 16, 128, 128),
    "SDXL 1024 px": (1, 4, 128, 128),
    "Flux 1024 px, packed": (1, 4096, 64),
    "video 720p": (1, 16, 21, 90, 160),
}
SCALE, MOMENTUM, RHO = 8.0, -0.5, 0.05


def trajectory(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, steps: int = 3
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of predictions that differ as they do in practice: by about a tenth of their norm."""
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    pairs = []
    for _ in range(steps):
        cond = draw()
        pairs.append((cond.to(dtype), (cond + 0.02 * cond + 0.1 * draw()).to(dtype)))
    return pairs


def radius_of(shape: tuple[int, ...]) -> float:
    return RHO * math.sqrt(math.prod(shape[1:]))


def theirs(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    buffer, radius = MomentumBuffer(MOMENTUM), radius_of(pairs[0][0].shape)
    for cond, uncond in pairs:
        guided = normalized_guidance(cond, uncond, SCALE - 1, buffer, 0.0, radius, True)
    return guided


def ours(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    previous, radius = None, radius_of(pairs[0][0].shape)
    for cond, uncond in pairs:
        guided, previous = adaptive_projected(
            cond, uncond, SCALE, radius=radius, momentum=MOMENTUM, previous=previous
        )
    return guided


def reference(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Algorithm 1 of the paper, literally, in float64."""
    total, radius = torch.zeros_like(pairs[0][0], dtype=torch.float64), radius_of(pairs[0][0].shape)
    for cond, uncond in pairs:
        axis = cond.double()
        total = axis - uncond.double() + MOMENTUM * total
        step = total * min(1.0, radius / float(total.norm()))
        unit = axis / axis.norm()
        guided = axis + (SCALE - 1) * (step - (step * unit).sum() * unit)
    return guided


def error(guided: Tensor, exact: Tensor) -> float:
    return float((guided.double() - exact).norm() / exact.norm())


def medians(
    calls: list[Callable[[], object]], repeats: int, device: str, clock: Callable[[], float]
) -> list[float]:
    """Median milliseconds of each call, taken in turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 5):
        for times, call in zip(seconds, calls, strict=True):
            if device != "cpu":
                torch.cuda.synchronize()
            start = clock()
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            if repeat >= 5:
                times.append(clock() - start)
    return [1000 * statistics.median(times) for times in seconds]


def row(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    repeats: int,
    clock: Callable[[], float],
) -> str:
    pairs = trajectory(shape, dtype, device)
    (cond, uncond), radius = pairs[-1], radius_of(shape)
    buffer = MomentumBuffer(MOMENTUM)
    previous = cond.float() - uncond.float()
    their_previous = previous.to(dtype)

    def one_of_theirs() -> Tensor:
        buffer.running_average = their_previous
        return normalized_guidance(cond, uncond, SCALE - 1, buffer, 0.0, radius, True)

    def one_of_ours() -> tuple[Tensor, Tensor]:
        return adaptive_projected(
            cond, uncond, SCALE, radius=radius, momentum=MOMENTUM, previous=previous
        )

    calls: list[Callable[[], object]] = [one_of_theirs, one_of_ours]
    repeats = max(repeats, 20_000_000 // cond.numel())  # short calls need more of them
    their_ms, our_ms = medians(calls, repeats, device, clock)
    exact = reference(pairs)
    return (
        f"| {name} | {str(dtype).removeprefix('torch.')} | {their_ms:.2f} | {our_ms:.2f} "
        f"| {their_ms / our_ms:.1f}x | {error(theirs(pairs), exact):.1e} "
        f"| {error(ours(pairs), exact):.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--rules", action="store_true", help="every rule instead of the peer")
    args = parser.parse_args()
    print(f"On {device_name(args.device)}, torch {torch.__version__}\n")
    if args.rules:
        torch.set_num_threads(args.threads)
        print(*bench_rules.table(args.device, args.repeats), sep="\n")
        return
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    torch.set_num_threads(args.threads)
    names = ("diffusers ms", "diffsteer ms", "ratio", "error, diffusers", "error, diffsteer")
    print(f"| latent | dtype | {' | '.join(names)} |", "|---" * 7 + "|", sep="\n")
    with torch.inference_mode():
        for name, shape in SHAPES.items():
            for dtype in (torch.bfloat16, torch.float32):
                print(row(name, shape, dtype, args.device, args.repeats, clock), flush=True)


if __name__ == "__main__":
    main()
