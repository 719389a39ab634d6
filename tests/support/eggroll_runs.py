"""Runs of the EGGROLL trainer on a tiny pipeline: settings, a reward, several ranks as threads."""

from __future__ import annotations

import json
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tiny_flow import tiny_pipeline

from diffsteer.training.eggroll import EggrollConfig, EggrollTrainer, Hub
from diffsteer.training.prompts import class_prompts
from diffsteer.training.rewards import Brightness, RewardSet

SMALL = {
    "steps": 4, "population_size": 8, "sigma": 0.02, "lr": 1.0, "prompts_per_step": 2,
    "member_batch_size": 2, "eval_every": 0, "eval_images": 4, "preview_images": 2, "hash_every": 1,
    "checkpoint_every": 2, "sample_steps": 2,
}  # fmt: skip


def small_config(**changes: Any) -> EggrollConfig:
    return EggrollConfig(**{**SMALL, **changes})


def trainer(out: Path, reward: Any = None, *, pipe: Any = None, **options: Any) -> EggrollTrainer:
    """A trainer on a fresh tiny pipeline (always the same weights), alone unless given a hub.

    Options that are fields of the config change it; the others go to the trainer.
    """
    pipe = tiny_pipeline() if pipe is None else pipe
    names = set(EggrollConfig.__dataclass_fields__)
    config = small_config(**{k: v for k, v in options.items() if k in names})
    others = {k: v for k, v in options.items() if k not in names}
    others.setdefault("hub", Hub())
    rewards = RewardSet({"it": Brightness() if reward is None else reward})
    prompts = others.pop("prompts") if "prompts" in others else class_prompts(pipe, [0, 1, 2])
    return EggrollTrainer(config, pipe, rewards, prompts, out, **others)


def run_ranks(out: Path, ranks: int, *, timeout: float = 0.0, **options: Any) -> list[Any]:
    """Run to the end with every rank in a thread of its own; the trainers, in order of rank."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=60))
    found: list[Any] = [None] * ranks

    def work(rank: int) -> None:
        hub = Hub(store, rank=rank, ranks=ranks, timeout=timeout)
        try:
            found[rank] = trainer(out, hub=hub, **options)
            found[rank].run()
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for result in found:
        if isinstance(result, Exception):
            raise result
    return found


def hash_of(run: EggrollTrainer) -> str:
    return f"{run.eggroll.weights_hash():016x}"


def log_lines(out: Path) -> list[dict[str, Any]]:
    text = (out / "fitness_log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()][1:]
