"""What evaluating a population costs: many members in one batch beside plain inference.

    python benchmarks/bench_eggroll.py embedded --threads 1              # the CPU
    python benchmarks/bench_eggroll.py embedded --dtype float32 --threads 1
    python benchmarks/bench_eggroll.py sd3                               # on CUDA
    python benchmarks/bench_eggroll.py sd3 --device cpu --layers 1 --pixels 256 --members 4 --rows 1

Every round evaluates one generation by each variant, in changing order: M members with K rows each,
``--calls`` calls of the network, everything included that a generation needs once (drawing noise,
making weights). The ratio is the median over the rounds of the time of plain inference on the same
M * K rows of its own round to the variant's.

    plain        the network without noise, one batch
    low-rank     perturbed(model, members): one batch, noise never stored
    sequential   explicit weights swapped in, member after member (mode="materialize")
    vmap         torch.func.functional_call over explicit weights of all members
    peft         a LoRA adapter a member, mixed in one batch by adapter_names

Then memory (bytes of live tensors on the CPU, the allocator's peak on CUDA), the time of an update
as a share of a generation, and the bytes that ranks send.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from _probes import PeakMemory
from torch import Tensor, nn

from diffsteer import load_embedded
from diffsteer.training.eggroll import Eggroll, NoiseFormat, find_layers, member_noise, perturbed

SIGMA = 5e-3
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
Arguments = dict[str, Any]


@dataclass
class Case:
    """A network, and the arguments of a call with as many rows as asked."""

    model: nn.Module
    inputs: Callable[[int], Arguments]
    tokens: int
    excluded: tuple[str, ...] = ()


def embedded(options: argparse.Namespace) -> Case:
    model = load_embedded(device=options.device).transformer
    nn.Module.to(model, options.dtype)

    def inputs(rows: int) -> Arguments:
        where = {"device": options.device}
        return {
            "hidden_states": torch.randn(rows, 3, 32, 32, dtype=options.dtype, **where),
            "timestep": torch.linspace(50, 950, rows, **where),
            "class_labels": torch.arange(rows, **where) % 10,
        }

    return Case(model, inputs, tokens=64)


def sd3(options: argparse.Namespace) -> Case:
    import diffusers

    with torch.device(options.device):
        model = diffusers.SD3Transformer2DModel(**SD3_MEDIUM, num_layers=options.layers)
    model = model.to(options.dtype).eval().requires_grad_(False)
    side, where = options.pixels // 8, {"device": options.device, "dtype": options.dtype}

    def inputs(rows: int) -> Arguments:
        return {
            "hidden_states": torch.randn(rows, 16, side, side, **where),
            "timestep": torch.linspace(50, 950, rows, device=options.device),
            "encoder_hidden_states": torch.randn(rows, options.text_tokens, 4096, **where),
            "pooled_projections": torch.randn(rows, 2048, **where),
        }

    # The last block drops its text stream: what only feeds that has no effect.
    return Case(model, inputs, tokens=(side // 2) ** 2 + options.text_tokens)


def call(model: nn.Module, arguments: Arguments, **more: Any) -> Tensor:
    return model(**arguments, **more, return_dict=False)[0]


def part(arguments: Arguments, rows: slice) -> Arguments:
    return {name: value[rows] for name, value in arguments.items()}


# -- variants: each evaluates one generation and gives the output of its last call -----------------


class Variants:
    """One generation of M members by K rows, in every way."""

    def __init__(self, case: Case, options: argparse.Namespace) -> None:
        self.case, self.options = case, options
        self.members, self.rows = options.members, options.rows
        self.arguments = case.inputs(self.members * self.rows)
        self.layers = find_layers(case.model, exclude=case.excluded)
        self.runner = torch.compile(case.model) if options.compile else case.model
        self.peft: Any = None

    def plain(self) -> Tensor:
        """The network without noise."""
        for _ in range(self.options.calls):
            output = call(self.runner, self.arguments)
        return output

    def low_rank(self, rank: int) -> Tensor:
        """All members in one batch."""
        with self.noisy(list(range(self.members)), rank, self.rows):
            return self.plain()

    def sequential(self) -> Tensor:
        """Explicit weights, member after member."""
        outputs = []
        for member in range(self.members):
            mine = part(self.arguments, slice(member * self.rows, (member + 1) * self.rows))
            with self.noisy([member], 1, self.rows, mode="materialize"):
                for _ in range(self.options.calls):
                    output = call(self.runner, mine)
            outputs.append(output)
        return torch.cat(outputs)

    def vmap(self) -> Tensor:
        """Explicit weights of all members at once."""
        model = self.case.model
        weights = {}
        for layer in self.layers.values():
            deltas = [self.delta(layer, member) for member in range(self.members)]
            base = layer.module.weight
            weights[f"{layer.name}.weight"] = torch.stack([(base + d).to(base) for d in deltas])
        rows = {
            name: value.view(self.members, self.rows, *value.shape[1:])
            for name, value in self.arguments.items()
        }

        def one(changed: dict[str, Tensor], arguments: Arguments) -> Tensor:
            output = torch.func.functional_call(
                model, changed, (), {**arguments, "return_dict": False}
            )
            return output[0]

        for _ in range(self.options.calls):
            output = torch.func.vmap(one)(weights, rows)
        return output.flatten(0, 1)

    def mixed_adapters(self) -> Tensor:
        """A LoRA adapter a member in one batch."""
        if self.peft is None:
            self.peft = self.make_adapters()
        names = [f"member{m}" for m in range(self.members) for _ in range(self.rows)]
        for _ in range(self.options.calls):
            output = call(self.peft, self.arguments, adapter_names=names)
        return output

    def make_adapters(self) -> nn.Module:
        """A copy of the network with an adapter a member."""
        from peft import LoraConfig, get_peft_model

        linear = [n for n, layer in self.layers.items() if isinstance(layer.module, nn.Linear)]
        config = LoraConfig(r=1, lora_alpha=1, target_modules=linear, init_lora_weights=False)
        model = get_peft_model(copy.deepcopy(self.case.model), config, adapter_name="member0")
        for member in range(1, self.members):
            model.add_adapter(f"member{member}", config)
        return model.to(self.options.dtype).eval()

    def delta(self, layer: Any, member: int) -> Tensor:
        """The explicit perturbation of a weight."""
        noise = NoiseFormat(0)
        pair, sign = noise.source(member)
        a, b = member_noise(noise, layer, pair, 0, device=layer.module.weight.device)
        return (sign * SIGMA * a @ b.T).view(layer.module.weight.shape)

    @contextmanager
    def noisy(self, members: Sequence[int], rank: int, rows: int, mode: str = "lowrank") -> Any:
        """Members of the first generation."""
        with perturbed(
            self.runner,
            members,
            noise=NoiseFormat(0, rank=rank),
            step=0,
            sigma=SIGMA,
            rows_per_member=rows,
            layers=self.layers,
            mode=mode,
        ):
            yield


def variants_of(v: Variants, names: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
    every: dict[str, Callable[[], Tensor]] = {"plain": v.plain}
    for rank in v.options.ranks:
        every[f"low-rank, rank {rank}"] = lambda rank=rank: v.low_rank(rank)
    every |= {"sequential": v.sequential, "vmap": v.vmap, "peft": v.mixed_adapters}
    return {name: run for name, run in every.items() if name.split(",")[0] in names}


# -- measuring -------------------------------------------------------------------------------------


def clocked(run: Callable[[], Any], options: argparse.Namespace) -> float:
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    synchronize(options)
    start = clock()
    run()
    synchronize(options)
    return clock() - start


def synchronize(options: argparse.Namespace) -> None:
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()


def throughput(v: Variants, options: argparse.Namespace) -> dict[str, list[float]]:
    runs = variants_of(v, options.variants)
    for name in list(runs):
        try:
            runs[name]()  # warm up; some variants cannot run some models
        except (RuntimeError, ValueError, ImportError, TypeError) as error:
            print(f"{name} cannot run this model: {str(error).splitlines()[0][:100]}\n")
            del runs[name]
    check_agreement(v, runs)
    names, times = list(runs), {name: [] for name in runs}
    for number in range(options.rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(clocked(runs[name], options))
    return times


def check_agreement(v: Variants, runs: dict[str, Callable[[], Tensor]]) -> None:
    """The variants of the same members must compute the same, or their times mean nothing."""
    if "sequential" not in runs or "low-rank, rank 1" not in runs:
        return
    explicit, plain = runs["sequential"](), runs["plain"]()
    moved = (explicit - plain).float().norm()
    for name in ("low-rank, rank 1", "vmap"):
        if name in runs:
            apart = float((runs[name]() - explicit).float().norm() / moved)
            print(f"{name}: differs from explicit weights by {apart:.1e} of what the noise does")
    print()


def report_throughput(times: dict[str, list[float]], v: Variants) -> None:
    calls = v.members * v.rows * v.options.calls
    print("| variant | a generation | rows a second | of plain inference (quartiles) |")
    print("|---|---|---|---|")
    for name, values in times.items():
        median = statistics.median(values)
        ratios = [100 * p / t for p, t in zip(times["plain"], values, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
        told = "-" if name == "plain" else f"{middle:.1f} % ({low:.1f} to {high:.1f})"
        print(f"| {name} | {median:.3f} s | {calls / median:.1f} | {told} |")
    print()


def peak(run: Callable[[], Any], options: argparse.Namespace, known: Sequence[Tensor]) -> int:
    """The most bytes held at once, without what was there before."""
    if options.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as probe:
        probe.ignore(*known)
        run()
    return probe.peak


def memory_and_update(v: Variants, options: argparse.Namespace, generation: float) -> None:
    model, population = v.case.model, options.population
    weights = list(model.parameters())
    held = sum(w.numel() * w.element_size() for w in weights)
    known = [*weights, *v.arguments.values()]
    plain = peak(lambda: call(model, v.arguments), options, known)

    def forward() -> None:
        with v.noisy(list(range(v.members)), 1, v.rows):
            call(model, v.arguments)

    noisy = peak(forward, options, known)
    es = Eggroll(
        model,
        sigma=SIGMA,
        population_size=population,
        member_batch_size=v.members,
        exclude=v.case.excluded,
    )
    state = [*es.offsets.parameters.values(), *es.offsets.base.values()]
    kept = sum(t.numel() * t.element_size() for t in state)

    def fitness(network: nn.Module, count: int) -> Tensor:
        rows = call(network, part(v.arguments, slice(0, count * v.rows)))
        return rows.float().view(count, -1).mean(1)

    whole = peak(lambda: es.step(fitness), options, [*known, *state])
    scores = torch.randn(population)
    times = [clocked(lambda: es.tell(scores), options) for _ in range(3)]
    update = statistics.median(times)
    sampling = generation * population / v.members * options.network_calls / options.calls
    print(f"| memory, population {population}, batches of {v.members} x {v.rows} | MB | ratio |")
    print("|---|---|---|")
    first = held + plain
    for name, size in (
        ("weights and a plain forward pass", first),
        ("weights and a pass with noise", held + noisy),
        (
            "a whole generation: the same, float32 offsets, first weights, update",
            held + kept + whole,
        ),
    ):
        print(f"| {name} | {size / 1e6:.1f} | {size / first:.3f} |")
    stored = 4 * population * sum(w.rows + w.columns for w in v.layers.values())
    print(f"\nnoise kept between passes: 0 bytes (as float32 factors: {stored / 1e6:.1f} MB)")
    print(
        f"an update: {update:.3f} s, {100 * update / (update + sampling):.2f} % of a generation of "
        f"{population} members x {v.rows} rows x {options.network_calls} network calls"
    )
    prompts = options.prompts
    print(
        f"bytes that {population} members with {prompts} prompts put on the network a step: "
        f"{4 * population * prompts} as scores, {population // 2 + 4} as one byte a pair; "
        f"the weights are {held}"
    )


def main() -> None:
    options = parse()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"bench_eggroll {options.model}: skipped, there is no CUDA device here")
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    case = {"embedded": embedded, "sd3": sd3}[options.model](options)
    where = torch.cuda.get_device_name() if "cuda" in options.device else "CPU"
    print(
        f"{options.model} on {where}, {str(options.dtype)[6:]}, {case.tokens} tokens a row, "
        f"{options.members} members x {options.rows} rows, {options.calls} calls a generation, "
        f"{options.rounds} rounds, {options.clock} time, torch {torch.__version__}\n"
    )
    with torch.inference_mode(False), torch.no_grad():
        v = Variants(case, options)
        times = throughput(v, options)
        report_throughput(times, v)
        fastest = next(name for name in times if name != "plain" or len(times) == 1)
        memory_and_update(v, options, statistics.median(times[fastest]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=("embedded", "sd3"), nargs="?", default="embedded")
    parser.add_argument("--device", help="default: cpu for embedded, cuda for sd3")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--members", type=int, default=16, help="in one batch")
    parser.add_argument("--rows", type=int, default=4, help="of a member")
    parser.add_argument("--calls", type=int, default=4, help="of the network in a timed generation")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--population", type=int, default=256, help="for memory and the update")
    parser.add_argument("--network-calls", type=int, default=20, help="a sample, for the share")
    parser.add_argument("--prompts", type=int, default=4, help="for the bytes on the network")
    parser.add_argument("--layers", type=int, default=24, help="of the sd3 transformer")
    parser.add_argument("--pixels", type=int, default=512, help="of the sd3 image")
    parser.add_argument("--text-tokens", type=int, default=77, help="of the sd3 prompt")
    parser.add_argument("--compile", action="store_true", help="plain, low-rank and sequential")
    every = ("plain", "low-rank", "sequential", "vmap", "peft")
    parser.add_argument("--variants", nargs="+", choices=every, default=list(every))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    options.device = options.device or ("cpu" if options.model == "embedded" else "cuda")
    options.dtype = getattr(torch, options.dtype)
    if "plain" not in options.variants:
        parser.error("--variants must contain plain, which the others are compared with")
    return options


if __name__ == "__main__":
    main()
