"""The inputs of one denoiser call, cut into samples: what conditions a model, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...core.tensors import send
from ...pipelines.observe import Call

__all__ = ["Conditioning", "autocasting"]


@dataclass(frozen=True)
class Conditioning:
    """A recorded call of a denoiser, by the names of its arguments.

    Attributes:
        module: what was called.
        arguments: everything that was given, the noisy sample among it.
        rows: the names of the arguments that hold one entry a sample, along dimension 0.
        count: samples.
        sample_name: the argument that carries the noisy sample.
    """

    module: nn.Module
    arguments: dict[str, Any]
    rows: frozenset[str]
    count: int
    sample_name: str

    @classmethod
    def of(cls, call: Call) -> Conditioning:
        """What a call was conditioned on, without gradients."""
        names = call.names
        values = dict(zip(names, [*call.args, *call.kwargs.values()], strict=True))
        count = call.output.shape[0]
        rows = frozenset(n for n, value in values.items() if _is_row(n, value, count))
        kept = {name: _detached(value) for name, value in values.items()}
        return cls(call.module, kept, rows, count, call.sample_name)

    def take(self, index: Sequence[int] | slice) -> Conditioning:
        """Some of the samples, in the order of ``index``."""
        picked = range(self.count)[index] if isinstance(index, slice) else list(index)
        arguments = {
            name: _pick(value, picked) if name in self.rows else value
            for name, value in self.arguments.items()
        }
        return Conditioning(self.module, arguments, self.rows, len(picked), self.sample_name)

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on another device; shared arguments stay where they are."""
        moved = {
            name: _moved(value, device) if name in self.rows else value
            for name, value in self.arguments.items()
        }
        return Conditioning(self.module, moved, self.rows, self.count, self.sample_name)

    def call(self) -> Call:
        """The call again, to be replayed with another sample and timestep."""
        return Call(self.module, (), dict(self.arguments), torch.empty(self.count))

    @property
    def condition(self) -> dict[str, Any]:
        """The arguments with one entry a sample, without the noisy sample."""
        names = sorted(self.rows - {self.sample_name})
        return {name: self.arguments[name] for name in names}

    @staticmethod
    def join(parts: Sequence[Conditioning]) -> Conditioning:
        """Several recordings of one model as one.

        Raises:
            ValueError: their prompts have different numbers of tokens and there is no mask.
        """
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        masked = any("mask" in name for name in first.rows)
        arguments = {
            name: _joined(name, [part.arguments[name] for part in parts], masked)
            if name in first.rows
            else value
            for name, value in first.arguments.items()
        }
        count = sum(part.count for part in parts)
        return Conditioning(first.module, arguments, first.rows, count, first.sample_name)


@contextmanager
def autocasting(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Run every forward pass of ``module``, whoever calls it, under autocast to ``dtype``.

    Its outputs come back in the dtype of its parameters: a context around a whole pipeline would
    lower the precision of its VAE and solver as well.
    """
    if dtype is None:
        yield
        return
    opened: list[Any] = []

    def before(module: nn.Module, args: Any) -> None:
        device = next(module.parameters()).device.type
        opened.append(torch.autocast(device, dtype=dtype))
        opened[-1].__enter__()

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        opened.pop().__exit__(None, None, None)
        wide = next(module.parameters()).dtype
        return tree_map(lambda x: x.to(wide) if _is_narrow(x) else x, output)

    def _is_narrow(x: Any) -> bool:
        return isinstance(x, Tensor) and x.dtype == dtype

    handles = [
        module.register_forward_pre_hook(before),
        # always_call: also where the forward pass raises, or autocast would stay on
        module.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_row(name: str, value: Any, count: int) -> bool:
    if isinstance(value, Tensor):
        # Position ids (tokens, axes) belong to no sample, also where there are `count` tokens.
        shared = name.endswith("_ids") and value.ndim == 2
        return value.ndim > 0 and value.shape[0] == count and not shared
    return isinstance(value, list | tuple) and len(value) == count


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone() if value.is_inference() else value.detach()
    if isinstance(value, list | tuple):
        return [_detached(item) for item in value]
    return value


def _pick(value: Any, index: Sequence[int]) -> Any:
    if isinstance(value, Tensor):
        return value[send(list(index), value.device)]
    return [value[i] for i in index]


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return send(value, device)
    return [_moved(item, device) for item in value] if isinstance(value, list) else value


def _joined(name: str, values: list[Any], masked: bool) -> Any:
    if not isinstance(values[0], Tensor):
        return [item for value in values for item in value]
    if len({value.shape[1:] for value in values}) > 1:
        values = _padded(name, values, masked)
    return torch.cat(values)


def _padded(name: str, values: list[Tensor], masked: bool) -> list[Tensor]:
    """Sequences of one length, zeros at the end: the mask (padded as well) hides them."""
    alike = len({(value.ndim, value.shape[2:]) for value in values}) == 1
    if not (masked and alike):
        shapes = ", ".join(str(tuple(value.shape)) for value in values[:3])
        raise ValueError(
            f"the pipeline calls its denoiser with {name!r} of different shapes ({shapes}) and no "
            "mask, so samples cannot be batched; fix the length of the prompts (for example "
            "call={'max_sequence_length': 128})"
        )
    longest = max(value.shape[1] for value in values)
    pad: Callable[[Tensor], list[int]] = lambda v: [0, 0] * (v.ndim - 2) + [0, longest - v.shape[1]]  # noqa: E731
    return [F.pad(value, pad(value)) for value in values]
