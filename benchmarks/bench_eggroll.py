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
import statistics
import warnings
from collections.abc import Callable, Iterable

import torch
from _eggroll_variants import SIGMA, Variants, call, embedded, part, sd3, variants_of
from _probes import clocked, peak_bytes
from torch import Tensor, nn

from diffsteer.training.eggroll import Eggroll


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


def memory_and_update(v: Variants, options: argparse.Namespace, generation: float) -> None:
    population = max(options.populations)
    report_memory(v, options)
    es = evolution(v, population)
    scores = torch.randn(population)
    update = statistics.median(clocked(lambda: es.tell(scores), options) for _ in range(3))
    sampling = generation * population / v.members * options.network_calls / options.calls
    stored = 4 * population * sum(w.rows + w.columns for w in v.layers.values())
    print(f"\nnoise kept between passes: 0 bytes (as float32 factors: {stored / 1e6:.1f} MB)")
    print(
        f"an update: {update:.3f} s, {100 * update / (update + sampling):.2f} % of a generation of "
        f"{population} members x {v.rows} rows x {options.network_calls} network calls"
    )
    prompts, held = options.prompts, bytes_of(v.case.model.parameters())
    print(
        f"bytes that {population} members with {prompts} prompts put on the network a step: "
        f"{4 * population * prompts} as scores, {population // 2 + 8} as one byte a pair; "
        f"the weights are {held}"
    )


def evolution(v: Variants, population: int) -> Eggroll:
    return Eggroll(
        v.case.model,
        sigma=SIGMA,
        population_size=population,
        member_batch_size=v.members,
        exclude=v.case.excluded,
        offload=True,
    )


def report_memory(v: Variants, options: argparse.Namespace) -> None:
    """What the device holds: weights, and the most that a pass or a whole generation adds."""
    model, held = v.case.model, bytes_of(v.case.model.parameters())
    known = [*model.parameters(), *v.arguments.values()]
    first = held + peak_bytes(lambda: call(model, v.arguments), known, options)

    def forward() -> None:
        with v.noisy(list(range(v.members)), 1, v.rows):
            call(model, v.arguments)

    def fitness(network: nn.Module, count: int) -> Tensor:
        rows = call(network, part(v.arguments, slice(0, count * v.rows)))
        return rows.float().view(count, -1).mean(1)

    sizes = {"weights and a plain pass": first}
    sizes["weights and a pass with noise"] = held + peak_bytes(forward, known, options)
    for population in options.populations:
        es = evolution(v, population)
        state = [*es.offsets.parameters.values(), *es.offsets.base.values()]
        whole = peak_bytes(lambda es=es: es.step(fitness), [*known, *state], options)
        sizes[f"a generation of {population}, update included"] = held + whole
    print(f"| memory, batches of {v.members} x {v.rows} rows | MB | ratio |")
    print("|---|---|---|")
    for name, size in sizes.items():
        print(f"| {name} | {size / 1e6:.1f} | {size / first:.3f} |")
    print(
        f"\nfloat32 offsets and first weights: {bytes_of(state) / 1e6:.1f} MB, with offload=True "
        "in main memory and not counted above"
    )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
        first = next(name for name in times if name != "plain" or len(times) == 1)
        memory_and_update(v, options, statistics.median(times[first]))


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
    parser.add_argument(
        "--populations",
        type=int,
        nargs="+",
        default=[16, 256],
        help="for memory; the largest for the update",
    )
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
