"""Which prompt and seed every sample of an epoch has: a pure function of the seed and the epoch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..data import EpochOrder, derive_seed
from .config import ACFlowConfig

__all__ = ["Plan", "check_split", "epoch_plan"]


@dataclass(frozen=True)
class Plan:
    """The samples of one epoch on all ranks, in the order in which they are trained on.

    Attributes:
        prompts: index of the prompt of each sample.
        seeds: the seed of each sample's noise.
    """

    prompts: list[int]
    seeds: list[int]

    def mine(self, rank: int, ranks: int, updates: int) -> list[int]:
        """The positions that a rank samples and trains on: its equal part of every update."""
        size = len(self.prompts) // updates
        share = size // ranks
        starts = [update * size + rank * share for update in range(updates)]
        return [start + offset for start in starts for offset in range(share)]


def epoch_plan(epoch: int, *, prompts: int, per_epoch: int, repeats: int, seed: int) -> Plan:
    """Draw ``per_epoch`` prompts, repeat each ``repeats`` times, shuffle.

    The prompts come from an endless order of permutations, so each is seen equally often. The same
    plan is drawn on every rank, whatever their number.

    Args:
        epoch: from 0.
        prompts: how many there are.
        per_epoch: prompts of an epoch.
        repeats: images a prompt.
        seed: of the run.
    """
    drawn = EpochOrder(prompts, derive_seed(seed, "prompts")).stretch(epoch * per_epoch, per_epoch)
    repeated = drawn.repeat_interleave(repeats).tolist()
    seeds = [derive_seed(seed, "sample", epoch, index) for index in range(len(repeated))]
    shuffle = torch.Generator().manual_seed(derive_seed(seed, "shuffle", epoch))
    order = torch.randperm(len(repeated), generator=shuffle).tolist()
    return Plan([repeated[i] for i in order], [seeds[i] for i in order])


def check_split(config: ACFlowConfig, ranks: int) -> None:
    """Refuse epochs that do not split evenly over updates, ranks and passes.

    Raises:
        ValueError: with the multiple that is needed.
    """
    updates, accumulate = config.updates_per_epoch, config.accumulate
    parts = updates * ranks * accumulate
    if config.samples % parts:
        raise ValueError(
            f"prompts_per_epoch x images_per_prompt must be a multiple of {parts} "
            f"({updates} updates x {ranks} ranks x {accumulate} passes), got {config.samples}"
        )
