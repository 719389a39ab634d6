"""Per-sample tensors of all ranks on every rank, of any lengths, also none."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .features import FeatureSet


def gathered(mine: FeatureSet) -> FeatureSet:
    """The samples of all ranks, in rank order; ``mine`` itself without a process group.

    Rows travel as CPU tensors over gloo, or through the current device over NCCL, which has no CPU
    collectives.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mine
    world = dist.get_world_size()
    sizes: list[tuple[int, dict[str, int]]] = [(0, {})] * world
    dist.all_gather_object(sizes, (len(mine), {n: t.shape[1] for n, t in mine.taps.items()}))
    widths: dict[str, int] = {}
    for count, found in sizes:
        if count:
            widths = widths or found
            if found != widths:
                raise ValueError(f"ranks use different extractors: {widths} and {found}")
    counts = [count for count, _ in sizes]
    if not any(counts):
        return mine
    empty = len(mine) == 0
    taps = {
        name: _rows(torch.empty(0, width) if empty else mine.taps[name], counts)
        for name, width in widths.items()
    }
    return FeatureSet(
        taps,
        _rows(mine.keys, counts),
        _rows(mine.labels, counts),
        _rows(mine.index, counts),
        _rows(mine.colour, counts),
    )


def _rows(mine: Tensor, counts: list[int]) -> Tensor:
    """All ranks' rows of one tensor; ranks pad to the longest: collectives want equal shapes."""
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    padded = torch.zeros(max(counts), *mine.shape[1:], dtype=mine.dtype, device=device)
    padded[: len(mine)] = mine.to(device)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count].cpu() for part, count in zip(parts, counts, strict=True)])
