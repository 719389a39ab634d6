"""Solver steps beside diffusers' schedulers, and Student-t noise beside Gaussian noise.

    python benchmarks/bench_samplers.py [--device cuda] [--threads 1] [--clock cpu]

Both sides carry the same float32 latents over the same levels with the same model, which costs
nothing: it hands out one tensor, which each side reads as what it takes (diffusers a velocity or an
EDM output, ours a denoised sample). "Converted" is ours with the conversion of the model's own
output to a denoised sample as well. Runs are interleaved and medians are given. On a GPU the runs
are repeated with synchronisation forbidden: the last column says whether a step waits for it.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from _probes import device_name
from torch import Tensor

from diffsteer.core import Level
from diffsteer.core.student import student_noise
from diffsteer.samplers import dpmpp_2m_step, euler_step, heun_step, integrate, karras_sigmas

SHAPE, STEPS = (1, 16, 128, 128), 28  # SD3 at 1024 px
NOISES = {"3x32x32, batch 256": (256, 3, 32, 32), "latents 4x64x64, batch 256": (256, 4, 64, 64)}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "final_sigmas_type": "zero"}
Call = Callable[[], object]


def scheduler_loop(scheduler: Any, output: Tensor, x: Tensor) -> Call:
    """A run of diffusers' scheduler; the timesteps are set beforehand."""
    scheduler.set_timesteps(STEPS, device=x.device)
    calls = len(scheduler.timesteps)

    def run() -> Tensor:
        scheduler._step_index = None
        for name, value in (("model_outputs", [None, None]), ("lower_order_nums", 0)):
            if hasattr(scheduler, name):
                setattr(scheduler, name, value)
        scheduler.set_begin_index(0)
        sample = x
        for t in scheduler.timesteps[:calls]:
            if hasattr(scheduler, "precondition_outputs"):
                scheduler.is_scale_input_called = True
            sample = scheduler.step(output, t, sample, return_dict=False)[0]
        return sample

    return run


def rivals(output: Tensor, x: Tensor) -> dict[str, tuple[Call, Call, Call]]:
    """By name: diffusers' run, ours, and ours with the conversion of the model's output."""
    flow, edm = torch.linspace(1, 0, STEPS + 1), karras_sigmas(STEPS)

    def plain(at: Tensor, sigma: Tensor) -> Tensor:
        return output

    def from_velocity(at: Tensor, sigma: Tensor) -> Tensor:
        return torch.add(at, output, alpha=-float(sigma))

    def from_edm(at: Tensor, sigma: Tensor) -> Tensor:
        s = float(sigma)
        skip, out = 0.25 / (s * s + 0.25), 0.5 * s / (s * s + 0.25) ** 0.5
        return torch.add(at * skip, output, alpha=out)

    def row(scheduler: Any, step: Any, grid: Tensor, convert: Any) -> tuple[Call, Call, Call]:
        return (
            scheduler_loop(scheduler, output, x),
            lambda: integrate(plain, x, grid, step),
            lambda: integrate(convert, x, grid, step),
        )

    two_m = functools.partial(dpmpp_2m_step, level=Level.flow)
    solver = diffusers.DPMSolverMultistepScheduler(**FLOW)
    return {
        "Euler, flow": row(
            diffusers.FlowMatchEulerDiscreteScheduler(), euler_step, flow, from_velocity
        ),
        "Heun, flow": row(
            diffusers.FlowMatchHeunDiscreteScheduler(), heun_step, flow, from_velocity
        ),
        "DPM-Solver++(2M), flow": row(solver, two_m, flow, from_velocity),
        "Euler, EDM": row(diffusers.EDMEulerScheduler(), euler_step, edm, from_edm),
    }


def medians(calls: list[Call], rounds: int, device: str, clock: Callable[[], float]) -> list[float]:
    """Median seconds of each call, taken in turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 3):
        for times, call in zip(seconds, calls, strict=True):
            _wait(device)
            start = clock()
            call()
            _wait(device)
            if number >= 3:
                times.append(clock() - start)
    return [statistics.median(times) for times in seconds]


def waits(call: Call, device: str) -> str:
    """Whether a run waits for the device anywhere."""
    if device == "cpu":
        return "no GPU"
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return "waits"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "never waits"


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    torch.set_num_threads(args.threads)
    device = args.device
    print(f"On {device_name(device)}, torch {torch.__version__}\n")
    head = ("solver", "diffusers ms", "diffsteer ms", "share", "converted", "pass ms", "beyond it",
            "on the GPU")  # fmt: skip
    print(f"| {' | '.join(head)} |", "|---" * len(head) + "|", sep="\n")
    generator = torch.Generator(device).manual_seed(0)
    output, x = (torch.randn(SHAPE, generator=generator, device=device) for _ in range(2))

    def passes() -> None:
        for _ in range(STEPS):
            torch.add(x, output, alpha=0.5)

    for name, calls in rivals(output, x).items():
        found = [1000 * s / STEPS for s in medians([*calls, passes], args.rounds, device, clock)]
        theirs, ours, converted, least = found
        shares = (ours / theirs, converted / theirs, (ours - least) / (theirs - least))
        share, whole, beyond = (f"{value:.2f}" for value in shares)
        cells = (f"{theirs:.3f}", f"{ours:.3f}", share, whole, f"{least:.3f}", beyond)
        print(f"| {name} | {' | '.join(cells)} | {waits(calls[2], device)} |", flush=True)
    print("\n| noise | Gaussian ms | Student-t ms | ratio |", "|---|---|---|---|", sep="\n")
    for name, shape in NOISES.items():
        generator = torch.Generator(device).manual_seed(0)
        gauss = functools.partial(torch.randn, shape, generator=generator, device=device)
        student = functools.partial(student_noise, generator, shape, 128.0)
        plain, heavy = (1000 * s for s in medians([gauss, student], 2 * args.rounds, device, clock))
        print(f"| {name} | {plain:.2f} | {heavy:.2f} | {heavy / plain:.3f} |", flush=True)


if __name__ == "__main__":
    main()
