"""A degraded pass of a model as its own weak model: layers passed over, attention perturbed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .observe import Call, plain
from .perturbed import perturbed, self_attentions

_LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")
_IMAGE_FIRST = (  # blocks of diffusers that return (image, text)
    "CogV", "ConsisID", "EasyAnimate", "GlmImage", "HiDream", "Hunyuan", "JoyImage", "Mochi",
    "MotifVideo",
)  # fmt: skip


class DegradedPass:
    """Calls a denoiser with some layers passed over, or attentions that attend to nothing.

    Build one with ``degraded``. It is called like the denoiser, so it serves wherever a weak model
    does: ``steer(pipe, AutoGuidance(2.0), weak=degraded(pipe.transformer, skip=[3]))``. The weights
    are shared; nothing is copied. A skipped layer is computed and its result dropped. A compiled
    denoiser, or one of compiled blocks, is run uncompiled.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, nn.Module],
        attentions: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.module, self.layers, self.attentions = module, layers, attentions or {}

    @property
    def id(self) -> str:
        """Model and layers, for records of a run."""
        kinds = (("without", self.layers), ("with perturbed", self.attentions))
        said = [f"{kind} {', '.join(layers)}" for kind, layers in kinds if layers]
        return f"{type(self.module).__name__} {' and '.join(said)}"

    def of(self, call: Call) -> DegradedPass:
        """The same pass of the network that made a call, where a pipeline has two (Wan 2.2).

        Raises:
            ValueError: if the other network has no such layers.
        """
        made_by = plain(call.module)
        if made_by is self.module or all(plain(m) is not self.module for m in call.siblings):
            return self
        names = dict(made_by.named_modules())
        if missing := [name for name in (*self.layers, *self.attentions) if name not in names]:
            raise ValueError(
                f"the degraded pass names {', '.join(missing)}, which another network of the "
                "pipeline does not have; give each its own by GuidanceInterval.two_experts"
            )
        own = ({n: names[n] for n in given} for given in (self.layers, self.attentions))
        return DegradedPass(made_by, *own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's output under the degradation.

        Raises:
            ValueError: if a layer returns something of another shape than it is given, or an
                attention does not go through PyTorch's ``scaled_dot_product_attention``.
        """
        # A compiled module, or block, would not look at hooks that it was not compiled with.
        with torch.compiler.set_stance("force_eager"), self._passed_over():
            with perturbed(self.attentions):
                return self.module(*args, **kwargs)

    @contextmanager
    def _passed_over(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                handle = layer.register_forward_hook(_given_back(name), with_kwargs=True)
                stack.callback(handle.remove)
            yield


def degraded(
    module: nn.Module, *, skip: Sequence[int | str] = (), perturb: Sequence[int | str] = ()
) -> DegradedPass:
    """A weak model made of the model itself, with some of its layers spoilt.

    Args:
        module: the denoiser, e.g. ``pipe.transformer``.
        skip: layers to pass over: numbers of transformer blocks, counted through
            ``transformer_blocks``, then ``single_transformer_blocks`` (negative from the end), or
            names of modules such as "mid_block".
        perturb: layers whose self-attentions attend to nothing, named likewise: every token keeps
            its own value. Where text and image tokens attend together (SD3, Flux) all of them do.

    Raises:
        TypeError: if ``module`` is no module.
        ValueError: if nothing is named, there is no such layer, or no self-attention in it.

    Source: passing over layers is the degradation of skip-layer guidance, the identity for an
    attention map that of perturbed-attention guidance (2403.17377); which layers hurt in the right
    way belongs to a model, those around its middle are a start. Over text and image tokens the
    identity is that of diffusers' ``PerturbedAttentionGuidance``; its StableDiffusion3PAGPipeline
    lets image tokens go on seeing the text.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be the denoiser, a torch module, got {type(module).__name__}")
    inner = plain(module)
    layers, spoilt = _named_layers(inner, "skip", skip), _named_layers(inner, "perturb", perturb)
    if not layers and not spoilt:
        raise ValueError("skip names no layer, nor does perturb; nothing would be degraded")
    for name, layer in spoilt.items():
        self_attentions(name, layer)  # an error now rather than at the first step
    return DegradedPass(inner, layers, spoilt)


def _named_layers(
    inner: nn.Module, argument: str, wanted: Sequence[int | str]
) -> dict[str, nn.Module]:
    """Layers by number of the block or by name."""
    blocks = [
        (f"{name}.{index}", block)
        for name in _LISTS
        for index, block in enumerate(getattr(inner, name, ()))
    ]
    named = dict(inner.named_modules())
    layers: dict[str, nn.Module] = {}
    for layer in wanted:
        if isinstance(layer, str) and layer in named and layer:
            layers[layer] = named[layer]
        elif isinstance(layer, int) and -len(blocks) <= layer < len(blocks):
            layers.update([blocks[layer]])
        else:
            raise ValueError(
                f"{argument}: {type(inner).__name__} has no layer {layer!r}; it has {len(blocks)} "
                f"transformer blocks, numbered from 0, and modules such as "
                f"{', '.join(name for name, _ in inner.named_children())}"
            )
    return layers


def _given_back(name: str) -> Any:
    """A hook that replaces a layer's output by its input."""

    def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        names = [n for n in inspect.signature(type(layer).forward).parameters if n != "self"]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        first = given.get("hidden_states", args[0] if args else None)
        if isinstance(output, Tensor):
            return _same(name, first, output)
        # Blocks of two streams return (text, image) or the reverse; the last one may drop the text.
        streams = (given.get("encoder_hidden_states"), first)
        streams = streams[::-1] if type(layer).__name__.startswith(_IMAGE_FIRST) else streams
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
