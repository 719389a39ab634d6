"""What a run of evolution may be asked to do."""

from __future__ import annotations

from collections.abc import Iterable

from .forward import MODES
from .layers import Layer
from .shaping import SHAPINGS

__all__ = ["check_choices", "check_population", "check_rank"]


def check_choices(mode: str, fitness_shaping: str) -> None:
    """Raise ValueError for an unknown name."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if fitness_shaping not in SHAPINGS:
        raise ValueError(
            f"fitness_shaping must be one of {', '.join(SHAPINGS)}, got {fitness_shaping!r}"
        )


def check_population(population: int, batch: int | None, antithetic: bool) -> None:
    """Raise ValueError for a population or batch that cannot be had, or that splits pairs."""
    if population < 2:
        raise ValueError(f"population_size must be at least 2, got {population}")
    if antithetic and population % 2:
        raise ValueError(
            f"population_size {population} is odd: antithetic pairs need an even one "
            "(or antithetic=False)"
        )
    if batch is not None and batch < 1:
        raise ValueError(f"member_batch_size must be at least 1, got {batch}")
    if antithetic and batch is not None and batch > 1 and batch % 2:
        raise ValueError(
            f"member_batch_size {batch} splits pairs over batches, which would draw their noise "
            "twice; make it even"
        )


def check_rank(rank: int, layers: Iterable[Layer]) -> None:
    """Raise ValueError if a matrix has no room for ``rank``."""
    for layer in layers:
        smaller = min(layer.rows, layer.columns)
        if rank > smaller:
            raise ValueError(
                f"rank {rank} is larger than {layer.name} has room for, whose matrix is "
                f"{layer.rows} x {layer.columns}: lower the rank to {smaller} or exclude the layer"
            )
