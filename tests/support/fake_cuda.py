"""A CUDA device that is none: it computes on the CPU and refuses what a GPU would, or waits for.

Every tensor "on the device" is a ``DeviceTensor``: it says ``cuda:0``, holds its values in plain
memory, and sees each operation before it runs. So whole samplers, pipelines and training steps run
with their real numbers, where a tensor without values would stop at the first decision. What goes
wrong on a GPU alone is an error here: operands on two devices, a matrix product of integers, a
generator of the other device, ``numpy()`` of a device tensor; and, unless allowed, whatever makes
the host wait for the device (``item``, ``bool``, boolean indices, ``linalg.eigh``, every copy
between the devices that does not say ``non_blocking``) or computes in float64 there.

What it cannot show: rounding of CUDA kernels, streams, memory, speed, autocast.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # on the first draw it would be imported, under the mode
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

CUDA = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_FOREIGN = {"cuda", "meta"}  # to C++ a DeviceTensor lies on "meta": that device needs no driver
_aten = torch.ops.aten

_WAITS = {  # operations whose result, or the size of it, the host must know
    *("_local_scalar_dense", "nonzero", "nonzero_numpy", "argwhere", "masked_select", "equal"),
    *("unique_dim", "_unique", "_unique2", "unique_consecutive", "bincount", "is_nonzero"),
    *("_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq"),
    *("histc", "linalg_inv_ex", "_linalg_eigvals", "linalg_eigvals", "allclose"),
}
_CPU_ONLY = {"histogram", "_histogramdd_bin_edges", "_histogramdd_from_bin_cts", "from_file"}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "mv", "dot", "vdot"}
_COPIES = {"_to_copy", "copy_", "copy"}
_SCALARS_TOO = {"fill_", "fill", "masked_fill", "masked_fill_", "index_put_", "index_put", "where"}


class Refused(RuntimeError):
    """The host waited for the device, or computed in float64 on it, where it should not."""


class DeviceMismatch(RuntimeError):
    """Operands on two devices, as CUDA would refuse them."""


@dataclass(frozen=True)
class Event:
    """Something that a GPU would feel: the operation, and the line of ours that asked for it."""

    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.what} at {self.where}"


class DeviceTensor(Tensor):
    """A tensor that says it is on ``cuda:0`` and keeps its values in ``held``, on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> DeviceTensor:
        self = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
        )
        self.held = held
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.cpu().numpy()
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy"
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.cpu().__reduce_ex__(protocol)  # a file of it is read on the CPU

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:
        if id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            memo[id(self)] = nn.Parameter(copy, self.requires_grad) if _is_param(self) else copy
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if FakeCuda.current is None:
            raise RuntimeError("a DeviceTensor is used outside of its FakeCuda")
        return FakeCuda.current.run(func, args, kwargs or {})


def _is_param(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "_is_param", False))


_plain_generator = torch.Generator
_places: dict[int, torch.device] = {}  # operations get another Python object of the same generator


class _AnyGenerator(type(_plain_generator)):  # type: ignore[misc]
    def __instancecheck__(cls, other: Any) -> bool:
        return isinstance(other, _plain_generator)


class _Generator(_plain_generator, metaclass=_AnyGenerator):
    """``torch.Generator`` that can also be made for the device; it draws as one of the CPU."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        self = super().__new__(cls, "cpu")
        _places[self._cdata] = CUDA if torch.device(device).type == "cuda" else _CPU
        return self

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__()

    device = property(lambda self: _places[self._cdata])


class _Moves(TorchFunctionMode):
    """``x.to("cuda")`` and ``x.cuda()``: C++ would ask a driver which GPU is the current one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return args[0].to("meta", **{k: v for k, v in kwargs.items() if k == "non_blocking"})
        if func is Tensor.to:
            args = tuple(_meta(a) if isinstance(a, str | torch.device) else a for a in args)
            kwargs = {k: _meta(v) if k == "device" else v for k, v in kwargs.items()}
        if func is Tensor.new_tensor and isinstance(args[0], DeviceTensor):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype), device=CUDA)
        if func in _INDEXING and isinstance(args[0], DeviceTensor):
            args = (args[0], _indices(args[1]), *args[2:])
        if func is torch.tensor:  # of device scalars: C++ would read them where there is nothing
            args = tree_map_only(DeviceTensor, lambda scalar: scalar.item(), args)
        return func(*args, **kwargs)


_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


