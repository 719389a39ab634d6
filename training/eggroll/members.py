"""Sample images by many members at once, and score them while the next ones are sampled."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...core.noise import seeded_generators
from ..pipeline_calls import check_call, guidance_arguments, pipeline_images
from ..prompts import call_inputs
from ..rewards import RewardPool, RewardScores, RewardSet
from .config import EggrollConfig
from .noise import BASELINE
from .optimizer import Eggroll
from .questions import Questions

__all__ = ["MemberSampler", "Scored"]

logger = logging.getLogger(__name__)
WAITING = 2  # batches of images that may wait for their scores


@dataclass
class Scored:
    """What members got.

    Attributes:
        table: (members, prompts) float32, NaN where there is no score.
        scores: of all their images, or None if there were no members.
    """

    table: Tensor
    scores: RewardScores | None


@dataclass
class MemberSampler:
    """Calls a pipeline whose denoiser is that of several members at once.

    Args:
        pipe: any diffusers pipeline that denoises in a loop.
        eggroll: of its denoiser.
        rewards: what to score by.
        config: batch sizes, steps, guidance.
        call: further arguments of the pipeline's call.

    Raises:
        ValueError: the pipeline does not take the arguments.
    """

    pipe: Any
    eggroll: Eggroll
    rewards: RewardSet
    config: EggrollConfig
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the call before anything is sampled."""
        check_call(self.pipe, self.call)
        guidance_arguments(self.pipe, self.config.guidance_scale, 1)
        self.limit: int | None = None  # members at once, once memory has run out

    def evaluate(self, members: Sequence[int], questions: Questions) -> Scored:
        """Ask every member everything.

        Scores are averaged over the images of a prompt; a member has none at a prompt where an
        image has none.

        Raises:
            torch.OutOfMemoryError: even one image of one member does not fit.
        """
        rows = torch.full((len(members), len(questions)), float("nan"))
        waiting: deque[tuple[Any, Future[RewardScores]]] = deque()
        found: list[RewardScores] = []

        def collect(most: int) -> None:
            while len(waiting) > most:
                (place, columns), future = waiting.popleft()
                found.append(future.result())
                rows[place, columns] = found[-1].total.view(place.stop - place.start, -1)

        with RewardPool(self.rewards, workers=self.config.reward_workers) as pool:
            for place, columns, images in self._images(members, questions):
                asked = questions.part(columns).prompts * (place.stop - place.start)
                texts, notes = [p.text for p in asked], [p.metadata for p in asked]
                waiting.append(((place, columns), pool.submit(images, texts, notes)))
                collect(WAITING)
            collect(0)
        table = rows.view(len(members), questions.columns, questions.repeats).mean(2)
        return Scored(table, RewardScores.cat(found) if found else None)

    @torch.no_grad()
    def sample(self, members: Sequence[int] | None, questions: Questions) -> Tensor:
        """Images (members x questions, 3, H, W) in [0, 1], member-major; in one call.

        None for the members samples from the mean parameters, with nothing in their way.
        """
        many = [BASELINE] if members is None else members
        count = len(many) * len(questions)
        arguments = {
            **guidance_arguments(self.pipe, self.config.guidance_scale, count),
            **call_inputs(self.pipe, questions.prompts * len(many)),
            "generator": seeded_generators(self._seeds(members, questions)),
            "num_inference_steps": self.config.sample_steps,
            "output_type": "pt",
            **self.call,
        }
        inside = (
            nullcontext()
            if members is None
            else self.eggroll.perturbed(members, rows_per_member=len(questions))
        )
        with inside:
            return pipeline_images(self.pipe(**arguments), count)

    def group_size(self, questions: int) -> int:
        """Members at once, an even number where they come in pairs."""
        config = self.config
        if config.mode == "materialize":
            return 1
        size = config.member_batch_size or max(1, config.images_per_call // questions)
        size = min(size, config.population_size, self.limit or size)
        return max(2, size - size % 2) if config.antithetic and size > 1 else size

    def _images(
        self, members: Sequence[int], questions: Questions
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Batches: which members, which questions, their images; smaller where memory runs out."""
        start = 0
        while start < len(members):
            group = list(members[start : start + self.group_size(len(questions))])
            width = max(1, self.config.images_per_call // len(group))
            try:
                parts = [
                    (slice(first, min(first + width, len(questions))))
                    for first in range(0, len(questions), width)
                ]
                for columns in parts:
                    images = self.sample(group, questions.part(columns))
                    yield slice(start, start + len(group)), columns, images
                start += len(group)
            except torch.OutOfMemoryError:
                self._shrink(len(group))

    def _shrink(self, size: int) -> None:
        if size == 1:
            raise torch.OutOfMemoryError(
                "one member alone does not fit into memory; lower images_per_call"
            )
        self.limit = max(1, size // 2)
        logger.warning("out of memory with %d members at once; going on with %d", size, self.limit)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _seeds(self, members: Sequence[int] | None, questions: Questions) -> list[int]:
        if members is None:
            return questions.seeds
        if self.config.common_noise or not questions.key:
            return questions.seeds * len(members)
        sources = [self.eggroll.noise.source(member)[0] for member in members]
        return [seed for source in sources for seed in questions.own_seeds(source)]
