"""What the members of a generation are asked for: a pure function of the seed and its number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data import EpochOrder, derive_seed
from ..prompts import Prompt

__all__ = ["Questions", "draw_questions", "fixed_questions"]


@dataclass(frozen=True)
class Questions:
    """The images that every member makes, all those of one prompt in a row.

    Attributes:
        prompts: one an image.
        seeds: of the images' noise.
        repeats: images of each prompt.
        key: what the seeds of single members derive from, where members do not share them.
    """

    prompts: list[Prompt]
    seeds: list[int]
    repeats: int
    key: tuple[int | str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def columns(self) -> int:
        """Number of prompts, Q."""
        return len(self.prompts) // self.repeats

    def part(self, rows: slice) -> Questions:
        """Some of the images."""
        return Questions(self.prompts[rows], self.seeds[rows], self.repeats, self.key)

    def own_seeds(self, direction: int) -> list[int]:
        """Seeds for the members of one direction alone (both members of a pair)."""
        return [derive_seed(*self.key, direction, seed) for seed in self.seeds]


def draw_questions(
    generation: int, prompts: Sequence[Prompt], *, count: int, repeats: int, seed: int
) -> Questions:
    """The questions of a training generation.

    Args:
        generation: from 0.
        prompts: to choose from, each as often as the others.
        count: prompts of a generation; 0 takes all, always.
        repeats: images of each.
        seed: of the run.
    """
    if count == 0 or count >= len(prompts):
        chosen = list(prompts)
    else:
        order = EpochOrder(len(prompts), derive_seed(seed, "prompts"))
        chosen = [prompts[i] for i in order.stretch(generation * count, count).tolist()]
    rows = [prompt for prompt in chosen for _ in range(repeats)]
    seeds = [derive_seed(seed, "image", generation, row) for row in range(len(rows))]
    return Questions(rows, seeds, repeats, (seed, "member", generation))


def fixed_questions(prompts: Sequence[Prompt], *, count: int) -> Questions:
    """``count`` images for evaluation, always the same: prompts in turn, seeds from 0.

    Training never draws these seeds: its own are hashes.
    """
    return Questions([prompts[i % len(prompts)] for i in range(count)], list(range(count)), 1)
