"""The study of EGGROLL on the embedded model, at equal numbers of passes of the network.

    python scripts/reproduce_eggroll.py --out out/eggroll                     (as on the page)
    python scripts/reproduce_eggroll.py --out out/eggroll-large --passes 1000000 --seeds 3 \
        --populations 16 64 256 1024 --device cuda

Every method sees the same prompts and the same noise at the same number of passes, takes steps
whose random walk would reach equally far, and is judged on the same images. The same command goes
on where it stopped; docs/science/eggroll.md gets the tables with --page.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import _cli
import _eggroll_page as page
import torch
from _eggroll_rivals import DenseEvolution, reward_gradient
from torch import Tensor

from diffsteer.eval import EvalSuite, load_classifier
from diffsteer.pipelines import files, load_pipeline
from diffsteer.training.eggroll import EggrollConfig, EggrollTrainer, Hub, make_eggroll
from diffsteer.training.eggroll.members import MemberSampler
from diffsteer.training.eggroll.questions import Questions, draw_questions, fixed_questions
from diffsteer.training.prompts import class_prompts
from diffsteer.training.rewards import RewardSet, load_reward

METRICS = ("fd", "accuracy", "diversity", "colour")
REWARDS = {"jpeg": "jpeg", "class": "class-probability:classifier=guidance,mode=log"}


@dataclass(frozen=True)
class Task:
    """One run: how, towards what, from which seed."""

    name: str
    method: str  # "eggroll", "dense", "gradient" or "none"
    reward: str = "jpeg"
    population: int = 32
    rank: int = 1
    seed: int = 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/eggroll"), help="folder (default: out/eggroll)")
    add("--passes", type=int, default=16000, help="rows through the network in a run (16000)")
    add("--gradient-passes", type=int, default=3000, help="the same of the gradient's runs (3000)")
    add("--seeds", type=int, default=1, help="runs of each kind (default: 1)")
    add("--populations", type=int, nargs="+", default=[8, 32, 64], help="default: 8 32 64")
    add("--ranks", type=int, nargs="+", default=[1, 4, 16], help="default: 1 4 16")
    add("--sigma", type=float, default=0.003, help="deviation of the perturbations (0.003)")
    add("--lr", type=float, default=0.5, help="step in units of sigma, population 32 (0.5)")
    add("--rate", type=float, default=1e-4, help="learning rate of the gradient's Adam (1e-4)")
    add("--sample-steps", type=int, default=5, help="solver steps while training (5)")
    add("--judged", type=int, default=200, help="images that a result is judged on (200)")
    add("--judged-steps", type=int, default=10, help="their solver steps (10)")
    add("--device", default="cpu", help="default: cpu")
    add("--only", nargs="+", metavar="TASK", help="run only these tasks (and those that were run)")
    add("--no-judge", action="store_true", help="train only")
    add("--list", action="store_true", help="print the names of the tasks")
    add("--page", type=Path, help="put the tables into this page, between its marks")
    add("--threads", type=int, help="CPU threads")
    add("--traceback", action="store_true", help="show where an error comes from")
    return parser


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """All runs, what matters most first."""
    found = [Task("start", "none")]
    for seed in range(args.seeds):
        mark = "" if seed == 0 else f"-seed{seed}"
        found += [
            Task(f"eggroll-r1{mark}", "eggroll", seed=seed),
            Task(f"dense{mark}", "dense", seed=seed),
            Task(f"mezo{mark}", "dense", population=2, seed=seed),
            Task(f"class-eggroll{mark}", "eggroll", "class", seed=seed),
            Task(f"class-gradient{mark}", "gradient", "class", seed=seed),
        ]
        found += [
            Task(f"eggroll-r{rank}{mark}", "eggroll", rank=rank, seed=seed)
            for rank in args.ranks if rank != 1
        ]  # fmt: skip
        found += [
            Task(f"eggroll-n{n}{mark}", "eggroll", population=n, seed=seed)
            for n in args.populations if n != 32
        ]  # fmt: skip
    return found


class Study:
    """Runs tasks and judges their results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rewards = {n: load_reward(spec, device=args.device) for n, spec in REWARDS.items()}
        judges = {name: load_classifier(name).id for name in ("guidance", "evaluation")}
        self.judges = {**judges, "images": args.judged, "steps": args.judged_steps}

    def config(self, task: Task) -> EggrollConfig:
        """The settings of a task; the random walk of its steps would reach equally far."""
        per_step = task.population * 10 * self.args.sample_steps
        steps = max(1, self.args.passes // per_step)
        return EggrollConfig(
            steps=steps, population_size=task.population, sigma=self.args.sigma, rank=task.rank,
            lr=self.args.lr * (task.population / 32) ** 0.5, seed=task.seed, prompts_per_step=0,
            sample_steps=self.args.sample_steps, images_per_call=80, eval_every=max(1, steps // 4),
            eval_images=50, checkpoint_every=max(1, steps // 4),
        )  # fmt: skip

    def run(self, task: Task) -> dict[str, Any]:
        """What a task found, as plain values."""
        dtype = torch.bfloat16
        pipe = load_pipeline("embedded", dtype=dtype, device=self.args.device)
        methods: dict[str, Callable[..., list[Any]]] = {
            "eggroll": self.evolve, "dense": self.evolve_dense, "gradient": self.climb,
            "none": lambda *_: [],
        }  # fmt: skip
        began = time.monotonic()
        curve = methods[task.method](task, pipe)
        seconds = time.monotonic() - began
        weights = self.args.out / "weights" / f"{task.name}.pt"
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(pipe.transformer.state_dict(), weights)
        return {**asdict(task), "curve": curve, "seconds": round(seconds, 1)}

    def evolve(self, task: Task, pipe: Any) -> list[Any]:
        """Evolution with low-rank noise; (passes, mean reward of the population) by generation."""
        config = self.config(task)
        out = self.args.out / "runs" / task.name
        rewards = RewardSet({task.reward: self.rewards[task.reward]})
        if not EggrollTrainer(config, pipe, rewards, class_prompts(pipe), out, hub=Hub()).run():
            raise KeyboardInterrupt  # stopped by a signal: the same command goes on
        per_step = task.population * 10 * config.sample_steps
        lines = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
        return [[(line["generation"] + 1) * per_step, line["reward"]] for line in lines]

    def evolve_dense(self, task: Task, pipe: Any) -> list[Any]:
        """Evolution with full noise, or two-point estimates."""
        config, prompts = self.config(task), class_prompts(pipe)
        sampler = self.sampler(pipe, config)
        rival = DenseEvolution(
            pipe.transformer, config.sigma, config.lr, task.population, seed=task.seed
        )
        curve = []
        for step in range(config.steps):
            asked = draw_questions(step, prompts, count=0, repeats=1, seed=task.seed)
            value = rival.step(lambda a: self.score(task.reward, sampler.sample(None, a), a), asked)
            curve.append([(step + 1) * task.population * 10 * config.sample_steps, value])
        return curve

    def climb(self, task: Task, pipe: Any) -> list[Any]:
        """Adam on the gradient; a pass backward counts as two forward."""
        pipe.transformer.float()
        prompts, steps = class_prompts(pipe), self.args.sample_steps
        weights = {n: p for n, p in pipe.transformer.named_parameters() if p.ndim >= 2}
        rule = torch.optim.Adam(weights.values(), lr=self.args.rate)
        curve, passes, step = [], 0, 0
        while passes < self.args.gradient_passes:
            asked = draw_questions(step, prompts, count=0, repeats=1, seed=task.seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.args.device == "cpu"):
                value, found = reward_gradient(pipe, self.differentiable, asked, steps)
            for name, gradient in found.items():
                weights[f"{name}.weight"].grad = -gradient
            rule.step()
            passes, step = passes + 3 * len(asked) * steps, step + 1
            curve.append([passes, value])
        pipe.transformer.to(torch.bfloat16)
        return curve

    def differentiable(self, images: Tensor, asked: Questions) -> Tensor:
        """The reward "class" with its gradient."""
        logits = load_classifier("guidance")(images)
        labels = torch.tensor([prompt.label for prompt in asked.prompts])
        return logits.log_softmax(1).gather(1, labels[:, None])[:, 0]

    def judge(self, task: Task) -> dict[str, Any]:
        """Both rewards of each judged image, and scores by the classifier for evaluation."""
        pipe = load_pipeline("embedded", dtype=torch.bfloat16, device=self.args.device)
        state = torch.load(self.args.out / "weights" / f"{task.name}.pt", weights_only=True)
        pipe.transformer.load_state_dict(state)
        config = replace(EggrollConfig(), sample_steps=self.args.judged_steps)
        sampler, asked = self.sampler(pipe, config), fixed_questions(
            class_prompts(pipe), count=self.args.judged)  # fmt: skip
        suite, values = EvalSuite(METRICS), {name: [] for name in REWARDS}
        for start in range(0, len(asked), 100):
            part = asked.part(slice(start, start + 100))
            images = sampler.sample(None, part)
            suite.update(images.cpu(), labels=[prompt.label or 0 for prompt in part.prompts])
            for name, found in values.items():
                found += self.score(name, images, part).tolist()
        return {"rewards": values, "scores": dict(suite.compute().values), "judge": self.judges}

    def sampler(self, pipe: Any, config: EggrollConfig) -> MemberSampler:
        """Samples from the weights as they are."""
        return MemberSampler(pipe, make_eggroll(pipe.transformer, config), RewardSet(
            {"jpeg": self.rewards["jpeg"]}), config)  # fmt: skip

    def score(self, reward: str, images: Tensor, asked: Questions) -> Tensor:
        """The reward of each image, (B,)."""
        rewards = RewardSet({reward: self.rewards[reward]})
        texts, notes = [p.text for p in asked.prompts], [p.metadata for p in asked.prompts]
        return rewards.score(images, texts, notes).total


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    tasks = tasks_of(args)
    if args.list:
        print("\n".join(task.name for task in tasks))
        return
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    study, found = Study(args), {}
    for task in tasks:
        path = args.out / "tasks" / f"{task.name}.json"
        result = json.loads(path.read_text()) if path.exists() else None
        if result is None:
            if args.only and task.name not in args.only:
                continue
            result = {**study.run(task), "settings": _settings(args)}
            print(f"{task.name}: {result['seconds']:.0f} s", flush=True)
            files.write_json(path, result)
        if not args.no_judge and result.get("judge") != study.judges:
            result |= study.judge(task)
            files.write_json(path, result)
        found[task.name] = result
    if not args.no_judge:
        page.write(args.out, found, args.page)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("passes", "gradient_passes", "sigma", "lr", "rate", "sample_steps", "judged_steps")
    return {name: getattr(args, name) for name in names}


if __name__ == "__main__":
    raise SystemExit(_cli.run(main))
