"""What steer() costs: a steered run beside the same pipeline untouched, in time and in memory.

    python benchmarks/bench_steer.py embedded            # the embedded model, on the CPU
    python benchmarks/bench_steer.py embedded --instant  # its network answers at once
    python benchmarks/bench_steer.py sd3                 # SD3-medium's transformer, on CUDA
    python benchmarks/bench_steer.py sdxl --device cpu --pixels 256 --steps 2 --rounds 1 --memory
    python benchmarks/bench_steer.py flux --device cpu --pixels 256 --layers 2    # rehearse it

Every round runs the pipeline on the same seeds in changing order: untouched, steered by plain
guidance, steered by APG. The overhead is the median over the rounds of the ratio of a steered run
to the untouched one of its own round, so that slow changes of the machine's load cancel. What
steering takes by itself is told in microseconds a step: the fastest of all rounds, since a
disturbance only ever adds, most exactly with ``--instant``. On a
machine that others use too, ``--clock cpu --threads 1`` counts the seconds that the process got
instead of the wall time. ``--memory`` runs each once more, and manifold projection too, and tells
the peak of live tensors beside the weights, how often a run reads values of the latents back to the
host, and whether the weights are still the same storages. The models of real size have random
weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import _real_size
import torch
from _probes import HostReads, PeakMemory

from diffsteer import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ManifoldProjectedGuidance,
    load_embedded,
    steer,
)

SCALE = _real_size.SCALE
RULES = {
    "untouched": None,
    "plain guidance": ClassifierFreeGuidance(SCALE),
    "APG": AdaptiveProjectedGuidance(SCALE),
}
# Evaluates the model more than once a step: of interest for its memory, not its time.
MORE_CALLS = {"CFG-MP": ManifoldProjectedGuidance(ClassifierFreeGuidance(SCALE))}

Run = Callable[[], torch.Tensor]
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def embedded(arguments: argparse.Namespace) -> tuple[Any, Run, list[torch.Tensor]]:
    pipe = load_embedded(device=arguments.device)
    labels = [i % 10 for i in range(arguments.batch)]
    noise = torch.randn(arguments.batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = noise.to(arguments.device)

    if arguments.instant:
        sizes, where = (len(labels), 2 * len(labels)), arguments.device
        outputs = {rows: torch.randn(rows, 3, 32, 32, device=where) for rows in sizes}
        pipe.transformer.forward = lambda x, **_: (outputs[len(x)],)

    def run() -> torch.Tensor:
        return pipe(
            labels,
            guidance_scale=SCALE,
            num_inference_steps=arguments.steps,
            latents=noise,
            output_type="latent",
        )[0]

    return pipe, run, [noise]


def real_size(arguments: argparse.Namespace) -> tuple[Any, Run, list[torch.Tensor]]:
    pipe, given = _real_size.MODELS[arguments.model](arguments)
    pipe.to(arguments.device)
    noise = _real_size.latents_of(pipe, arguments)

    def run() -> torch.Tensor:
        return pipe(
            **given,
            latents=noise,
            height=arguments.pixels,
            width=arguments.pixels,
            num_inference_steps=arguments.steps,
            output_type="latent",
        ).images

    return pipe, run, [noise, *(v for v in given.values() if isinstance(v, torch.Tensor))]


def seconds(
    pipe: Any, run: Run, rule: Any, device: str, clock: Clock
) -> tuple[float, torch.Tensor]:
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    start = clock()
    with nullcontext() if rule is None else steer(pipe, rule):
        result = run()
    synchronize()
    return clock() - start, result


def measure(pipe: Any, run: Run, arguments: argparse.Namespace) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in RULES}
    how = arguments.device, CLOCKS[arguments.clock]
    results = {name: seconds(pipe, run, rule, *how)[1] for name, rule in RULES.items()}
    if not torch.equal(results["untouched"], results["plain guidance"]):
        raise SystemExit("plain guidance through steer() is not bit-exact here; times mean nothing")
    names = list(RULES)
    for round_number in range(arguments.rounds):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds(pipe, run, RULES[name], *how)[0])
    return times


def report(times: dict[str, list[float]], steps: int) -> None:
    print(
        "| run | median time | a step | overhead (median of paired ratios; quartiles) | at best |"
    )
    print("|---|---|---|---|---|")
    for name, values in times.items():
        median = statistics.median(values)
        told, best = "-", "-"
        if name != "untouched":
            ratios = sorted(a / b - 1 for a, b in zip(values, times["untouched"], strict=True))
            low, middle, high = statistics.quantiles(ratios, n=4) if ratios[1:] else ratios * 3
            told = f"{100 * middle:+.2f} % ({100 * low:+.2f} to {100 * high:+.2f})"
            best = f"{1e6 * (min(values) - min(times['untouched'])) / steps:+.0f} us a step"
        print(
            f"| {name} | {1e3 * median:.1f} ms | {1e3 * median / steps:.2f} ms | {told} | {best} |"
        )


def weights_of(pipe: Any) -> dict[str, tuple[int, int]]:
    """Where each weight lies, and how large it is."""
    network = getattr(pipe, "transformer", None) or pipe.unet
    return {n: (v.data_ptr(), v.nbytes) for n, v in network.state_dict(keep_vars=True).items()}


def report_memory(
    pipe: Any, run: Run, inputs: list[torch.Tensor], arguments: argparse.Namespace
) -> None:
    latent = 4 * inputs[0].numel()  # in float32, as rules compute
    weights = weights_of(pipe)
    known = [value for module in pipe.components.values() if isinstance(module, torch.nn.Module)
             for value in (*module.parameters(), *module.buffers())]  # fmt: skip
    size = sum(bytes_ for _, bytes_ in weights.values())
    print(f"\n{size / 1e9:.2f} GB of weights; a latent in float32 is {latent / 1e6:.2f} MB\n")
    print("| run | peak beside the weights | more than untouched | host reads a run | weights |")
    print("|---|---|---|---|---|")
    base = None
    for name, rule in {**RULES, **MORE_CALLS}.items():
        memory, reads = PeakMemory(), HostReads(*inputs)
        memory.ignore(*known, *inputs)
        with nullcontext() if rule is None else steer(pipe, rule), memory, reads:
            run()
        base = memory.peak if base is None else base
        more = "-" if rule is None else f"{(memory.peak - base) / latent:+.1f} latents"
        moved = "same" if weights_of(pipe) == weights else "MOVED"
        print(f"| {name} | {memory.peak / 1e6:.1f} MB | {more} | {reads.count} | {moved} |")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    models = ("embedded", *_real_size.MODELS)
    parser.add_argument("model", choices=models, nargs="?", default="embedded")
    parser.add_argument("--device", help="default: cpu for embedded, cuda for the others")
    parser.add_argument("--batch", type=int, default=None, help="default: 8 embedded, else 1")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--layers", type=int, help="blocks of the real shapes (default: all)")
    parser.add_argument("--instant", action="store_true", help="embedded: no network is run")
    parser.add_argument("--pixels", type=int, default=1024, help="of the real shapes' image")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--memory", action="store_true", help="measure memory and host reads too")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    small = arguments.model == "embedded"
    arguments.device = arguments.device or ("cpu" if small else "cuda")
    arguments.batch = arguments.batch or (8 if small else 1)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"bench_steer {arguments.model}: skipped, there is no CUDA device here")
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    pipe, run, inputs = (embedded if small else real_size)(arguments)
    pipe.set_progress_bar_config(disable=True)
    where = torch.cuda.get_device_name() if "cuda" in arguments.device else "CPU"
    print(
        f"{arguments.model} on {where}, batch {arguments.batch}, {arguments.steps} steps,", end=" "
    )
    print(f"{arguments.rounds} rounds, {arguments.clock} time, torch {torch.__version__}\n")
    report(measure(pipe, run, arguments), arguments.steps)
    if arguments.memory:
        report_memory(pipe, run, inputs, arguments)


if __name__ == "__main__":
    main()
