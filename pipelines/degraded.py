"""A degraded pass of a model as its own weak model: some of its layers are passed over."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .observe import plain

_LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")


class DegradedPass:
    """Calls a denoiser with some layers passed over: what they are given is what they return.

    Build one with ``degraded``. It is called like the denoiser, so it serves wherever a weak model
    does: ``steer(pipe, AutoGuidance(2.0), weak=degraded(pipe.transformer, skip=[3]))``. The weights
    are shared; nothing is copied. A skipped layer is computed and its result dropped. A compiled
    denoiser is run uncompiled.
    """

    def __init__(self, module: nn.Module, layers: dict[str, nn.Module]) -> None:
        self.module, self.layers = module, layers

    @property
    def id(self) -> str:
        """Model and layers, for records of a run."""
        return f"{type(self.module).__name__} without {', '.join(self.layers)}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's output without the layers.

        Raises:
            ValueError: if a layer returns something of another shape than it is given.
        """
        with self._passed_over():
            return self.module(*args, **kwargs)

    @contextmanager
    def _passed_over(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                handle = layer.register_forward_hook(_given_back(name), with_kwargs=True)
                stack.callback(handle.remove)
            yield


def degraded(module: nn.Module, *, skip: Sequence[int | str]) -> DegradedPass:
    """A weak model made of the model itself, without some of its layers.

    Args:
        module: the denoiser, e.g. ``pipe.transformer``.
        skip: layers to pass over: numbers of transformer blocks, counted through
            ``transformer_blocks``, then ``single_transformer_blocks`` (negative from the end), or
            names of modules such as "mid_block".

    Raises:
        TypeError: if ``module`` is no module.
        ValueError: if nothing is skipped, or there is no such layer.

    Source: passing over layers is the degradation of skip-layer guidance; which layers hurt in the
    right way belongs to a model, those around its middle are a start.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be the denoiser, a torch module, got {type(module).__name__}")
    inner = plain(module)
    blocks = [
        (f"{name}.{index}", block)
        for name in _LISTS
        for index, block in enumerate(getattr(inner, name, ()))
    ]
    named = dict(inner.named_modules())
    layers: dict[str, nn.Module] = {}
    for layer in skip:
        if isinstance(layer, str) and layer in named and layer:
            layers[layer] = named[layer]
        elif isinstance(layer, int) and -len(blocks) <= layer < len(blocks):
            layers.update([blocks[layer]])
        else:
            raise ValueError(
                f"skip: {type(inner).__name__} has no layer {layer!r}; it has {len(blocks)} "
                f"transformer blocks, numbered from 0, and modules such as "
                f"{', '.join(name for name, _ in inner.named_children())}"
            )
    if not layers:
        raise ValueError("skip names no layer; nothing would be degraded")
    return DegradedPass(inner, layers)


def _given_back(name: str) -> Any:
    """A hook that replaces a layer's output by its input."""

    def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        names = [n for n in inspect.signature(type(layer).forward).parameters if n != "self"]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        first = given.get("hidden_states", args[0] if args else None)
        if isinstance(output, Tensor):
            return _same(name, first, output)
        # Blocks of two streams return (text, image); the last one may drop the text.
        streams = (given.get("encoder_hidden_states"), first)
        if not isinstance(output, tuple) or len(output) != 2:
            raise ValueError(
                f"skip: the layer {name} returns {type(output).__name__}, which cannot be replaced "
                "by its input; skip another"
            )
        return tuple(
            None if out is None else _same(name, stream, out)
            for out, stream in zip(output, streams, strict=True)
        )

    return hook


def _same(name: str, given: Any, output: Tensor) -> Tensor:
    if not isinstance(given, Tensor) or given.shape != output.shape:
        raise ValueError(
            f"skip: the layer {name} does not return what it is given in shape, so it cannot be "
            "passed over; skip another"
        )
    return given
