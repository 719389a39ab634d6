"""The runs of the study of EGGROLL: one task a way to climb, all from the same weights."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _eggroll_rivals import DenseEvolution, differentiable_reward, reward_gradient
from torch import Tensor

from diffsteer.pipelines import load_pipeline
from diffsteer.training.acflow import ACFlowConfig, ACFlowTrainer
from diffsteer.training.acflow.run_files import read_log
from diffsteer.training.eggroll import EggrollConfig, EggrollTrainer, FitnessLog, Hub, Shaped
from diffsteer.training.eggroll import make_eggroll as make_optimizer
from diffsteer.training.eggroll.members import MemberSampler
from diffsteer.training.eggroll.questions import Questions, draw_questions, fixed_questions
from diffsteer.training.prompts import class_prompts
from diffsteer.training.rewards import RewardSet, load_reward

REWARDS = {"jpeg": "jpeg", "class": "class-probability:classifier=guidance,mode=log"}
Curve = list[list[float]]  # [passes, mean reward of the mean parameters on the watched images]


@dataclass(frozen=True)
class Task:
    """One run: how, towards what, from which seed."""

    name: str
    method: str  # a method of Runs
    reward: str = "jpeg"
    population: int = 0
    rank: int = 1
    seed: int = 0


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """All runs, what matters most first."""
    found, main = [Task("start", "nothing")], args.population
    for seed in range(args.seeds):
        mark = "" if seed == 0 else f"-seed{seed}"
        one = [
            Task("eggroll", "evolve", population=main),
            Task("shuffled", "shuffle", population=main),
            Task("class-eggroll", "evolve", "class", main),
            Task("class-gradient", "climb", "class"),
            Task("acflow", "weight"),
            Task("class-acflow", "weight", "class"),
            Task("dense", "evolve_dense", population=main),
            Task("mezo", "evolve_dense", population=2),
            *(Task(f"eggroll-r{r}", "evolve", population=main, rank=r) for r in args.ranks),
            *(Task(f"eggroll-n{n}", "evolve", population=n) for n in args.populations),
        ]
        found += [replace(task, name=f"{task.name}{mark}", seed=seed) for task in one]
    return found


class Runs:
    """Runs tasks; the weights that they reach are files in ``out/weights``."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rewards = {n: load_reward(spec, device=args.device) for n, spec in REWARDS.items()}

    def __call__(self, task: Task) -> dict[str, Any]:
        """What a task found, as plain values."""
        pipe = load_pipeline("embedded", dtype=torch.bfloat16, device=self.args.device)
        began = time.monotonic()
        curve = getattr(self, task.method)(task, pipe)
        seconds = time.monotonic() - began
        path = self.args.out / "weights" / f"{task.name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: w.to(torch.bfloat16) for name, w in pipe.transformer.state_dict().items()}
        torch.save(state, path)
        return {**asdict(task), "curve": curve, "seconds": round(seconds, 1)}

    def config(self, task: Task) -> EggrollConfig:
        """The settings of a task; the random walk of its steps would reach equally far."""
        args, size = self.args, task.population or self.args.population
        steps = max(1, args.passes // self.passes(size))
        every = max(1, steps // args.points)
        return EggrollConfig(
            steps=steps, population_size=size, sigma=args.sigma, rank=task.rank, seed=task.seed,
            lr=args.lr * (size / args.population) ** 0.5, prompts_per_step=args.images,
            sample_steps=args.sample_steps, images_per_call=80, eval_every=every,
            eval_images=args.watched, checkpoint_every=every,
        )  # fmt: skip

    def passes(self, population: int) -> int:
        """Rows through the network in a generation."""
        return population * self.args.images * self.args.sample_steps

    def nothing(self, task: Task, pipe: Any) -> Curve:
        """The weights that all runs begin with."""
        return []

    def evolve(self, task: Task, pipe: Any) -> Curve:
        """Evolution with low-rank noise."""
        config, out = self.config(task), self.args.out / "runs" / task.name
        rewards = RewardSet({task.reward: self.rewards[task.reward]})
        if not EggrollTrainer(config, pipe, rewards, class_prompts(pipe), out, hub=Hub()).run():
            raise KeyboardInterrupt  # stopped by a signal: the same command goes on
        lines = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
        each = self.passes(task.population)
        return [[line["generation"] * each, line[f"reward/{task.reward}"]] for line in lines]

    def shuffle(self, task: Task, pipe: Any) -> Curve:
        """The steps of the run ``eggroll`` with the weights of its pairs dealt out at random."""
        mark = task.name.removeprefix("shuffled")
        log = FitnessLog(self.args.out / "runs" / f"eggroll{mark}" / "fitness_log.jsonl")
        es = make_optimizer(pipe.transformer, self.config(task))
        source = torch.Generator().manual_seed(task.seed)
        for line in log.lines():
            pairs = torch.tensor(line["fitness"], dtype=torch.float64).view(-1, 2)
            dealt = pairs[torch.randperm(len(pairs), generator=source)].flatten()
            es.update(Shaped(dealt, line["count"], line["deviation"]))
        return []

    def evolve_dense(self, task: Task, pipe: Any) -> Curve:
        """Evolution with full noise, or two-point estimates."""
        config, prompts = self.config(task), class_prompts(pipe)
        sampler = self.sampler(pipe, config)
        rival = DenseEvolution(
            pipe.transformer, config.sigma, config.lr, task.population, seed=task.seed
        )
        curve = []
        for step in range(config.steps):
            if step % config.eval_every == 0:
                curve.append([step * self.passes(task.population), self.watch(task, sampler)])
            asked = draw_questions(step, prompts, count=self.args.images, repeats=1, seed=task.seed)
            rival.step(lambda a: self.score(task.reward, sampler.sample(None, a), a), asked)
        return [*curve, [config.steps * self.passes(task.population), self.watch(task, sampler)]]

    def climb(self, task: Task, pipe: Any) -> Curve:
        """Adam on the gradient; a pass backward counts as two forward."""
        pipe.transformer.float()
        prompts, steps = class_prompts(pipe), self.args.sample_steps
        weights = {n: p for n, p in pipe.transformer.named_parameters() if p.ndim >= 2}
        rule = torch.optim.Adam(weights.values(), lr=self.args.rate)
        sampler, each = self.sampler(pipe, self.config(task)), 3 * len(prompts) * steps
        total = max(1, self.args.passes // each)
        every, curve = max(1, total // self.args.points), []
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.device == "cpu"):
            for step in range(total):
                if step % every == 0:
                    curve.append([step * each, self.watch(task, sampler)])
                asked = draw_questions(step, prompts, count=0, repeats=1, seed=task.seed)
                _, found = reward_gradient(pipe, differentiable_reward, asked, steps)
                for name, gradient in found.items():
                    weights[f"{name}.weight"].grad = -gradient
                rule.step()
            curve.append([total * each, self.watch(task, sampler)])
        return curve

    def weight(self, task: Task, pipe: Any) -> Curve:
        """AC-Flow with all weights trained; its passes backward are not counted."""
        args, prompts = self.args, class_prompts(pipe)
        pipe.transformer.float()
        rewards = RewardSet({task.reward: self.rewards[task.reward]})
        config, out = acflow_config(args, task.seed), args.out / "runs" / task.name
        trainer = ACFlowTrainer(config, pipe, prompts, rewards, out)
        if not trainer.run():
            raise KeyboardInterrupt
        state = trainer.learner.average() or trainer.learner.policy.state_dict()
        trainer.learner.policy.load_state_dict(state)
        lines = [line for line in read_log(out) if "evaluation" in line]
        return [[x.get("evaluations", 0), x["evaluation"][f"reward/{task.reward}"]] for x in lines]

    def watch(self, task: Task, sampler: MemberSampler) -> float:
        """The mean reward of the watched images, by the weights as they are."""
        asked = fixed_questions(class_prompts(sampler.pipe), count=self.args.watched)
        return float(self.score(task.reward, sampler.sample(None, asked), asked).mean())

    def sampler(self, pipe: Any, config: EggrollConfig) -> MemberSampler:
        """Samples from the weights as they are."""
        rewards = RewardSet({"jpeg": self.rewards["jpeg"]})
        return MemberSampler(pipe, make_optimizer(pipe.transformer, config), rewards, config)

    def score(self, reward: str, images: Tensor, asked: Questions) -> Tensor:
        """The reward of each image, (B,)."""
        rewards = RewardSet({reward: self.rewards[reward]})
        texts, notes = [p.text for p in asked.prompts], [p.metadata for p in asked.prompts]
        return rewards.score(images, texts, notes).total


def acflow_config(args: argparse.Namespace, seed: int) -> ACFlowConfig:
    """As many epochs as the passes pay for: sampling, then network and reference on two levels."""
    each = 80 * args.sample_steps + 80 * 2 * 2
    epochs = max(4, args.passes // each)
    return ACFlowConfig(
        tune="full", prompts_per_epoch=10, images_per_prompt=8, sample_steps=args.sample_steps,
        levels_per_sample=2, warmup_min=3, warmup_max=3, ramp=1, ema=0.5, seed=seed,
        learning_rate=args.acflow_rate, epochs=epochs, eval_every=max(1, epochs // args.points),
        eval_images=args.watched, eval_steps=args.sample_steps, checkpoint_every=5,
    )  # fmt: skip


def load_weights(pipe: Any, out: Path, name: str) -> None:
    """Put what a task has reached into a pipeline."""
    state = torch.load(out / "weights" / f"{name}.pt", weights_only=True)
    pipe.transformer.load_state_dict(state)


def moved(out: Path, name: str) -> float:
    """The Euclidean norm of what a task has changed."""
    start, end = (
        torch.load(out / "weights" / f"{task}.pt", weights_only=True) for task in ("start", name)
    )
    changes = [(end[key].double() - start[key].double()).square().sum() for key in start]
    return float(torch.stack(changes).sum().sqrt())
