"""Judge the model during training, on the same prompts and seeds each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...eval.suite import EvalSuite
from ...eval.vendi import mean_cosine_distance
from ..prompts import Prompt
from ..rewards import RewardScores, RewardSet
from .sampling import Sampler

__all__ = ["Evaluation", "Judged", "pixel_diversity"]

SEED = 1 << 40  # evaluation seeds start here: training seeds are hashes and never so regular
SHOWN = 40


@dataclass(frozen=True)
class Judged:
    """What an evaluation found.

    Attributes:
        scores: by name.
        images: the first pictures, in the order of their seeds.
    """

    scores: dict[str, float]
    images: list[Image.Image]


@dataclass
class Evaluation:
    """Samples and scores the model as it is.

    Args:
        sampler: draws.
        prompts: dealt out in turn over the images.
        count: images.
        steps: solver steps.
        batch: images at once.
        guidance_scale: of the pipeline's own guidance.
        rewards: those trained on.
        held_out: rewards that were not trained on, or None.
        suite: metrics of the images, such as ``EvalSuite(["fd", "diversity"])``, or None.
        accelerator: accelerate's; every rank makes its share.
    """

    sampler: Sampler
    prompts: Sequence[Prompt]
    count: int
    steps: int
    batch: int
    guidance_scale: float
    rewards: RewardSet
    held_out: RewardSet | None
    suite: EvalSuite | None
    accelerator: Any

    def __call__(self) -> Judged:
        """Scores, the same on every rank; pictures on the main one."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        mine = list(range(self.count))[rank::ranks]
        if self.suite is not None:
            self.suite.reset(keep_reference=True)
        parts = [self._batch(mine[s : s + self.batch]) for s in range(0, len(mine), self.batch)]
        # Where weights are cut over the ranks, a pass of one needs a pass of each.
        for _ in range(len(parts), -(-self.count // (ranks * self.batch))):
            self._sample([0])
        images = torch.cat([part[0] for part in parts]) if parts else torch.zeros(0, 3, 1, 1)
        found = self._everyone(list(zip(mine, _rows(images), strict=True)))
        scores: dict[str, float] = {}
        scores |= self._means("reward", self.rewards, [part[1] for part in parts])
        if self.held_out is not None:
            held_out = [part[2] for part in parts if part[2] is not None]
            scores |= self._means("held_out", self.held_out, held_out)
        groups = torch.tensor([index % len(self.prompts) for index, _ in found])
        pixels = torch.stack([torch.from_numpy(row) for _, row in found])
        scores |= pixel_diversity(pixels, groups)
        if self.suite is not None:
            self.suite.sync()
            scores |= {name: float(v) for name, v in self.suite.compute().values.items()}
        return Judged(scores, [Image.fromarray(row) for _, row in found[:SHOWN]])

    def _batch(self, index: list[int]) -> tuple[Tensor, RewardScores, RewardScores | None]:
        prompts, images = self._sample(index)
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        if self.suite is not None:
            labels = [p.label for p in prompts]
            given = None if None in labels else torch.tensor(labels)
            self.suite.update(images.cpu(), labels=given)
        held_out = self.held_out.score(images, texts, metadata) if self.held_out else None
        return images.cpu(), self.rewards.score(images, texts, metadata), held_out

    def _sample(self, index: list[int]) -> tuple[list[Prompt], Tensor]:
        prompts = [self.prompts[i % len(self.prompts)] for i in index]
        seeds = [SEED + i for i in index]
        images, _ = self.sampler(
            prompts, seeds, steps=self.steps, guidance_scale=self.guidance_scale
        )
        return prompts, images

    def _everyone(self, rows: list[Any]) -> list[Any]:
        from accelerate.utils import gather_object

        if self.accelerator.num_processes > 1:
            rows = gather_object(rows)
        return sorted(rows, key=lambda row: row[0])

    def _means(self, name: str, rewards: RewardSet, parts: list[RewardScores]) -> dict[str, float]:
        """Mean and standard error of each reward over the images that have one."""
        found = {}
        for key in rewards.weights:
            values = [float(v) for part in parts for v in part.values[key]]
            everyone = torch.tensor(
                [v for _, v in self._everyone(list(enumerate(values)))], dtype=torch.float64
            )
            known = everyone[~everyone.isnan()]
            if len(known):
                found[f"{name}/{key}"] = float(known.mean())
            if len(known) > 1:
                found[f"{name}/{key}_se"] = float(known.std()) / len(known) ** 0.5
        return found


def pixel_diversity(images: Tensor, groups: Tensor) -> dict[str, float]:
    """Mean cosine distance of two centred 16 x 16 thumbnails of a prompt; nothing if none has two.

    Collapse shows in it whatever the pictures are; a distance of learned features says more
    (``EvalSuite(["diversity"])``).

    Args:
        images: uint8 (N, H, W, 3).
        groups: the prompt of each, (N,).
    """
    if int(torch.bincount(groups).max()) < 2:
        return {}
    small = F.interpolate(
        images.permute(0, 3, 1, 2).float() / 127.5 - 1, (16, 16), mode="bilinear", antialias=True
    ).flatten(1)
    return {"pixel_diversity": mean_cosine_distance(small - small.mean(0), groups)}


def _rows(images: Tensor) -> list[np.ndarray[Any, Any]]:
    array = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return list(array)
