"""What a computation costs: time, live memory, and reads of device values by the host."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

# Operations that give the host a value of the device, or a shape that depends on one.
_SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")


class HostReads(TorchDispatchMode):
    """Counts the reads of values that descend from ``data``; noise levels on the CPU are free.

    On the CPU nothing waits, but the same operations stop an accelerator.
    """

    def __init__(self, *data: Tensor) -> None:
        super().__init__()
        self.count = 0
        self._device = WeakIdKeyDictionary({tensor: True for tensor in data})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [a for a in tree_leaves((args, kwargs or {})) if isinstance(a, Tensor)]
        result = func(*args, **(kwargs or {}))
        if any(tensor in self._device for tensor in given):
            self.count += any(name in str(func) for name in _SYNCS)
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._device[tensor] = True
        return result


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known: set[int] = set()

    def ignore(self, *tensors: Tensor) -> None:
        """Do not count these: they are the inputs."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {k: v for k, v in self._live.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def clocked(run: Callable[[], Any], options: argparse.Namespace) -> float:
    """Seconds of ``run``, by ``options.clock``; the work of ``options.device`` included."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    synchronize(options)
    start = clock()
    run()
    synchronize(options)
    return clock() - start


def peak_bytes(run: Callable[[], Any], known: Sequence[Tensor], options: argparse.Namespace) -> int:
    """The most bytes that ``run`` adds to what is held; ``known`` is held already."""
    if options.device.startswith("cuda"):
        run()  # libraries take their workspaces
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as probe:
        probe.ignore(*known)
        run()
    return probe.peak


def device_name(device: str) -> str:
    """What tables call ``device``; ends the program where there is none of its kind."""
    if not device.startswith("cuda"):
        return "CPU"
    if not torch.cuda.is_available():
        raise SystemExit("skipped: there is no CUDA device here")
    return torch.cuda.get_device_name(device)


def synchronize(options: argparse.Namespace) -> None:
    """Wait for ``options.device``."""
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()
