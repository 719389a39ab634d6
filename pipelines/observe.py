"""Record the denoiser's calls, and make them again with other inputs.

A plain forward hook sees the call as the pipeline made it, whatever wraps the module: offloading
and caching hooks replace ``module.forward`` and come back after every run, forward hooks stay.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Scale = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """One call of a denoiser: ``module(*args, **kwargs)`` gave ``output``, a tensor of R rows.

    ``siblings`` are the networks of the pipeline that may predict, this one among them.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    siblings: tuple[nn.Module, ...] = ()

    @property
    def sample_name(self) -> str:
        """The argument that carries the noisy sample: the first one of ``forward``."""
        return parameters_of(self.module)[0]

    @property
    def sample(self) -> Any:
        """The noisy sample as the network got it: a tensor, or a list with one a row."""
        return self.args[0] if self.args else self.kwargs[self.sample_name]

    @property
    def names(self) -> list[str]:
        """The arguments that were given."""
        return [*parameters_of(self.module)[: len(self.args)], *self.kwargs]

    def argument(self, name: str) -> Any:
        """What was given for an argument, or None."""
        if name in self.kwargs:
            return self.kwargs[name]
        given = dict(zip(parameters_of(self.module), self.args, strict=False))
        return given.get(name)

    def describe(self) -> str:
        """Module and output shape, for error messages."""
        return f"{type(plain(self.module)).__name__} -> {tuple(self.output.shape)}"


class Recorder:
    """Forward hooks on the denoisers; ``take()`` returns the calls since it was last asked."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = list(modules)
        self.calls: list[Call] = []
        self.seen = 0
        self._paused = False
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Start to record."""
        hook = torch.compiler.disable(self._see)
        self._handles = [m.register_forward_hook(hook, with_kwargs=True) for m in self.modules]

    def detach(self) -> None:
        """Stop, and leave no trace on the modules."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.calls = [], []

    def take(self) -> list[Call]:
        """The calls recorded since the last ``take``."""
        calls, self.calls = self.calls, []
        return calls

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not record: these calls are ours."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._paused:
            self.seen += 1
            seen = Call(module, args, kwargs, first_tensor(output), tuple(self.modules))
            self.calls.append(seen)


def first_tensor(output: Any) -> Tensor:
    """The prediction in what a denoiser returned: tensor, tuple, diffusers output or list.

    Raises:
        TypeError: if there is no tensor in it.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list) and output and isinstance(output[0], Tensor):
        return torch.stack(output)
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple) and output:
        return first_tensor(output[0])
    raise TypeError(
        f"the denoiser returned {type(output).__name__}, in which steer finds no tensor; name "
        "the module that predicts with steer(..., denoiser=module)"
    )


def plain(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper, or the module itself."""
    inner = getattr(module, "_orig_mod", None)
    return module if inner is None else inner


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """The arguments of the module's ``forward``, in order."""
    cls: Any = type(plain(module))
    return _parameters(cls)


@functools.lru_cache(64)  # asked at every step
def _parameters(cls: Any) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(cls.forward).parameters if name != "self")


def replay(
    call: Call,
    function: Callable[..., Any] | None = None,
    *,
    sample: Any = None,
    overrides: Mapping[str, Any] | None = None,
    half: int | None = None,
    cache: str = "diffsteer",
) -> Tensor:
    """Make a recorded call again.

    Args:
        call: what the pipeline called.
        function: what to call in the module's place, with the same arguments; what has a method
            ``of(call)`` is asked for the function first.
        sample: another network input for the noisy sample; None keeps the recorded one.
        overrides: other values for arguments of the denoiser, by name. A tensor with half the rows
            of the recorded one fills the rows of ``half`` alone; one row is repeated.
        half: 0 or 1, the half of a doubled batch that overrides mean; None if the batch is not
            doubled.
        cache: name of the cache context, so that caching hooks do not mix this call with the
            pipeline's.

    Returns:
        The output, all rows.

    Raises:
        TypeError: if an override is no argument of the denoiser.
    """
    args, kwargs = list(call.args), dict(call.kwargs)
    names = parameters_of(call.module)
    for name, value in (overrides or {}).items():
        position = names.index(name) if name in names else None
        if position is None and name not in kwargs:
            raise TypeError(
                f"{type(plain(call.module)).__name__} has no argument {name!r}; it takes "
                f"{', '.join(names)}"
            )
        if position is not None and position < len(args):
            args[position] = _fill(args[position], value, half)
        else:
            kwargs[name] = _fill(kwargs.get(name), value, half)
    if sample is not None:
        if args:
            args[0] = sample
        else:
            kwargs[call.sample_name] = sample
    if not torch.is_inference_mode_enabled():  # autograd cannot save inference tensors
        args, kwargs = tree_map(normal, (args, kwargs))
    context = getattr(call.module, "cache_context", None)
    chosen = call.module if function is None else function
    chosen = chosen.of(call) if hasattr(chosen, "of") else chosen
    with nullcontext() if context is None else context(cache):
        return first_tensor(chosen(*args, **kwargs))


