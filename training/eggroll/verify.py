"""Whether members keep to their rows: a batch of members against two of them by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .forward import perturbed, rows_of_call
from .layers import Layer
from .noise import NoiseFormat

__all__ = ["check_rows_apart", "first_call"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
_APART = 0.1  # of what noise does to a row; the same arithmetic differs by rounding at most
_NOISE = 0.25  # of the weights' own size: far above rounding, whatever the sigma of the run


@contextmanager
def first_call(model: nn.Module) -> Iterator[list[Call]]:
    """The arguments of the first call of ``model`` inside the block, once there was one."""
    seen: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.append((args, dict(kwargs)))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def check_rows_apart(
    model: nn.Module,
    call: Call,
    members: Sequence[int],
    *,
    noise: NoiseFormat,
    sigma: float,
    rows_per_member: int | None,
    layers: Mapping[str, Layer],
) -> None:
    """Refuse a model that reorders or mixes the rows of its batch.

    The whole batch is computed by the first and by the last member alone; in their own rows these
    must come to what the batch of all members comes to. The noise is made large enough for rounding
    not to matter.

    Args:
        model: the network.
        call: its arguments, with rows for all ``members``.
        members: as in ``perturbed``.
        noise: as in ``perturbed``.
        sigma: of the run.
        rows_per_member: as in ``perturbed``.
        layers: as in ``perturbed``.

    Raises:
        ValueError: a member's rows hold something else than the member computes by itself.
    """
    squares = [layer.module.weight.detach().float().square().mean() for layer in layers.values()]
    size = max(sigma, _NOISE * float(torch.stack(squares).mean().sqrt()))

    def output(who: Sequence[int], rows: int | None) -> Tensor | None:
        options = {"noise": noise, "step": 0, "sigma": size, "layers": layers}
        with perturbed(model, who, rows_per_member=rows, **options):  # type: ignore[arg-type]
            return _rows(model(*call[0], **call[1]), rows_of_call(*call))

    pair = (members[0], members[-1])
    found = [output(members, rows_per_member), *(output([m], None) for m in pair)]
    together, *alone = [tensor for tensor in found if tensor is not None] or [torch.empty(0)]
    if len(alone) < 2:
        return  # the output has no rows
    noise_does = float((alone[0] - alone[1]).norm()) / (2 * len(together)) ** 0.5
    for place, member, own in zip((0, len(members) - 1), pair, alone, strict=True):
        mine = _rows_of(place, len(members), len(together), rows_per_member)
        apart = float((together[mine] - own[mine]).norm(dim=1).max())
        if apart > _APART * noise_does:
            raise ValueError(
                f"{type(model).__name__} does not keep the rows of its batch in order: one of "
                f"member {member} differs from what it computes by itself by "
                f"{apart / noise_does:.0%} of what noise does to a row. Exclude the layers that "
                "see rows in another order, or use mode='materialize'"
            )


def _rows_of(place: int, members: int, rows: int, rows_per_member: int | None) -> list[int]:
    """The rows of the member at ``place``, in all copies."""
    each = rows // members if rows_per_member is None else rows_per_member
    starts = range(place * each, rows, members * each)
    return [row for start in starts for row in range(start, start + each)]


def _rows(output: Any, rows: int) -> Tensor | None:
    """The first tensor of an output that has a row for each of the batch."""
    leaves = tree_leaves(dict(output) if isinstance(output, dict) else output)
    found = (x for x in leaves if isinstance(x, Tensor) and x.dim() > 0 and len(x) == rows)
    tensor = next(found, None)
    return None if tensor is None else tensor.float().reshape(rows, -1)
