"""What AC-Flow holds, and what an update adds to it."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer.training.acflow.learner import Learner


def held(*things: Any) -> int:
    """Bytes of modules, optimizers and averages."""
    total = 0
    for thing in things:
        if isinstance(thing, nn.Module):
            tensors = [*thing.parameters(), *thing.buffers()]
        elif isinstance(thing, torch.optim.Optimizer):
            tensors = [v for row in thing.state.values() for v in row.values()]
        else:
            tensors = list((thing or {}).values())
        total += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    return total


def alive() -> int:
    """Bytes of all tensors that there are, each storage once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def primed(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """With the state that its first step makes."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def report_held(learner: Learner) -> None:
    """What is held before the first sample: the base weights once."""
    module, critic = learner.policy.module, learner.critic
    adapters = learner.policy.parameters
    base = held(module) - sum(p.numel() * p.element_size() for p in adapters)
    print("| held before the first sample | parameters, millions | MB |\n|---|---|---|")
    count = sum(p.numel() for p in module.parameters()) - sum(p.numel() for p in adapters)
    print(f"| base weights | {count / 1e6:.1f} | {base / 1e6:.1f} |")
    extra = {"adapters": adapters, "critic": critic.parameters if critic else []}
    for name, parameters in extra.items():
        size = sum(p.numel() * p.element_size() for p in parameters)
        print(f"| {name} | {sum(p.numel() for p in parameters) / 1e6:.2f} | {size / 1e6:.1f} |")
    print(f"| all tensors of the process | | {alive() / 1e6:.1f} |\n")
