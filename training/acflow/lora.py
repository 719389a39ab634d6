"""Low-rank adapters by peft, on any network and saved as diffusers reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import whole

__all__ = ["ATTENTION", "add_lora", "lora_layers", "lora_state", "merged_state"]

# The projections of attention under the names that diffusers' models use: Flow-GRPO's choice.
ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)
ADAPTER = "default"


def add_lora(
    module: nn.Module, *, rank: int, alpha: float, targets: Sequence[str] = (), seed: int = 0
) -> list[str]:
    """Add float32 adapters that start as the identity; only they are trained.

    Args:
        module: changed in place.
        rank: of the adapters.
        alpha: their scale is ``alpha / rank``.
        targets: ends of the names of linear layers; empty for the attention projections.
        seed: of their first weights, the same on every rank.

    Returns:
        The full names of the layers that got one.

    Raises:
        ImportError: peft is not installed.
        ValueError: no layer has such a name, or the module has adapters already.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            "LoRA needs peft: pip install diffsteer[lora], or train all weights (tune='full')"
        ) from error
    if lora_layers(module):
        raise ValueError(
            "the model has LoRA adapters already; fuse or unload them first, so that the reference "
            "is well defined"
        )
    wanted = tuple(targets) or ATTENTION
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    found = [n for n in linear if any(n == t or n.endswith(f".{t}") for t in wanted)]
    if not found:
        known = sorted({_ending(name) for name in linear})
        raise ValueError(
            f"lora_targets {', '.join(wanted)} match no linear layer of {type(module).__name__}; "
            f"its layers end in {', '.join(known)}"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=found, init_lora_weights=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return found


def lora_layers(module: nn.Module) -> list[Any]:
    """The layers of ``module`` that carry adapters."""
    return [part for part in module.modules() if hasattr(part, "lora_A")]


def lora_state(module: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The adapters as ``pipe.load_lora_weights`` reads them: scaled so that alpha is the rank.

    Diffusers takes alpha to be the rank where the file does not say; with the scale folded into the
    second factor every version reads the file alike.

    Args:
        module: with adapters; where it is cut over ranks, they call this together.
        keep: whether this rank wants them; else the result is empty.
    """
    state = {}
    for name, part in module.named_modules():
        if not hasattr(part, "lora_A"):
            continue
        scale = part.scaling[ADAPTER]
        state[f"{name}.lora_A.weight"] = part.lora_A[ADAPTER].weight.detach().clone()
        state[f"{name}.lora_B.weight"] = part.lora_B[ADAPTER].weight.detach() * scale
    state = whole(state, keep=keep)
    return state if keep else {}


def merged_state(module: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The state dict of the network without adapters, their products added to its weights.

    Args:
        module: with or without adapters; where it is cut over ranks, they call this together.
        keep: whether this rank wants it; else the result is empty.
    """
    scales = {
        f"{name}.weight": part.scaling[ADAPTER]
        for name, part in module.named_modules()
        if hasattr(part, "lora_A")
    }
    state = whole(module.state_dict(), keep=keep)
    merged = {}
    for name, value in state.items() if keep else ():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        merged[plain] = value
        if plain in scales:
            down, up = (state[_factor(plain, which)].float() for which in ("lora_A", "lora_B"))
            merged[plain] = (value.float() + scales[plain] * (up @ down)).to(value.dtype)
    return merged


def _factor(weight: str, which: str) -> str:
    return f"{weight.removesuffix('weight')}{which}.{ADAPTER}.weight"


def _ending(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
