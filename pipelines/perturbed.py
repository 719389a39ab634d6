"""Self-attention that attends to nothing: every token keeps its own value (2403.17377)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


def self_attentions(name: str, layer: nn.Module) -> dict[str, nn.Module]:
    """The self-attentions in a layer, or the layer itself, by name.

    They are the modules of diffusers with an attention processor that do not say
    ``is_cross_attention``; attention over text and image tokens together counts among them.

    Raises:
        ValueError: if there is none.
    """
    found = {
        f"{name}.{inner}" if inner else name: module
        for inner, module in layer.named_modules()
        if hasattr(module, "processor") and not getattr(module, "is_cross_attention", False)
    }
    if not found:
        raise ValueError(
            f"perturb: there is no self-attention in {name} ({type(layer).__name__}); name another "
            "layer, or pass one over with skip="
        )
    return found


class _ValuesPassThrough(TorchFunctionMode):
    """While an attention of interest runs, attention returns its values: the map is the identity.

    Attributes:
        within: the attentions that are running, innermost last.
        done: those in which a map was replaced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.within: list[str] = []
        self.done: set[str] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if function is scaled_dot_product_attention and self.within:
            names = ("query", "key", "value")
            query, _, value = (
                given[name] if name in given else args[place] for place, name in enumerate(names)
            )
            if query.shape[:-1] == value.shape[:-1]:
                self.done.add(self.within[-1])
                return value
        return function(*args, **given)


@contextmanager
def perturbed(attentions: Mapping[str, nn.Module]) -> Iterator[None]:
    """Run models with the identity for these attentions' maps.

    Raises:
        ValueError: on the way out, if an attention did not call PyTorch's
            ``scaled_dot_product_attention`` on as many keys as queries, so that nothing was
            perturbed in it.
    """
    mode = _ValuesPassThrough()
    with ExitStack() as stack:
        for name, module in attentions.items():
            before = module.register_forward_pre_hook(lambda *_, n=name: mode.within.append(n))
            after = module.register_forward_hook(
                lambda *_: mode.within.pop() and None, always_call=True
            )
            stack.callback(before.remove)
            stack.callback(after.remove)
        if attentions:
            stack.enter_context(mode)
        yield
    if missed := [name for name in attentions if name not in mode.done]:
        raise ValueError(
            f"perturb: {', '.join(missed)} did not attend by torch's scaled_dot_product_attention "
            "over as many keys as queries (linear attention, another attention backend, or not run "
            "at all), so there was nothing to perturb; use the native backend, or skip="
        )