def normal(value: Any) -> Any:
    """A tensor that autograd accepts: inference tensors are cloned, anything else is returned."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def half_of(value: Any, half: int | None, rows: int) -> Any:
    """The tensors in ``value`` that have ``rows`` rows, cut to one half of them."""

    def own(leaf: Any) -> Any:
        whole = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == rows
        return leaf.chunk(2)[half] if whole and half is not None else leaf

    return tree_map(own, value)


def _fill(recorded: Any, value: Any, half: int | None) -> Any:
    if isinstance(recorded, Mapping) and isinstance(value, Mapping):  # SDXL's added_cond_kwargs
        return {**recorded, **{k: _fill(recorded.get(k), v, half) for k, v in value.items()}}
    if not isinstance(recorded, Tensor) or not isinstance(value, Tensor):
        return value
    value = value.to(recorded.device)
    if recorded.is_floating_point():
        value = value.to(recorded.dtype)
    if value.ndim != recorded.ndim or value.shape == recorded.shape or value.ndim == 0:
        return value
    rows = recorded.shape[0] if half is None else recorded.shape[0] // 2
    if value.shape[0] == 1:
        value = value.expand(rows, *value.shape[1:])
    if half is None or value.shape[0] != rows or value.shape[1:] != recorded.shape[1:]:
        return value
    kept = recorded.chunk(2)[1 - half]
    return torch.cat([value, kept] if half == 0 else [kept, value])


def network_input(call: Call, x: Tensor, scale: Scale) -> Any:
    """What the pipeline would have fed the network for the sample ``x``.

    Args:
        call: the recorded call, whose rows are those of ``x`` once or twice.
        x: the sample in the layout and dtype of ``scheduler.step``, (B, ...).
        scale: the scheduler's ``scale_model_input`` at this step.

    Returns:
        The scaled sample, doubled like the recorded input, with the channels or tokens that the
        pipeline appended to it (inpainting masks, reference images); a list where the network takes
        one.

    Raises:
        ValueError: if the recorded input has another layout.
    """
    recorded, x = call.sample, scale(x)
    x = torch.cat([x] * (call.output.shape[0] // x.shape[0]))
    if isinstance(recorded, (list, tuple)):
        return [row.reshape(r.shape).to(r.dtype) for row, r in zip(x, recorded, strict=True)]
    x = x.to(recorded.dtype)
    if x.shape == recorded.shape:
        return x
    appended = x.ndim == recorded.ndim and x.shape[0] == recorded.shape[0]
    if appended and x.shape[2:] == recorded.shape[2:] and x.shape[1] < recorded.shape[1]:
        return torch.cat([x, recorded[:, x.shape[1] :]], dim=1)
    raise ValueError(
        f"cannot rebuild the network's input {tuple(recorded.shape)} from the sample "
        f"{tuple(x.shape)}"
    )


def same_input(rebuilt: Any, recorded: Any) -> bool:
    """Whether a rebuilt network input equals the recorded one to rounding. Waits for the device."""
    if isinstance(recorded, (list, tuple)):
        return all(same_input(a, b) for a, b in zip(rebuilt, recorded, strict=True))
    tolerance = 1e-5 if recorded.dtype in (torch.float32, torch.float64) else 1e-2
    gap = (rebuilt.float() - recorded.float()).norm()
    return bool(gap <= tolerance * recorded.float().norm())
