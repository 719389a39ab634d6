"""Optimizers, and gradients over several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["adam", "add_gradients", "clip_gradients"]


def adam(parameters: Sequence[nn.Parameter], rate: float, decay: float) -> torch.optim.Optimizer:
    """AdamW, fused where the device has it."""
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=fused)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients to a norm of at most ``limit`` over all parameters; the norm before, ()."""
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    # Of shards it is a sum over the ranks that has yet to be made.
    found: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return found


def add_gradients(parameters: Sequence[nn.Parameter], accelerator: Any) -> None:
    """Sum gradients over the ranks, in one message."""
    if accelerator.num_processes == 1:
        return
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in found]), "sum")
    for parameter, part in zip(parameters, flat.split([g.numel() for g in found]), strict=True):
        parameter.grad = part.view_as(parameter)
