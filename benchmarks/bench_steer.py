"""What steer() costs: a steered run beside the same pipeline untouched.

    python benchmarks/bench_steer.py embedded            # the embedded model, on the CPU
    python benchmarks/bench_steer.py sd3                 # SD3-medium's transformer, on CUDA
    python benchmarks/bench_steer.py sd3 --device cpu --layers 2 --pixels 256    # rehearse it

Every round runs the pipeline three times on the same seeds, in changing order: untouched, steered
by plain guidance, steered by APG. The overhead is the median over the rounds of the ratio of a
steered run to the untouched one of its own round, so that slow changes of the machine's load
cancel. On a machine that others use too, ``--clock cpu --threads 1`` counts the seconds that the
process got instead of the wall time.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from diffsteer import AdaptiveProjectedGuidance, ClassifierFreeGuidance, load_embedded, steer

SCALE = 4.0
RULES = {
    "untouched": None,
    "plain guidance": ClassifierFreeGuidance(SCALE),
    "APG": AdaptiveProjectedGuidance(SCALE),
}
# SD3-medium (stabilityai/stable-diffusion-3-medium, transformer/config.json)
SD3_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}

Run = Callable[[], torch.Tensor]
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def embedded(arguments: argparse.Namespace) -> tuple[Any, Run]:
    pipe = load_embedded(device=arguments.device)
    labels = [i % 10 for i in range(arguments.batch)]

    def run() -> torch.Tensor:
        return pipe(
            labels,
            guidance_scale=SCALE,
            num_inference_steps=arguments.steps,
            seeds=list(range(arguments.batch)),
            output_type="latent",
        )[0]

    return pipe, run


def sd3(arguments: argparse.Namespace) -> tuple[Any, Run]:
    import diffusers

    dtype = torch.bfloat16
    with torch.device(arguments.device):
        transformer = diffusers.SD3Transformer2DModel(**SD3_MEDIUM, num_layers=arguments.layers)
    stages = {"down_block_types": ("DownEncoderBlock2D",) * 4}
    stages |= {"up_block_types": ("UpDecoderBlock2D",) * 4, "block_out_channels": (32,) * 4}
    vae = diffusers.AutoencoderKL(**stages, latent_channels=16)
    text = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer.to(dtype).requires_grad_(False),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.to(dtype),
        **text,
    ).to(arguments.device)
    batch, options = arguments.batch, {"device": arguments.device, "dtype": dtype}
    embeds = {
        f"{sign}{name}": torch.randn(batch, *shape, **options)
        for sign in ("", "negative_")
        for name, shape in (("prompt_embeds", (333, 4096)), ("pooled_prompt_embeds", (2048,)))
    }

    def run() -> torch.Tensor:
        return pipe(
            **embeds,
            height=arguments.pixels,
            width=arguments.pixels,
            guidance_scale=SCALE,
            num_inference_steps=arguments.steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    return pipe, run


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
    print("| run | median time | a step | overhead (median of paired ratios; quartiles) |")
    print("|---|---|---|---|")
    for name, values in times.items():
        median = statistics.median(values)
        told = "-"
        if name != "untouched":
            ratios = sorted(a / b - 1 for a, b in zip(values, times["untouched"], strict=True))
            low, middle, high = statistics.quantiles(ratios, n=4)
            told = f"{100 * middle:+.2f} % ({100 * low:+.2f} to {100 * high:+.2f})"
        print(f"| {name} | {1e3 * median:.1f} ms | {1e3 * median / steps:.2f} ms | {told} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=("embedded", "sd3"), nargs="?", default="embedded")
    parser.add_argument("--device", help="default: cpu for embedded, cuda for sd3")
    parser.add_argument("--batch", type=int, default=None, help="default: 8 embedded, 1 sd3")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--layers", type=int, default=24, help="of the sd3 transformer")
    parser.add_argument("--pixels", type=int, default=1024, help="of the sd3 image")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    small = arguments.model == "embedded"
    arguments.device = arguments.device or ("cpu" if small else "cuda")
    arguments.batch = arguments.batch or (8 if small else 1)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"bench_steer {arguments.model}: skipped, there is no CUDA device here")
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    pipe, run = (embedded if small else sd3)(arguments)
    pipe.set_progress_bar_config(disable=True)
    where = torch.cuda.get_device_name() if "cuda" in arguments.device else "CPU"
    print(
        f"{arguments.model} on {where}, batch {arguments.batch}, {arguments.steps} steps,", end=" "
    )
    print(f"{arguments.rounds} rounds, {arguments.clock} time, torch {torch.__version__}\n")
    report(measure(pipe, run, arguments), arguments.steps)


if __name__ == "__main__":
    main()
