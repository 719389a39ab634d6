"""Self-attention that attends to nothing: every token keeps its own value (2403.17377)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

# The layer, and how many queries its attention would have as a cross-attention, or None.
Running = tuple[str, int | None]


def self_attentions(name: str, layer: nn.Module) -> list[nn.Module]:
    """The attentions in a layer, or the layer itself, that may be over its own tokens.

    They are the modules of diffusers with an attention processor that do not say
    ``is_cross_attention``; attention over text and image tokens together counts among them.

    Raises:
        ValueError: if there is none.
    """
    found = [
        module
        for module in layer.modules()
        if hasattr(module, "processor") and not getattr(module, "is_cross_attention", False)
    ]
    if not found:
        raise ValueError(
            f"perturb: there is no self-attention in {name} ({type(layer).__name__}); name another "
            "layer, or pass one over with skip="
        )
    return found


class _ValuesPassThrough(TorchFunctionMode):
    """While an attention of interest runs, attention returns its values: the map is the identity.

    Attributes:
        within: what is running, innermost last.
        done: the layers in which a map was replaced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.within: list[Running] = []
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
            layer, queries = self.within[-1]
            if query.shape[:-1] == value.shape[:-1] and query.shape[-2] != queries:
                self.done.add(layer)
                return value
        return function(*args, **given)

    def watch(self, layer: str, attention: nn.Module) -> list[Any]:
        """Hooks that say when an attention of a layer runs."""

        def enter(_: Any, args: Any, kwargs: Any) -> None:
            # Beside other tokens it is cross-attention, unless they join its queries.
            own = kwargs.get("hidden_states", args[0] if args else None)
            other = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            cross = isinstance(own, Tensor) and isinstance(other, Tensor) and other is not own
            self.within.append((layer, own.shape[-2] if cross else None))

        def leave(*_: Any) -> None:
            self.within.pop()

        return [
            attention.register_forward_pre_hook(enter, with_kwargs=True),
            attention.register_forward_hook(leave, always_call=True),
        ]


@contextmanager
def perturbed(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Run models with the identity for the self-attention maps in these layers.

    Raises:
        ValueError: on the way out, if in a layer no attention called PyTorch's
            ``scaled_dot_product_attention`` on its own tokens, so that nothing was perturbed.
    """
    if not layers:
        yield
        return
    mode = _ValuesPassThrough()
    with ExitStack() as stack:
        for name, layer in layers.items():
            for attention in self_attentions(name, layer):
                for handle in mode.watch(name, attention):
                    stack.callback(handle.remove)
        stack.enter_context(mode)
        yield
    if missed := [name for name in layers if name not in mode.done]:
        raise ValueError(
            f"perturb: no attention in {', '.join(missed)} went through torch's "
            "scaled_dot_product_attention over its own tokens (it is linear, has another backend, "
            "or did not run), so nothing was perturbed; use the native backend, or skip="
        )
