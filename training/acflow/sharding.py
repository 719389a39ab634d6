"""Weights that are cut over the ranks by FSDP2; without it all this leaves things as they are.

Between two passes of a network its parameters are shards, so averages, optimizers and copies of
them are shards too. Only what is written or read is whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

__all__ = ["is_sharded", "launch_kind", "load_optimizer", "placed", "prepare", "whole"]

T = TypeVar("T")


def launch_kind(accelerator: Any) -> str:
    """What accelerate was launched with: "NO", "MULTI_GPU", "FSDP", "DEEPSPEED" ..."""
    return str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))


def is_sharded(accelerator: Any) -> bool:
    """Whether a launch cuts weights over the ranks."""
    return bool(getattr(accelerator, "is_fsdp2", False))


def prepare(accelerator: Any, modules: Sequence[nn.Module]) -> Callable[..., Any]:
    """Ready networks for several ranks; returns what to call where gradients are wanted.

    Under FSDP2 they are cut in place, and hold shards alone between two passes, whatever
    ``reshard_after_forward`` says: averages and checkpoints read them there.

    Args:
        accelerator: accelerate's.
        modules: the trained network first, then those that are frozen.
    """
    trained, *frozen = modules
    if not is_sharded(accelerator):
        runner: Callable[..., Any] = accelerator.prepare_model(trained)
        return runner
    from accelerate.utils import fsdp2_prepare_model

    name = type(trained).__name__
    # Each rank has read the weights. To send them again fails where a model has buffers.
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    # accelerate cuts a model with its optimizer only; the real one is made of the shards later.
    parameters = [p for p in trained.parameters() if p.requires_grad]
    accelerator.prepare(trained, torch.optim.SGD(parameters))
    for module in frozen:
        fsdp2_prepare_model(accelerator, module)
    at_once, *_ = [_rest_as_shards(module) for module in modules]
    if at_once > 0.9 and accelerator.is_main_process:
        warnings.warn(
            f"FSDP gathers {at_once:.0%} of {name} at once, so a pass needs room for all its "
            "weights; to gather block by block set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP "
            "and fsdp_transformer_layer_cls_to_wrap: the class of a block",
            stacklevel=2,
        )
    return trained


def whole(tree: T, *, keep: bool = True) -> T:
    """``tree`` with whole tensors, in the main memory, for shards; every rank calls it together.

    Args:
        tree: nested containers of anything.
        keep: whether this rank wants them; else None stands in their place.
    """

    def gathered(value: Any) -> Any:
        if not hasattr(value, "full_tensor"):
            return value
        full = value.detach().full_tensor()
        return full.cpu() if keep else None

    found: T = tree_map(gathered, tree)
    return found


def placed(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's shards of whole tensors; those that belong to no shard are left as they are.

    Args:
        values: the same on every rank, by name.
        like: what they are to be laid out as; a value of another name or shape is not touched.
    """
    return {name: _cut(value, like.get(name)) for name, value in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`torch.optim.Optimizer.load_state_dict` with whole tensors, whatever the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shards = {
        index: placed(values, dict.fromkeys(values, parameters[index]))
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shards})


def _cut(value: Any, like: Any) -> Any:
    if not hasattr(like, "full_tensor") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank=None: each rank cuts its own copy, and nothing is sent.
    cut = distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
    return cut.clone()  # the cut may be a view, which would keep the whole


def _rest_as_shards(module: nn.Module) -> float:
    """Let nothing of ``module`` stay whole after a pass; the share of it that no block gathers.

    FSDP2 keeps the outermost part for a backward pass, which after sampling never comes.
    """
    units: list[Any] = [part for part in module.modules() if hasattr(part, "reshard")]

    def rest(module: nn.Module, inputs: Any, output: Any) -> None:
        for unit in units:
            unit.reshard()

    module.register_forward_hook(rest)
    blocks = {p for unit in units if unit is not module for p in unit.parameters()}
    everything = list(module.parameters())
    left = sum(p.numel() for p in everything if p not in blocks)
    return left / sum(p.numel() for p in everything)
