r"""Compare AC-Flow with its special cases and with GRPO, at equal numbers of denoiser evaluations.

    python scripts/reproduce_acflow.py --out runs/acflow               (every run, then the page)
    python scripts/reproduce_acflow.py --device cuda --budget 3000000 --per-class 64 --steps 20 \
        --rate 3e-5 --samples 10000 --seeds 0 1 2 3 4                  (on a GPU)

Each run is a folder under --out and goes on where it stopped; what is finished is not made again.
The page docs/science/acflow.md is written from what is there (--page FILE; --no-page writes none).
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _acflow_judge as judging
import _acflow_page as page
import _acflow_toy as toy
import _cli
import torch
from _acflow_runs import Run

from diffsteer.pipelines import files, load_embedded
from diffsteer.training.acflow import (
    METHODS,
    ACFlowConfig,
    ACFlowTrainer,
    GRPOConfig,
    GRPOTrainer,
)
from diffsteer.training.acflow.run_files import read_log
from diffsteer.training.prompts import class_prompts
from diffsteer.training.rewards import RewardSet

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "science" / "acflow.md"
TAU = 2.0
# What training on one's own samples does without any reward: all weights are 1.
CONTROL = {**METHODS["orw"], "tau": 1e-9}
# A critic lets a run go farther at the same alpha: ORW is let go as far by smaller ones.
LOOSE = {f"orw-{alpha}": {**METHODS["orw"], "alpha": alpha} for alpha in (0.3, 0.1)}
MAIN = ("acflow", "orw", "control", "grpo", "advantage-matching", "reward-weighted")
# Brightness is there because a critic can explain it.
PLAN = {"jpeg": MAIN, "class": MAIN, "brightness": ("acflow", "orw", "control", *LOOSE)}
ALL = [*MAIN, *LOOSE]
SETTINGS: dict[str, Any] = {
    "tune": "full", "prompts_per_epoch": 10, "updates_per_epoch": 2, "levels_per_sample": 2,
    "tau": TAU, "ramp": 2, "eval_images": 0, "checkpoint_every": 3, "sample_batch": 160,
    "critic_width": 16,
}  # fmt: skip
CRITIC = {"warmup_min": 3, "warmup_max": 3, "critic_steps": 10, "critic_memory": 100}
GRPO_STEPS = 10  # of its authors; fewer leave too much of the noise of its sampler in the images


def parser() -> argparse.ArgumentParser:
    parser = _cli.new_parser(__doc__, "[options]")
    kinds = list(judging.REWARDS)
    options: dict[str, tuple[Any, dict[str, Any]]] = {
        "--out": (Path("runs/acflow"), {"type": Path, "help": "folder of the runs"}),
        "--budget": (24_000, {"type": int, "help": "denoiser evaluations of a run"}),
        "--rate": (1e-4, {"type": float, "help": "learning rate of every method"}),
        "--steps": (8, {"type": int, "help": "solver steps of an image"}),
        "--per-class": (16, {"type": int, "help": "images of each of the ten classes an epoch"}),
        "--seeds": ([0, 1, 2], {"type": int, "nargs": "+", "help": "of training, one run each"}),
        "--methods": (ALL, {"nargs": "+", "choices": ALL, "help": "what to compare"}),
        "--rewards": (kinds, {"nargs": "+", "choices": kinds, "help": "what to raise"}),
        "--samples": (500, {"type": int, "help": "images of an evaluation"}),
        "--toy-seeds": (5, {"type": int, "help": "seeds of the toy; 0: none"}),
    }
    for name, (default, more) in options.items():
        help_text = more.pop("help") + " (default: %(default)s)"
        parser.add_argument(name, default=default, help=help_text, **more)
    add = parser.add_argument
    where = f"where the tables go (default: {PAGE.relative_to(ROOT)})"
    add("--page", type=Path, default=PAGE, help=where)
    add("--no-page", action="store_true", help="write no page")
    add("--page-only", action="store_true", help="write it from what is finished, run nothing")
    _cli.add_device_option(parser)
    return parser


def config_of(method: str, args: argparse.Namespace, seed: int) -> ACFlowConfig:
    """As many epochs as the budget pays for: sampling, and two or one passes a state."""
    grpo = {"warmup_min": 0, "warmup_max": 0, "sample_steps": max(args.steps, GRPO_STEPS)}
    own = {"acflow": CRITIC, "grpo": grpo, "control": CONTROL}
    changes = {**METHODS, **LOOSE, **own}[method]
    settings = {
        **SETTINGS, "sample_steps": args.steps, "images_per_prompt": args.per_class,
        "learning_rate": args.rate, "seed": seed, **changes,
    }  # fmt: skip
    samples = settings["prompts_per_epoch"] * settings["images_per_prompt"]
    sampling = samples * settings["sample_steps"]
    passes = 1 if settings.get("alpha", 1.0) == 0 else 2
    training = samples * settings["levels_per_sample"] * passes
    warm = CRITIC["warmup_max"] if method == "acflow" else 0
    epochs = warm + (args.budget - warm * sampling) // (sampling + training)
    kind = GRPOConfig if method == "grpo" else ACFlowConfig
    return kind(**{**settings, "epochs": max(epochs, warm + 1)})


def make_trainer(
    method: str, reward: str, seed: int, args: argparse.Namespace, out: Path
) -> ACFlowTrainer:
    """The run in ``out``, as far as it is."""
    pipe = load_embedded(device=args.device or _cli.default_device())
    if method != "grpo":  # which has a stochastic sampler of its own, on Euler's grid
        pipe.scheduler = judging.solver()
    kind = GRPOTrainer if method == "grpo" else ACFlowTrainer
    name = "jpeg" if method == "control" else reward
    rewards = RewardSet({name: judging.REWARDS[name]()})
    return kind(config_of(method, args, seed), pipe, class_prompts(pipe), rewards, out)


def folder_of(method: str, reward: str, seed: int, args: argparse.Namespace) -> Path:
    """Where a run is; the control is the same for every reward."""
    name = method if method == "control" else f"{reward}-{method}"
    out: Path = args.out / f"{name}-seed{seed}"
    return out


def finished(method: str, reward: str, seed: int, args: argparse.Namespace) -> bool:
    """Whether a run is there to its end, and judged."""
    out = folder_of(method, reward, seed, args)
    lines = read_log(out)
    if not lines or lines[-1]["epoch"] < config_of(method, args, seed).epochs:
        return False
    return judging.judged(out, **how(args)) is not None


def how(args: argparse.Namespace) -> dict[str, int]:
    """How runs are judged."""
    return {"samples": args.samples, "steps": args.steps}


def run_method(method: str, reward: str, seed: int, args: argparse.Namespace) -> None:
    """One run and its judgement, as far as they are missing."""
    out = folder_of(method, reward, seed, args)
    trainer = make_trainer(method, reward, seed, args, out)
    if not trainer.run():
        raise KeyboardInterrupt
    judging.judge(trainer, out, **how(args))


def judge_base(args: argparse.Namespace) -> None:
    """The untouched model, judged as the runs are."""
    if not judging.judged(args.out / "base", **how(args)):
        with tempfile.TemporaryDirectory() as aside:
            trainer = make_trainer("orw", args.rewards[0], 0, args, Path(aside))
            judging.judge(trainer, args.out / "base", **how(args))


def run_toys(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The toy's table; kept in a file, one row a method and seed."""
    path = args.out / "toy.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for seed in range(0 if args.page_only else args.toy_seeds):
        missing = [
            row
            for row in toy.toys()
            if not any(
                (row.name, row.alpha, seed) == (r["name"], r["alpha"], r["seed"]) for r in rows
            )
        ]
        base = toy.base_model(seed) if missing else None
        for row in missing:
            found = toy.run_toy(row, base, seed)
            rows.append({"name": row.name, "alpha": row.alpha, "seed": seed, **found})
            files.write_json(path, rows)
    return rows


def planned(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """Method, reward and seed of every run, seed by seed."""
    rows = itertools.product(args.seeds, args.rewards, args.methods)
    return [(m, reward, seed) for seed, reward, m in rows if m in PLAN[reward]]


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if min(args.budget, args.samples, args.steps, args.per_class) < 1:
        raise ValueError("--budget, --samples, --steps and --per-class must be at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    runs = []
    judge_base(args)
    for method, reward, seed in planned(args):
        what = (method, reward, seed, args)
        if not args.page_only and not finished(*what):
            run_method(*what)
        if finished(*what):
            runs.append(Run.read(reward, method, seed, folder_of(*what)))
    toys = run_toys(args) if args.toy_seeds else []
    if not args.no_page:
        if not runs:
            raise ValueError(f"--page-only: no run is finished in {args.out}")
        page.write(args.page, runs, toys, page.Setting(args, torch.get_num_threads()))
        print(f"wrote {args.page}")


if __name__ == "__main__":
    raise SystemExit(_cli.run(main))
