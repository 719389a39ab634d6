"""What AC-Flow costs beside its special case without a critic, and beside plain LoRA training.

    python benchmarks/bench_acflow.py embedded --threads 1                 # the CPU
    python benchmarks/bench_acflow.py sd3                # the shape of SD3-medium, on CUDA
    python benchmarks/bench_acflow.py sd3 --device cpu --layers 1 --pixels 64 --samples 4 --rounds 3
    python benchmarks/bench_acflow.py sd3 --device cpu --part memory --checkpointing --samples 2

Update: one actor update of AC-Flow (advantages from the critic, weights, loss, one critic step) and
one of ORW-CFM-W2 (weights, loss) on the same samples and policy, in changing order; the ratio is
the median over the rounds. Bookkeeping is what happens once an epoch: shaping, reading measures.
Timeline: when each batch is sampled and when it is scored, by a reward that waits as one on a
server does. Memory: bytes that are held, and the most that an update adds (live tensors on the CPU,
the allocator's peak on CUDA). Reads: values of the device that the host asks for in an update.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from typing import Any

import _real_size
import torch
from _acflow_memory import held, primed, report_held
from _probes import HostReads, clocked, device_name, peak_bytes
from torch import Tensor, nn

from diffsteer import load_embedded
from diffsteer.training.acflow import ACFlowConfig, ACFlowTrainer, RewardShaper, method_config
from diffsteer.training.acflow.learner import Learner
from diffsteer.training.acflow.losses import forward_noised
from diffsteer.training.acflow.targets import make_targets
from diffsteer.training.network import quick_attention
from diffsteer.training.prompts import Prompt, class_prompts
from diffsteer.training.rewards import JpegSize, RewardPool, RewardSet

# -- what is measured ------------------------------------------------------------------------------


def settings_of(options: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """An epoch of one update."""
    prompts = 10 if options.model == "embedded" else 2
    return {
        "prompts_per_epoch": prompts, "images_per_prompt": max(1, options.samples // prompts),
        "sample_steps": options.steps, "sample_batch": max(1, options.samples // 4),
        "critic_width": options.width, "critic_steps": 1, "warmup_min": 0, "warmup_max": 0,
        "ramp": 0, "eval_images": 0, "epochs": 10**6, "levels_per_sample": 2,
        "gradient_checkpointing": options.checkpointing, **changes,
    }  # fmt: skip


def make_trainer(options: argparse.Namespace, reward: Any, **changes: Any) -> ACFlowTrainer:
    config = ACFlowConfig(**settings_of(options, **changes))
    build = embedded if options.model == "embedded" else sd3
    pipe, prompts, more = build(options)
    rewards = RewardSet({"reward": reward})
    return ACFlowTrainer(config, pipe, prompts, rewards, tempfile.mkdtemp(), **more)


def embedded(options: argparse.Namespace) -> tuple[Any, list[Prompt], dict[str, Any]]:
    pipe = load_embedded(device=options.device)
    return pipe, class_prompts(pipe), {}


def sd3(options: argparse.Namespace) -> tuple[Any, list[Prompt], dict[str, Any]]:
    """A pipeline of that shape with random weights; prompts are rows of embeddings."""
    pipe, given = _real_size.sd3(argparse.Namespace(**{**vars(options), "batch": 2}))

    def inputs(prompts: Any) -> dict[str, Any]:
        rows = [int(prompt.text) for prompt in prompts]
        return {name: given[name][rows] for name in ("prompt_embeds", "pooled_prompt_embeds")}

    call = {"height": options.pixels, "width": options.pixels}
    return pipe, [Prompt("0"), Prompt("1")], {"inputs": inputs, "call": call}


def collected(trainer: ACFlowTrainer) -> tuple[Any, Any]:
    """Samples of an epoch and their targets."""
    plan = trainer.plan(0)
    with trainer.learner.precision(), RewardPool(trainer.rewards) as pool:
        found = trainer._collect(plan, pool)
    return found, targets_of(trainer, found)


def targets_of(trainer: ACFlowTrainer, found: Any) -> Any:
    groups = torch.tensor(trainer.plan(0).prompts)
    device = trainer.accelerator.device
    return make_targets(found.scores, groups, RewardShaper(), drop_constant=True, device=device)


def without_critic(trainer: ACFlowTrainer, options: argparse.Namespace) -> Learner:
    """ORW-CFM-W2 on the policy of ``trainer``."""
    changes = {"critic": False, "critic_steps": 0, "tune": trainer.config.tune}
    config = method_config("orw", **settings_of(options, **changes))
    _, images, observed = trainer.sampler.learn(trainer.prompts)
    learner = trainer.learner
    return Learner(config, learner.model, learner.policy, observed, images, trainer.accelerator)


# -- measuring -------------------------------------------------------------------------------------


def updates(trainer: ACFlowTrainer, options: argparse.Namespace) -> None:
    """The table of times."""
    found, targets = collected(trainer)  # the first is not counted
    sampling = clocked(lambda: collected(trainer), options)
    learners = {"AC-Flow": trainer.learner, "ORW-CFM-W2": without_critic(trainer, options)}
    times: dict[str, list[float]] = {name: [] for name in learners}
    keeping: list[float] = []
    for number in range(options.rounds + 1):  # the first is not counted
        for name in list(learners)[:: 1 if number % 2 else -1]:
            learner = learners[name]

            def update(learner: Learner = learner, number: int = number) -> None:
                where = {"epoch": number, "inner": 0, "number": 0, "rate": 1e-6}
                with learner.precision():
                    learner.update(found.data, targets, **where)

            times[name].append(clocked(update, options))
            read = learner.measures.read
            spent = clocked(lambda: targets_of(trainer, found), options)
            spent += clocked(lambda read=read: read(trainer.accelerator, clip=2.0), options)
            keeping.append(spent)
    report_updates({name: values[1:] for name, values in times.items()}, keeping, sampling, options)


def report_updates(
    times: dict[str, list[float]], keeping: list[float], sampling: float, o: argparse.Namespace
) -> None:
    ours, plain = times["AC-Flow"], times["ORW-CFM-W2"]
    ratios = [100 * (a / b - 1) for a, b in zip(ours, plain, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
    kept, base = statistics.median(keeping), statistics.median(plain)
    extra = statistics.median(ours) - base
    print(f"{o.samples} samples x 2 levels an update, critic of width {o.width}\n")
    print("| | seconds | beside ORW-CFM-W2 |\n|---|---|---|")
    print(f"| update, ORW-CFM-W2 | {base:.3f} | |")
    print(f"| update, AC-Flow | {base + extra:.3f} | {middle:+.1f} % ({low:+.1f} to {high:+.1f}) |")
    print(f"| shaping and measures, an epoch | {kept:.4f} | {100 * kept / base:+.1f} % |")
    whole = sampling + base + kept
    print(f"| epoch of one update, {o.steps} steps | {whole + extra:.2f} "
          f"| {100 * extra / whole:+.1f} % |\n")  # fmt: skip


class Waiting:
    """A reward that answers after some time, as one on a server does."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        """Scores."""
        time.sleep(self.seconds)
        return JpegSize()(images.float())


def timeline(trainer: ACFlowTrainer, reward: Waiting, options: argparse.Namespace) -> None:
    """When each batch is sampled and scored."""
    reward.seconds = 0.0
    found, _ = collected(trainer)
    batch = statistics.mean(end - start for start, end in found.sampled)
    reward.seconds = options.wait * batch
    found, _ = collected(trainer)
    print("| batch | sampled, seconds | scored, seconds |\n|---|---|---|")
    rows = zip(found.sampled, sorted(found.scored), strict=True)
    for number, ((a, b), (c, d)) in enumerate(rows):
        print(f"| {number + 1} | {a:.2f} to {b:.2f} | {c:.2f} to {d:.2f} |")
    sampling = sum(end - start for start, end in found.sampled)
    scoring, total = len(found.sampled) * reward.seconds, max(end for _, end in found.scored)
    print(f"\nsampling {sampling:.2f} s and scoring at least {scoring:.2f} s took {total:.2f} s "
          f"together; one after the other they take {sampling + scoring:.2f} s\n")  # fmt: skip


def reads(trainer: ACFlowTrainer, options: argparse.Namespace) -> None:
    """Values of samples and rewards that the host asks for in an update."""
    found, targets = collected(trainer)
    counts = {}
    learners = {"AC-Flow": trainer.learner, "ORW-CFM-W2": without_critic(trainer, options)}
    for name, learner in learners.items():
        with HostReads(found.data.clean, *vars(targets).values()) as probe:
            with learner.precision():
                learner.update(found.data, targets, epoch=0, inner=0, number=0, rate=1e-6)
        counts[name] = probe.count
    print("host reads an update: " + ", ".join(f"{n} {c}" for n, c in counts.items()) + "\n")


# -- memory ----------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> None:
    """Plain LoRA flow matching and AC-Flow on the same batch."""
    trainer = make_trainer(options, JpegSize(), tune="lora", rank=options.rank)
    report_held(trainer.learner)
    learner, (found, targets) = trainer.learner, collected(trainer)
    policy, data = learner.policy, found.data
    plain = primed(torch.optim.AdamW(policy.parameters, 1e-6))
    place = learner.place(0)
    draw = learner._draw(data, 0)

    def plain_update() -> None:
        """As a script for LoRA training does it: noise, predict, compare, step."""
        draw_all = draw.part(0, len(data.clean))
        clean = data.clean.float().repeat_interleave(2, 0)
        x = forward_noised(clean, draw_all.noise, draw_all.sigma)
        cond, _ = data.condition(place.local, 2)
        with learner.precision(), quick_attention(learner.device):
            velocity = learner.model.velocity(policy.runner, x, draw_all.sigma, cond)
            (velocity - (draw_all.noise - clean)).square().mean().backward()
        nn.utils.clip_grad_norm_(policy.parameters, 1.0)
        plain.step()
        plain.zero_grad(set_to_none=True)

    def update() -> None:
        with learner.precision():
            learner.update(data, targets, epoch=0, inner=0, number=0, rate=1e-6)

    known = [*policy.module.parameters(), data.clean]
    first = held(policy.module) + peak_bytes(plain_update, known, options) + held(plain)
    own = [primed(learner.optimizer), learner.average()]
    critic = learner.critic
    if critic is not None:
        own += [critic.network, primed(critic.optimizer)]
        known += list(critic.network.parameters())
    added = peak_bytes(update, known, options)
    second = held(policy.module) + added + held(*own)
    print(f"LoRA of rank {options.rank}, {options.samples} samples x 2 levels an update; with the "
          "base weights, adapters, optimizers, averages\n")  # fmt: skip
    print("| | peak, MB | ratio |\n|---|---|---|")
    print(f"| plain LoRA flow matching | {first / 1e6:.0f} | |")
    print(f"| AC-Flow | {second / 1e6:.0f} | {second / first:.3f} |\n")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"an update adds {added / 1e6:.0f} MB at most; the process has held {most:.2f} GB\n")


def main() -> None:
    options = parse()
    print(f"{options.model} on {device_name(options.device)}, torch {torch.__version__}\n")
    if options.device == "cpu":  # accelerate would take a GPU that is there
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.part != "memory":
        tune = "full" if options.model == "embedded" else "lora"
        reward = Waiting()
        trainer = make_trainer(options, reward, tune=tune, rank=options.rank)
        updates(trainer, options)
        reads(trainer, options)
        timeline(trainer, reward, options)
        del trainer
    if options.part != "times":
        memory(options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", choices=("embedded", "sd3"), nargs="?", default="embedded")
    parser.add_argument("--device", help="default: cpu for embedded, cuda for sd3")
    parser.add_argument("--samples", type=int, help="of an update (default: 80; sd3: 8)")
    parser.add_argument("--steps", type=int, default=10, help="of the solver")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--width", type=int, help="of the critic (default: 16; sd3: 32)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--wait", type=float, default=0.8, help="of the reward, in batches sampled")
    parser.add_argument("--layers", type=int, help="of the sd3 transformer (default: 24)")
    parser.add_argument("--pixels", type=int, default=512, help="of the sd3 image")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--part", choices=("times", "memory"), help="default: both")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    small = options.model == "embedded"
    options.device = options.device or ("cpu" if small else "cuda")
    options.samples = options.samples or (80 if small else 8)
    options.width = options.width or (16 if small else 32)
    return options


if __name__ == "__main__":
    main()