def _indices(given: Any) -> Any:
    """Lists in an index as tensors of the device, which costs a copy."""
    if isinstance(given, tuple):
        return tuple(map(_indices, given))
    return torch.tensor(given, device=CUDA) if isinstance(given, list) else given


def _meta(device: Any) -> Any:
    return "meta" if device is not None and torch.device(device).type == "cuda" else device


class FakeCuda(TorchDispatchMode):
    """``with FakeCuda() as gpu:`` in which ``device="cuda"`` works, strictly.

    Args:
        waits: whether the host may wait for the device; ``events`` lists each time it did.
        doubles: whether float64 may be computed with on the device; ``events`` lists that too.
    """

    current: FakeCuda | None = None
    # The place of PyTorch's own fake tensors: then nobody tries to start a CUDA driver.
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __init__(self, *, waits: bool = False, doubles: bool = False) -> None:
        super().__init__()
        self.waits, self.doubles = waits, doubles
        self.events: list[Event] = []

    def __enter__(self) -> FakeCuda:
        if FakeCuda.current is not None:
            raise RuntimeError("FakeCuda does not nest; use gpu.allow(...)")
        self._lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) is seen as a copy
        self._open = ExitStack()
        self._open.enter_context(patch.object(torch, "Generator", _Generator))
        self._open.enter_context(patch.multiple(torch.cuda, **self._driver()))
        self._open.enter_context(_Moves())
        FakeCuda.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        FakeCuda.current = None
        self._open.close()
        torch._C._set_only_lift_cpu_tensors(self._lift)

    def _driver(self) -> dict[str, Any]:
        """The questions to the driver that our code and PyTorch's own ask."""
        none = {name: lambda *_: None for name in ("synchronize", "empty_cache", "ipc_collect")}
        zero = {name: lambda *_: 0 for name in ("current_device", "memory_allocated")}
        return (
            none
            | zero
            | {
                "is_available": lambda: True,
                "device_count": lambda: 1,
                "is_current_stream_capturing": lambda: False,
                "is_bf16_supported": lambda *_, **__: True,
                "get_device_name": lambda *_: "none at all",
                "get_device_capability": lambda *_: (9, 0),
                "max_memory_allocated": lambda *_: 0,
                "max_memory_reserved": lambda *_: 0,
                "reset_peak_memory_stats": lambda *_: None,
                "manual_seed_all": lambda *_: None,
                "set_sync_debug_mode": self._sync_debug_mode,
            }
        )

    def _sync_debug_mode(self, mode: str) -> None:
        self.waits = mode != "error"

    @contextmanager
    def allow(self, *, waits: bool = True, doubles: bool = False) -> Iterator[None]:
        """Let the host wait in here, and float64 be used if asked; both still go on record."""
        before = self.waits, self.doubles
        self.waits, self.doubles = self.waits or waits, self.doubles or doubles
        try:
            yield
        finally:
            self.waits, self.doubles = before

    def put(self, what: Any) -> Any:
        """Tensors and modules (in place) on the device, at no cost; others as they are."""
        if isinstance(what, nn.Module):
            memo: dict[int, Tensor] = {}  # tied weights stay tied
            for module in what.modules():
                for slots in (module._parameters, module._buffers):
                    for name, value in slots.items():
                        if value is not None:
                            slots[name] = memo.setdefault(id(value), self.put(value))
            return what
        if not isinstance(what, Tensor) or isinstance(what, DeviceTensor):
            return what
        there = DeviceTensor(what.detach())
        if isinstance(what, nn.Parameter):
            return nn.Parameter(there, what.requires_grad)
        return there.requires_grad_(what.requires_grad)

    def fetch(self, what: Any) -> Any:
        """Values of the device at no cost; anything else is an error."""
        if not isinstance(what, DeviceTensor):
            raise AssertionError(f"expected a tensor on the device, got {what!r}")
        return what.held.clone()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation: refused, noted, computed on the CPU."""
        __tracebackhide__ = True
        flat, _ = tree_flatten((args, kwargs))
        ours = [leaf for leaf in flat if isinstance(leaf, DeviceTensor)]
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in flat):
            raise NotImplementedError(f"{func} of a tensor without values at {_caller()}")
        name = func.overloadpacket.__name__
        asked = kwargs.get("device")
        on_device = bool(ours) if asked is None else torch.device(asked).type in _FOREIGN
        if ours or on_device:
            self._check_operands(func, name, args, kwargs, flat, on_device)
            self._check_waits(func, name, args, kwargs, on_device)
        self._check_generator(flat, on_device)
        inner = {id(leaf.held): leaf for leaf in ours}
        result = func(*_held(args), **_held(kwargs))
        if not on_device or name == "_local_scalar_dense":
            return result

        def wrap(value: Tensor) -> Tensor:
            known = inner.get(id(value))
            if known is None:
                known = DeviceTensor(value)
            elif torch.Tag.inplace_view in func.tags:
                with no_dispatch():  # squeeze_ and its like: the shape that C++ knows changes too
                    func(*args, **kwargs)
            if value.dtype == torch.float64:
                self._note(f"float64 on the device: {func}", self.doubles)
            return known

        return tree_map_only(Tensor, wrap, result)

    def _check_operands(
        self, func: Any, name: str, args: Any, kwargs: Any, flat: list[Any], on_device: bool
    ) -> None:
        if name in _CPU_ONLY:
            raise NotImplementedError(f"{func} has no CUDA kernel")
        tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        if name in _PRODUCTS and not tensors[0].dtype.is_floating_point:
            raise NotImplementedError(f"{func} is not implemented for {tensors[0].dtype} on CUDA")
        if name in _COPIES:
            return
        host = [t for t in tensors if not isinstance(t, DeviceTensor)]
        if name in ("index", "index_put_", "index_put", "_unsafe_index"):
            indices = [i for i in args[1] if i is not None]
            if any(not isinstance(i, DeviceTensor) for i in indices):
                self._wait(f"{func}: indices from the CPU are copied")
            host = [t for t in host if all(t is not i for i in indices)]
        scalars = torch.Tag.pointwise in func.tags or name in _SCALARS_TOO
        wrong = [t for t in host if t.ndim or not scalars]
        target = kwargs.get("out", args[0] if args and name.endswith("_") else None)
        written = isinstance(target, Tensor) and not isinstance(target, DeviceTensor)
        condition = name == "where" and not isinstance(args[0], DeviceTensor)
        clamped = name in ("clamp", "clamp_") and host
        if wrong or (written and on_device) or condition or clamped:
            places = ", ".join(f"{t.device.type}{list(t.shape)}" for t in tensors)
            raise DeviceMismatch(f"{func} on two devices ({places}) at {_caller()}")

    def _check_waits(self, func: Any, name: str, args: Any, kwargs: Any, on_device: bool) -> None:
        if name in _WAITS:
            self._wait(str(func))
        elif name in ("index", "index_put_", "index_put", "_unsafe_index"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            filled = name != "index" and len(masks) == 1 and args[2].numel() == 1
            if masks and not filled:
                self._wait(f"{func} with a boolean mask")
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self._wait(str(func))
        elif name in _COPIES:
            source = args[1] if name != "_to_copy" else args[0]
            there = on_device if name == "_to_copy" else isinstance(args[0], DeviceTensor)
            if isinstance(source, DeviceTensor) == there:
                return
            direction = "to the device" if there else "to the host"
            unwaited = kwargs.get("non_blocking") or (name != "_to_copy" and args[2:3] == (True,))
            if there and unwaited:  # from pageable memory too: it is staged before the call returns
                return
            self._wait(f"copy {direction} of {list(source.shape)}")

    def _check_generator(self, flat: list[Any], on_device: bool) -> None:
        for leaf in flat:
            if isinstance(leaf, _plain_generator):
                place = _places.get(leaf._cdata, leaf.device)
                if (place.type == "cuda") != on_device:
                    raise DeviceMismatch(f"a generator on {place} at {_caller()}")

    def _wait(self, what: str) -> None:
        self._note(what, self.waits)

    def _note(self, what: str, allowed: bool) -> None:
        event = Event(what, _caller())
        self.events.append(event)
        if not allowed:
            raise Refused(str(event))


def _held(tree: Any) -> Any:
    leaves, spec = tree_flatten(tree)
    return tree_unflatten([_plain(leaf) for leaf in leaves], spec)


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, DeviceTensor):
        return leaf.held
    return _CPU if isinstance(leaf, torch.device) and leaf.type in _FOREIGN else leaf


_ROOT = str(Path(__file__).resolve().parents[2])
_TORCH = str(Path(torch.__file__).parent)


def _caller() -> str:
    """The innermost line that is neither PyTorch's nor of this file."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        helper = name == __file__ or frame.f_code.co_name == "send"
        if not helper and not name.startswith((_TORCH, "<")):
            break
        frame = frame.f_back
    name = frame.f_code.co_filename.removeprefix(_ROOT + "/").rpartition("site-packages/")[2]
    return f"{name}:{frame.f_lineno}"
