"""What ranks tell each other about their members: all scores, or one byte for each pair."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from .byte_code import decode_differences, encode_differences, shape_differences, spread_of
from .config import EggrollConfig
from .noise import BASELINE
from .shaping import Shaped, shape_fitness

__all__ = ["Messages"]

SPREAD = "<f"  # before the differences of one rank: the mean square of its scores
SPREAD_SIZE = struct.calcsize(SPREAD)


class Messages:
    """Encodes and decodes the scores of a generation.

    Groups of members that are sampled together go to the ranks in turn, so that the groups, and
    with them the rounding of every score, do not depend on the number of ranks: as long as none
    would go without, for which the trainer makes groups smaller.

    Args:
        config: the settings.
        ranks: how many there are.
        group: members of a group; even where they come in pairs.
    """

    def __init__(self, config: EggrollConfig, ranks: int, group: int) -> None:
        self.config, self.ranks, self.group = config, ranks, group

    def members(self, rank: int) -> list[int]:
        """What a rank evaluates; the baseline member, if wanted, comes last on rank 0."""
        size, group = self.config.population_size, self.group
        starts = range(rank * group, size, self.ranks * group)
        mine = [m for start in starts for m in range(start, min(start + group, size))]
        return [*mine, BASELINE] if self.config.baseline and rank == 0 else mine

    def encode(self, table: Tensor) -> bytes:
        """The scores of a rank's members, (members, prompts), NaN where there is none."""
        if self.config.wire == "scores":
            return table.to(torch.float32).contiguous().numpy().tobytes()
        return struct.pack(SPREAD, spread_of(table)) + encode_differences(_differences(table))

    def shaped(self, bodies: Sequence[bytes], columns: int) -> tuple[Shaped, Tensor]:
        """The weights of all members, and their mean scores, (N,), NaN where they are not known.

        The same on every rank: a function of the messages alone. A rank whose message is empty or
        has another size than its members is missing.

        Args:
            bodies: one of each rank.
            columns: prompts, Q.
        """
        config = self.config
        if config.wire == "byte":
            values, count, deviation = shape_differences(*self._pairs(bodies))
            return Shaped(values, count, deviation), torch.full(
                (config.population_size,), torch.nan
            )
        table = torch.full((config.population_size, columns), float("nan"))
        baseline = None
        for rank, body in enumerate(bodies):
            members = self.members(rank)
            if len(body) != 4 * len(members) * columns or not members:
                continue
            rows = torch.frombuffer(bytearray(body), dtype=torch.float32).view(-1, columns)
            if members[-1] == BASELINE:
                members, baseline, rows = members[:-1], rows[-1], rows[:-1]
            table[members] = rows
        if baseline is not None and not bool(baseline.isfinite().all()):
            baseline = None  # it failed: the members' mean will do
        table = table.masked_fill(table.isinf(), float("nan"))
        found = shape_fitness(
            table, method=config.fitness_shaping, antithetic=config.antithetic, baseline=baseline
        )
        return found, table.nanmean(1)

    def _pairs(self, bodies: Sequence[bytes]) -> tuple[Tensor, float]:
        """The differences of all pairs, NaN where there is none, and the mean square of scores."""
        pairs = torch.full((self.config.population_size // 2,), float("nan"), dtype=torch.float64)
        squares, seen = 0.0, 0
        for rank, body in enumerate(bodies):
            members = self.members(rank)
            if not members or len(body) != SPREAD_SIZE + 4 + len(members) // 2:
                continue
            (spread,) = struct.unpack(SPREAD, body[:SPREAD_SIZE])
            found = decode_differences(body[SPREAD_SIZE:])
            known = int(found.isfinite().sum())
            if math.isfinite(spread) and known:
                pairs[[member // 2 for member in members[::2]]] = found
                squares, seen = squares + known * spread, seen + known
        return pairs, squares / max(1, seen)


def _differences(table: Tensor) -> Tensor:
    """Mean over prompts of the difference in each pair, (P,), NaN where no prompt has both.

    A prompt without both scores counts as zero, as in `shape_fitness`.
    """
    found = table[0::2].double() - table[1::2].double()
    return (found.nansum(1) / table.shape[1]).where(found.isfinite().any(1), float("nan"))
