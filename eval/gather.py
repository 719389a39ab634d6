"""Per-sample tensors of all ranks on every rank, of any lengths, also none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .features import FeatureSet
from .moments import Moments


def gathered(mine: FeatureSet) -> FeatureSet:
    """The samples of all ranks, in rank order; ``mine`` itself without a process group.

    Rows travel as CPU tensors over gloo, or through the current device over NCCL, which has no CPU
    collectives.
    """
    world = world_size()
    if world == 1:
        return mine
    kinds = {name: (tap.shape[1], tap.dtype) for name, tap in mine.taps.items()}
    found: list[tuple[int, dict[str, tuple[int, torch.dtype]]]] = [(0, {})] * world
    dist.all_gather_object(found, (len(mine), kinds))
    counts = [count for count, _ in found]
    known = [kinds for count, kinds in found if count]
    if not known:
        return mine
    if any(kinds != known[0] for kinds in known):
        raise ValueError(f"ranks use different extractors or scorers: {known}")
    taps = {
        name: _rows(mine.taps[name] if len(mine) else torch.empty(0, width, dtype=dtype), counts)
        for name, (width, dtype) in known[0].items()
    }
    return FeatureSet(taps, *(_rows(column, counts) for column in mine.columns))


def gathered_moments(mine: dict[str, Moments]) -> dict[str, Moments]:
    """Moments of all ranks' samples by name, the same on every rank; a rank may have none."""
    if world_size() == 1:
        return mine
    names: list[dict[str, int]] = [{}] * world_size()
    dist.all_gather_object(names, {name: sums.dim for name, sums in mine.items()})
    merged = {}
    for name, dim in {k: v for found in names for k, v in found.items()}.items():
        row = mine.get(name, Moments.zero(dim)).packed()[None]
        rows = _rows(row, [1] * len(names))
        merged[name] = Moments.merge(Moments.unpacked(row) for row in rows)
    return merged


@dataclass(frozen=True)
class Share:
    """The part of a pass over rows that one rank does, and how the ranks' parts come together.

    All ranks must take part. The default is one process doing everything.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def of_this_rank(cls) -> Share:
        """This rank's share in the process group; everything without one."""
        return cls(dist.get_rank(), dist.get_world_size()) if world_size() > 1 else cls()

    def rows(self, count: int) -> range:
        """This rank's block of ``count`` rows."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks: of counts, or of values that are zero on all ranks but one."""
        return self._reduced(values, dist.ReduceOp.SUM) if self.world > 1 else values

    def anywhere(self, values: Tensor) -> Tensor:
        """Where any rank has True."""
        if self.world == 1:
            return values
        return self._reduced(values.to(torch.uint8), dist.ReduceOp.MAX).bool()

    def _reduced(self, values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        shared = values.contiguous().to(device, copy=True)
        dist.all_reduce(shared, how)
        return shared.to(values.device)


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rows(mine: Tensor, counts: list[int]) -> Tensor:
    """All ranks' rows of one tensor; ranks pad to the longest: collectives want equal shapes."""
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    padded = torch.zeros(max(counts), *mine.shape[1:], dtype=mine.dtype, device=device)
    padded[: len(mine)] = mine.to(device)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count].cpu() for part, count in zip(parts, counts, strict=True)])
