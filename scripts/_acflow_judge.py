"""How the runs of the comparison of AC-Flow are judged: all alike, by what none was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _interrupt  # noqa: F401
import torch
from PIL import Image

from diffsteer.eval import EvalSuite, load_classifier
from diffsteer.pipelines import files, load_embedded
from diffsteer.training.acflow import ACFlowTrainer, forward_noised
from diffsteer.training.acflow.conditioning import autocasting
from diffsteer.training.acflow.evaluation import Evaluation
from diffsteer.training.acflow.levels import draw_update
from diffsteer.training.rewards import Brightness, ClassProbability, JpegSize, RewardSet

REWARDS: dict[str, Callable[[], Any]] = {
    "jpeg": JpegSize,
    "class": lambda: ClassProbability("guidance"),
    "brightness": Brightness,
}
PROXY_SAMPLES, PROXY_LEVELS = 50, 4
GROUP = "judged"


def solver() -> Any:
    """DPM-Solver++ 2M on the straight path: near the exact solution in a third of Euler's steps."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")


class Noted:
    """A reward that keeps the score of every image."""

    def __init__(self, reward: Any) -> None:
        self.reward, self.scores = reward, list[float]()

    def __call__(self, images: Any, prompts: Any, metadata: Any) -> Any:
        """Scores."""
        found = self.reward(images, prompts, metadata)
        self.scores += [round(float(score), 6) for score in found]
        return found


def judged(out: Path, *, samples: int, steps: int) -> dict[str, Any] | None:
    """What is known of a folder from before, if it was judged in this very way."""
    path = out / "judged.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found if found["by"] == _judge_of(samples, steps) else None


def judge(trainer: ACFlowTrainer, out: Path, *, samples: int, steps: int) -> dict[str, Any]:
    """Score the averaged weights of ``trainer``; writes ``out/judged.json`` and ten pictures."""
    rewards = {name: Noted(make()) for name, make in REWARDS.items()}
    held_out = {"class": Noted(ClassProbability("evaluation"))}
    evaluation = Evaluation(
        trainer.sampler, trainer.prompts, samples, steps, trainer.config.sample_batch, 1.0,
        RewardSet(rewards), RewardSet(held_out), EvalSuite(["fd", "diversity"]),
        trainer.accelerator,
    )  # fmt: skip
    trainer.pipe.scheduler = solver()
    learner = trainer.learner
    with learner.policy.holding(learner.average()), learner.precision(), torch.no_grad():
        found = evaluation()
        proxy = w2_proxy(trainer, steps)
    for index, image in enumerate(found.images[:10]):
        files.write_png(out / GROUP / f"{index:02d}.png", image)
    result = {
        "by": _judge_of(samples, steps),
        "scores": found.scores | {"w2_proxy": proxy},
        "images": {f"reward/{name}": reward.scores for name, reward in rewards.items()}
        | {f"held_out/{name}": reward.scores for name, reward in held_out.items()},
    }
    files.write_json(out / "judged.json", result)
    return result


def w2_proxy(trainer: ACFlowTrainer, steps: int) -> float:
    """Mean ``|v - v_ref|^2`` on noised samples of the policy, as weighted by level as in training.

    Up to a factor of the Lipschitz constant it bounds the squared Wasserstein-2 distance.
    """
    base = load_embedded(device=trainer.accelerator.device).transformer
    prompts = [trainer.prompts[i % len(trainer.prompts)] for i in range(PROXY_SAMPLES)]
    seeds = [(1 << 41) + i for i in range(PROXY_SAMPLES)]
    _, seen = trainer.sampler(prompts, seeds, steps=steps)
    clean = seen.clean.float()
    draw = draw_update(tuple(clean.shape), PROXY_LEVELS, seed=0, device=clean.device)
    draw = draw.part(0, len(clean))
    x = forward_noised(clean.repeat_interleave(PROXY_LEVELS, 0), draw.noise, draw.sigma)
    rows = [i for i in range(len(clean)) for _ in range(PROXY_LEVELS)]
    cond, model = seen.cond.take(rows), trainer.learner.model
    narrow = torch.bfloat16 if trainer.config.precision == "bf16" else None
    with autocasting(base, narrow):
        reference = model.velocity(base, x, draw.sigma, cond)
    gap = model.velocity(trainer.learner.policy.module, x, draw.sigma, cond) - reference
    weight = model.level_weight(draw.sigma)
    square = gap.square().flatten(1).mean(1)
    return float((square if weight is None else weight * square).mean())


def pictures(out: Path) -> list[Image.Image]:
    """The ten pictures of a judged folder."""
    found = []
    for path in sorted((out / GROUP).glob("*.png")):
        with Image.open(path) as image:
            found.append(image.copy())
    return found


def _judge_of(samples: int, steps: int) -> dict[str, Any]:
    classifier = load_classifier("evaluation").id
    kind = type(solver()).__name__
    return {"samples": samples, "steps": steps, "solver": kind, "classifier": classifier}
