"""Linear and convolution layers that add ``(x B) A^T`` of each member to what they compute."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Layout", "Site", "lowrank_class"]


@dataclass
class Layout:
    """How the rows of a batch belong to members: (copies, members, rows of a member), flattened.

    Attributes:
        members: how many members.
        rows: rows of the batch, copies included; None until the model has been called, or where
            ``copies`` was given.
        copies: how often the batch is repeated (2: classifier-free guidance in one batch).
    """

    members: int
    rows: int | None = None
    copies: int = 1


@dataclass
class Site:
    """What one layer adds.

    Attributes:
        name: of the layer.
        layout: of the batch, shared by all layers.
        a: A^T of each member with sign and scale in it, (M, r, m).
        b: B^T of each member, (M, r, n).
        bias: what each member's bias differs by, (M, m), or None.
        called: whether the layer has computed anything.
    """

    name: str
    layout: Layout
    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    called: bool = False


class _LowRank(nn.Module):
    """Mixed into the class of a layer while members are evaluated; what was there still runs."""

    _eggroll: Site

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = super().forward(*args, **kwargs)
        x, site = (args[0] if args else kwargs["input"]), self._eggroll
        site.called = True
        check_rows(site, x, batched=x.dim() >= (4 if isinstance(self, nn.Conv2d) else 2))
        if isinstance(self, nn.Conv2d):
            return _add_to_convolution(self, site, x, output)
        return _add_to_linear(site, x, output)


@cache
def lowrank_class(kind: Any) -> type[nn.Module]:
    """The subclass of ``kind`` whose forward adds the low-rank terms."""
    return type(f"LowRank{kind.__name__}", (_LowRank, kind), {"__module__": kind.__module__})


def check_rows(site: Site, x: Tensor, *, batched: bool) -> None:
    """Raise ValueError where the rows of ``x`` cannot be told apart by member."""
    layout = site.layout
    unit = layout.members * layout.copies if layout.rows is None else layout.rows
    if not batched or x.shape[0] % unit:
        raise ValueError(
            f"{site.name} got an input of shape {tuple(x.shape)}: its first dimension must be a "
            f"multiple of the {unit} rows of the batch ({layout.members} members), so that each "
            "row belongs to one member. Layers that see an input shared by all members, or one in "
            "another order, must be excluded (or use mode='materialize')"
        )


def _add_to_linear(site: Site, x: Tensor, output: Tensor) -> Tensor:
    a, b, bias = _repeat(site, site.layout.copies, 1, output.dtype)
    groups = a.shape[0]
    if not output.is_contiguous():
        output = output.contiguous()
    inputs = x.reshape(groups, -1, x.shape[-1]).to(output.dtype)
    result = output.view(groups, -1, output.shape[-1])
    # In place: the base product is read and written once more, and nothing else of its size exists.
    result.baddbmm_(torch.bmm(inputs, b.transpose(1, 2)), a)
    if bias is not None:
        result.add_(bias[:, None])
    return output


def _add_to_convolution(conv: nn.Conv2d, site: Site, x: Tensor, output: Tensor) -> Tensor:
    per_member = x.shape[0] // (site.layout.members * site.layout.copies)
    a, b, bias = _repeat(site, site.layout.copies, per_member, output.dtype)
    hidden = _through_kernels(conv, site, x.to(output.dtype), b)
    rows, groups = x.shape[0], conv.groups
    # One product for each row and group of channels: (O / groups, r) by (r, pixels).
    left = a.transpose(1, 2).reshape(rows * groups, -1, a.shape[1])
    right = hidden.reshape(rows * groups, a.shape[1], -1)
    if output.is_contiguous():
        output.view(rows * groups, left.shape[1], -1).baddbmm_(left, right)
    else:  # channels last
        output.add_(torch.bmm(left, right).view(output.shape))
    if bias is not None:
        output.add_(bias[..., None, None])
    return output


def _through_kernels(conv: nn.Conv2d, site: Site, x: Tensor, b: Tensor) -> Tensor:
    """``x`` through the kernels of its rows' members: (rows, groups * r, pixels)."""
    if _pointwise(conv):
        return torch.bmm(b, x.flatten(2))
    members, copies, groups, rank = site.layout.members, site.layout.copies, conv.groups, b.shape[1]
    padding: str | int | tuple[int, ...] = conv.padding
    if conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    # Members become groups of channels: (copies, M, K, I, ...) -> (copies * K, M * I, ...).
    stacked = x.reshape(copies, members, -1, *x.shape[1:]).transpose(1, 2)
    inputs = stacked.reshape(-1, members * x.shape[1], *x.shape[2:])
    kernels = site.b.to(x.dtype).view(members, 1, rank, -1, *conv.kernel_size)
    kernels = kernels.expand(-1, groups, -1, -1, -1, -1).flatten(0, 2)
    hidden = F.conv2d(
        inputs, kernels, None, conv.stride, padding, conv.dilation, groups=members * groups
    )
    hidden = hidden.view(copies, -1, members, groups * rank, hidden.shape[-2] * hidden.shape[-1])
    return hidden.transpose(1, 2).flatten(0, 2)


def _pointwise(conv: nn.Conv2d) -> bool:
    plain = conv.groups == 1 and conv.padding in ((0, 0), "valid", "same")
    return plain and conv.kernel_size == (1, 1) and conv.stride == (1, 1)


def _repeat(
    site: Site, copies: int, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The terms of each of (copies, members, rows), the first dimension flattened."""

    def spread(tensor: Tensor) -> Tensor:
        tensor = tensor.to(dtype)
        if copies == rows == 1:
            return tensor
        shape = (copies, tensor.shape[0], rows, *tensor.shape[1:])
        return tensor[None, :, None].expand(shape).flatten(0, 2)

    return spread(site.a), spread(site.b), None if site.bias is None else spread(site.bias)
