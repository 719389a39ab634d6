"""Which matrices of a model evolve, and whether it is fit for that."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Layer", "check_layers", "find_layers", "unwrap"]

Names = str | Sequence[str] | None
# Fusing projections makes new Linear layers, which are born in training mode: harmless.
_SAME_IN_TRAINING = (nn.Linear, nn.Conv2d, nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What takes the place of what when diffusers fuses projections (the old ones stay, unused).
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


@dataclass(frozen=True, eq=False)
class Layer:
    """A matrix that evolves.

    Attributes:
        name: its place in the model, without the prefixes of DDP and torch.compile.
        module: the Linear or Conv2d; a convolution's weight (O, I, kh, kw) is the matrix
            (O, I * kh * kw).
        bias: whether its bias evolves too.
    """

    name: str
    module: nn.Linear | nn.Conv2d
    bias: bool = False

    @property
    def rows(self) -> int:
        """Outputs, m."""
        return self.module.weight.shape[0]

    @property
    def columns(self) -> int:
        """Inputs of one output, n."""
        return self.module.weight[0].numel()

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, parameter) of what evolves: the weight and, with ``bias``, the bias."""
        yield f"{self.name}.weight", self.module.weight
        if self.bias and self.module.bias is not None:
            yield f"{self.name}.bias", self.module.bias


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def find_layers(
    model: nn.Module, target: Names = None, exclude: Names = (), *, biases: bool = False
) -> dict[str, Layer]:
    """The Linear and Conv2d layers of ``model`` that evolve, by name, in the order of the model.

    Args:
        model: any module.
        target: as peft's ``target_modules``: a regular expression for the whole name, or names or
            endings of names ("to_q"). None: every Linear and Conv2d.
        exclude: likewise, what to leave alone.
        biases: let the biases of these layers evolve too.

    Raises:
        ValueError: nothing matches, a weight is shared by two layers, or one is not floating point.
    """
    model = unwrap(model)
    candidates = {
        _plain(name): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    unused = _fused_away(model)
    chosen = {
        name: Layer(name, module, biases and module.bias is not None)
        for name, module in candidates.items()
        if name not in unused and _matches(name, target, True) and not _matches(name, exclude)
    }
    if not chosen:
        some = ", ".join(list(candidates)[:6]) or "none at all"
        raise ValueError(
            f"no Linear or Conv2d of {type(model).__name__} matches target={target!r} with "
            f"exclude={exclude!r}; its layers are: {some}{', ...' if len(candidates) > 6 else ''}"
        )
    _refuse_tied(model, chosen)
    for layer in chosen.values():
        if not layer.module.weight.is_floating_point():
            raise ValueError(
                f"the weight of {layer.name} is {layer.module.weight.dtype}: quantised layers "
                "cannot take the update; exclude them or load the model in floating point"
            )
    return chosen


def check_layers(model: nn.Module, layers: Mapping[str, Layer], *, lowrank: bool) -> None:
    """Refuse a model whose fitness would say nothing, or something wrong, about its weights.

    Args:
        model: the model.
        layers: what ``find_layers`` found in it earlier.
        lowrank: also refuse what only the batched low-rank forward cannot do.

    Raises:
        ValueError: a module is in training mode, the layers are no longer those found (fused
            projections, a layer replaced), or, with ``lowrank``, a layer is not called as a module
            or works on slices of the batch.
    """
    model = unwrap(model)
    modules = {_plain(name): module for name, module in model.named_modules()}
    busy = next(
        (
            name
            for name, m in modules.items()
            if m.training and not isinstance(m, _SAME_IN_TRAINING)
        ),
        None,
    )
    if busy is not None:
        raise ValueError(
            f"{busy or type(model).__name__} is in training mode: dropout would drown the fitness "
            "in noise of its own, and batch statistics would mix members; call model.eval() first"
        )
    gone = [name for name, layer in layers.items() if modules.get(name) is not layer.module]
    gone += sorted(_fused_away(model) & set(layers))
    if gone:
        raise ValueError(
            f"{gone[0]} is not the layer any more that it was at the start (projections fused, "
            "adapters added, or the layer replaced): its noise would be lost. Change the model "
            "first, then start"
        )
    if lowrank:
        _refuse_batch_tricks(modules, layers)


def _refuse_batch_tricks(modules: Mapping[str, nn.Module], layers: Mapping[str, Layer]) -> None:
    way_out = "; exclude it, or use mode='materialize'"
    for name, module in modules.items():
        prefix = f"{name}." if name else ""
        inside = any(other.startswith(prefix) for other in layers)
        if isinstance(module, nn.MultiheadAttention) and inside:
            raise ValueError(
                f"{name} is an nn.MultiheadAttention, which uses the weights of its projections "
                f"without calling them{way_out}"
            )
        if getattr(module, "_chunk_size", None) is not None and inside:
            raise ValueError(
                f"{name} feeds its layers slices of the batch (forward chunking), so that rows can "
                f"no longer be told apart by member; disable chunking{way_out}"
            )
    for name, layer in layers.items():
        if "forward" in vars(layer.module):
            raise ValueError(
                f"the forward of {name} was replaced (offloading or another hook of accelerate), "
                f"and would bypass the low-rank noise; remove the hook{way_out}"
            )


def _refuse_tied(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(_plain(name))
    for layer in layers.values():
        for _, weight in layer.parameters():
            if len(names[id(weight)]) > 1:
                raise ValueError(
                    f"{' and '.join(names[id(weight)])} are one parameter: tied weights would "
                    "get two different perturbations; exclude them"
                )


def _fused_away(model: nn.Module) -> set[str]:
    """Projections that a fused one has taken the place of."""
    return {
        _plain(f"{name}.{old}" if name else old)
        for name, module in model.named_modules()
        for fused, replaced in _FUSED.items()
        if getattr(module, "fused_projections", False) and hasattr(module, fused)
        for old in replaced
    }


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def _matches(name: str, wanted: Names, if_none: bool = False) -> bool:
    if wanted is None:
        return if_none
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)
