"""Evaluate members of a population: many in one batch, or one at a time with explicit weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.tensors import send
from .layers import Layer, check_layers, find_layers, unwrap
from .lowrank import Layout, Site, lowrank_class
from .noise import NoiseFormat, bias_noise, pair_factors

__all__ = ["MODES", "member_deltas", "perturbed", "rows_of_call"]

MODES = ("lowrank", "materialize")


@contextmanager
def perturbed(
    model: nn.Module,
    members: Sequence[int],
    *,
    noise: NoiseFormat,
    step: int,
    sigma: float,
    rows_per_member: int | None,
    layers: Mapping[str, Layer] | None = None,
    mode: str = "lowrank",
    copies: int | None = None,
) -> Iterator[None]:
    """Inside this context ``model`` computes each row of its batch with the weights of its member.

    The rows of a batch are member-major: all rows of ``members[0]``, then those of ``members[1]``,
    ... With classifier-free guidance in one batch the whole is there twice: [unconditional rows of
    all members, conditional rows of all members]. Member i computes with ``W + sigma * E_i``, where
    ``E_i = A_i B_i^T / sqrt(rank)``: the product with W is shared, ``(x B_i) A_i^T`` is added.
    (Eggroll, arXiv 2511.16652, section 4; there in JAX for one row a member.) Gradients are off.

    Args:
        model: the module that is called inside; where a pipeline calls a compiled or wrapped
            module, that one.
        members: member numbers, in the order of the rows; BASELINE (-1) has no noise.
        noise: which noise.
        step: of the run: which directions.
        sigma: deviation of each weight's perturbation. 0: the model is not touched at all.
        rows_per_member: rows of the batch for each member, copies for guidance not counted; they
            are then inferred at each call of ``model``. None: no copies, as many rows as there are.
        layers: from ``find_layers``; None finds every Linear and Conv2d.
        mode: "lowrank"; or "materialize", for one member at a time and any kind of module, which
            swaps in explicit weights and afterwards the very tensors that were there.
        copies: states the copies instead of inferring them; needed after ``model.compile()``.

    Raises:
        ValueError: an argument is out of range; the model is in training mode or cannot keep rows
            apart (see ``check_layers``); a batch or a layer's input does not divide by members; at
            the end, a layer took no part in the forward pass.
    """
    layers = find_layers(model) if layers is None else layers
    _check_arguments(members, sigma, rows_per_member, mode, copies)
    check_layers(model, layers, lowrank=mode == "lowrank")
    with torch.no_grad():
        if sigma == 0:
            yield
        elif mode == "materialize":
            with _explicit_weights(members[0], layers, noise, step, sigma):
                yield
        else:
            layout = Layout(len(members), copies=copies or 1)
            with ExitStack() as stack:
                if copies is None:
                    stack.enter_context(_watching(model, layout, rows_per_member))
                sites = {
                    name: _site(layer, members, noise, step, sigma, layout)
                    for name, layer in layers.items()
                }
                stack.enter_context(_swapped(layers, sites))
                yield
            _refuse_idle(layout, sites)


def member_deltas(
    layer: Layer, member: int, noise: NoiseFormat, step: int, sigma: float
) -> dict[str, Tensor]:
    """What ``member`` adds to the parameters of ``layer``, ``sigma * E``, in their own shapes.

    Computed in float32, or float64 where the weight is.
    """
    pair, sign = noise.source(member)
    weight = layer.module.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    where: dict[str, Any] = {"device": weight.device, "dtype": dtype}
    a, b = pair_factors(noise, layer, [pair], step, **where)
    scale = sign * sigma / math.sqrt(noise.rank)
    deltas = {f"{layer.name}.weight": ((a[0].T * scale) @ b[0]).view(weight.shape)}
    if layer.bias:
        deltas[f"{layer.name}.bias"] = (
            bias_noise(noise, layer, [pair], step, **where)[0] * sign * sigma
        )
    return deltas


def _check_arguments(
    members: Sequence[int], sigma: float, rows: int | None, mode: str, copies: int | None
) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not math.isfinite(sigma) or sigma < 0:
        raise ValueError(f"sigma must be a finite number of at least 0, got {sigma}")
    if not members:
        raise ValueError("members must name at least one member")
    if mode == "materialize" and len(members) != 1:
        raise ValueError(
            f"mode='materialize' evaluates one member at a time, got {len(members)}; loop over them"
        )
    for name, value in (("rows_per_member", rows), ("copies", copies)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _site(
    layer: Layer,
    members: Sequence[int],
    noise: NoiseFormat,
    step: int,
    sigma: float,
    layout: Layout,
) -> Site:
    sources = [noise.source(member) for member in members]
    pairs = sorted({pair for pair, _ in sources})
    weight = layer.module.weight
    where: dict[str, Any] = {"device": weight.device}
    where["dtype"] = torch.promote_types(weight.dtype, torch.float32)
    pick = send([pairs.index(pair) for pair, _ in sources], weight.device)
    signs = send(torch.tensor([sign * sigma for _, sign in sources], dtype=where["dtype"]), **where)
    a, b = pair_factors(noise, layer, pairs, step, **where)
    a = a[pick] * (signs / math.sqrt(noise.rank))[:, None, None]
    bias = None
    if layer.bias:
        bias = (bias_noise(noise, layer, pairs, step, **where)[pick] * signs[:, None]).to(
            weight.dtype
        )
    return Site(layer.name, layout, a.to(weight.dtype), b[pick].to(weight.dtype), bias)


@contextmanager
def _swapped(layers: Mapping[str, Layer], sites: Mapping[str, Site]) -> Iterator[None]:
    """Give the layers their low-rank class, and afterwards their own again."""
    before: list[tuple[Any, type[nn.Module]]] = []
    try:
        for name, layer in layers.items():
            module: Any = layer.module
            if hasattr(module, "_eggroll"):
                raise ValueError(f"{name} is already perturbed: contexts cannot be nested")
            kind: Any = type(module)
            before.append((module, kind))
            module._eggroll = sites[name]
            module.__class__ = lowrank_class(kind)
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind
            del module._eggroll


@contextmanager
def _watching(model: nn.Module, layout: Layout, rows_per_member: int | None) -> Iterator[None]:
    """Before each call of ``model``, see how many rows its batch has."""
    if getattr(unwrap(model), "_compiled_call_impl", None) is not None:
        raise ValueError(
            "the model was compiled in place (model.compile()), so that the rows of its batch "
            "cannot be seen: pass copies=1, or copies=2 where guidance doubles the batch"
        )

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = rows_of_call(args, kwargs)
        unit = layout.members * (rows_per_member or 1)
        if rows % unit:
            kept = "" if rows_per_member is None else f" x {rows_per_member} rows each"
            raise ValueError(
                f"the batch has {rows} rows, which is no multiple of {layout.members} members{kept}"
            )
        layout.rows = rows
        layout.copies = 1 if rows_per_member is None else rows // unit

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def rows_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The rows of the batch that a model is called with.

    Raises:
        ValueError: no argument is a tensor with a batch dimension.
    """
    named = [kwargs[name] for name in ("hidden_states", "sample", "x", "input") if name in kwargs]
    tensors = [t for t in (*named, *args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    first = next(
        (tensor for tensor in tensors if tensor.dim() > 1), tensors[0] if tensors else None
    )
    if first is None:
        raise ValueError(
            "the model was called without a tensor that has a batch dimension; pass copies= to say "
            "how its rows belong to members"
        )
    return first.shape[0]


def _refuse_idle(layout: Layout, sites: Mapping[str, Site]) -> None:
    if not any(site.called for site in sites.values()) and layout.rows is None:
        return  # the model was not called
    idle = [name for name, site in sites.items() if not site.called]
    if idle:
        some = ", ".join(idle[:4]) + (", ..." if len(idle) > 4 else "")
        raise ValueError(
            f"{len(idle)} layers took no part in the forward pass ({some}), so that the fitness "
            "says nothing about them and their weights would wander: exclude them"
        )


@contextmanager
def _explicit_weights(
    member: int, layers: Mapping[str, Layer], noise: NoiseFormat, step: int, sigma: float
) -> Iterator[None]:
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for layer in layers.values():
            deltas = member_deltas(layer, member, noise, step, sigma)
            for name, parameter in layer.parameters():
                before.append((parameter, parameter.data))
                parameter.data = (parameter.data.to(deltas[name].dtype) + deltas[name]).to(
                    parameter.dtype
                )
        yield
    finally:
        for parameter, data in before:  # the very tensors: subtracting would drift
            parameter.data = data
