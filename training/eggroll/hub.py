"""How ranks exchange a few bytes a generation, and go on without one that is silent.

Rank 0 collects what the others post to a key-value store and publishes one table for all. Which
scores count is thus decided in one place, and every rank makes the same update. There are no
collective operations: a rank that hangs holds nobody up for longer than the time limit, once, and
one that wakes up finds the tables that it missed.
"""

from __future__ import annotations

import os
import struct
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

__all__ = ["Hub", "process_state"]

FOR_EVER = timedelta(days=7)


def process_state(*, cpu: bool = False) -> Any:
    """Accelerate's ``PartialState``, which on a machine without an accelerator must be told so.

    Args:
        cpu: use the CPU even where there is an accelerator.

    Raises:
        ValueError: several processes were launched and accelerate sees one: they would all write
            the same folder.
    """
    from accelerate import PartialState

    bare = not (torch.accelerator.is_available() and torch.accelerator.device_count())
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    state = PartialState(cpu=cpu or asked or bare, timeout=FOR_EVER)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and state.num_processes == 1:
        raise ValueError(
            f"{launched} processes were launched, but accelerate was set up for one before; make "
            "PartialState(cpu=True), or process_state(), before anything else does"
        )
    return state


class Hub:
    """The exchange of one run.

    Args:
        store: a ``torch.distributed`` store that all ranks reach; None for a single rank.
        rank: of this process.
        ranks: how many there are.
        timeout: seconds that rank 0 waits for a rank before it goes on without it; 0 waits.
    """

    def __init__(
        self, store: Any = None, *, rank: int = 0, ranks: int = 1, timeout: float = 0.0
    ) -> None:
        self.store, self.rank, self.ranks = store, rank, ranks
        self.timeout = timedelta(seconds=timeout) if timeout else FOR_EVER
        self.sent = self.received = 0  # bytes of messages, both ways, without keys
        self.silent: set[int] = set()

    @classmethod
    def connect(cls, state: Any, *, timeout: float = 0.0) -> Hub:
        """The hub of the processes of an ``accelerate launch``; called on every rank.

        Args:
            state: accelerate's ``PartialState`` or ``Accelerator``.
            timeout: as above.
        """
        rank, ranks = state.process_index, state.num_processes
        if ranks == 1:
            return cls()
        from accelerate.utils import broadcast_object_list

        host = os.environ.get("MASTER_ADDR", "localhost")
        options: Any = {"timeout": FOR_EVER, "wait_for_workers": False}
        # A store of its own: the port is the system's choice, told over the process group.
        store = TCPStore(host, 0, None, True, **options) if rank == 0 else None
        (port,) = broadcast_object_list([store.port if store is not None else 0])
        if store is None:
            store = TCPStore(host, port, None, False, **options)
        return cls(store, rank=rank, ranks=ranks, timeout=timeout)

    def published(self, generation: int) -> list[bytes] | None:
        """The table of a generation that the others have finished without this rank, or None."""
        if self.rank == 0 or not self.store.check([f"{generation}/table"]):
            return None
        return self._table(generation)

    def exchange(self, generation: int, message: bytes) -> list[bytes]:
        """Post this rank's message; the messages of all ranks, empty where one is missing.

        On rank 0 they are what came in; ``publish`` tells the others, which wait for it.
        """
        if self.ranks == 1:
            return [message]
        if self.rank:
            self._set(f"{generation}/{self.rank}", message)
            return self._table(generation)
        return [message, *self._collect(generation)]

    def publish(self, generation: int, messages: list[bytes]) -> None:
        """Rank 0 hands the table of a generation to all."""
        if self.ranks > 1 and self.rank == 0:
            sizes = struct.pack(f"<{self.ranks}I", *map(len, messages))
            self._set(f"{generation}/table", sizes + b"".join(messages))

    def put_state(self, generation: int, state: bytes) -> None:
        """Rank 0 leaves its state for ranks whose weights differ."""
        self._set(f"{generation}/state", state)

    def get_state(self, generation: int) -> bytes | None:
        """The state that rank 0 left, or None."""
        key = f"{generation}/state"
        return self._get(key) if self.store is not None and self.store.check([key]) else None

    def finish(self, generation: int) -> None:
        """Keep the store open until every rank that still answers has read the last table."""
        if self.ranks == 1:
            return
        self.store.set(f"done/{self.rank}", b"1")
        if self.rank == 0:
            for rank in range(1, self.ranks):
                if rank not in self.silent:
                    self._await(f"done/{rank}", self.timeout)

    def _collect(self, generation: int) -> list[bytes]:
        """What the other ranks posted, in their order; a late one is waited for only once."""
        end = time.monotonic() + self.timeout.total_seconds()
        found = []
        for rank in range(1, self.ranks):
            key = f"{generation}/{rank}"
            left = 0.001 if rank in self.silent else max(0.001, end - time.monotonic())
            if self._await(key, timedelta(seconds=left)):
                self.silent.discard(rank)
                found.append(self._get(key))
                self.store.delete_key(key)
            else:
                self.silent.add(rank)
                found.append(b"")
        return found

    def _table(self, generation: int) -> list[bytes]:
        table = self._get(f"{generation}/table")
        head = 4 * self.ranks
        sizes = struct.unpack(f"<{self.ranks}I", table[:head])
        messages, start = [], head
        for size in sizes:
            messages.append(table[start : start + size])
            start += size
        return messages

    def _await(self, key: str, timeout: timedelta) -> bool:
        try:
            self.store.wait([key], timeout)
        except (dist.DistStoreError, RuntimeError):
            return False
        return True

    def _set(self, key: str, value: bytes) -> None:
        self.store.set(key, value)
        self.sent += len(value)

    def _get(self, key: str) -> bytes:
        self.store.wait([key], FOR_EVER)
        value: bytes = self.store.get(key)
        self.received += len(value)
        return value
