"""What a suite remembers of one side: everything, or moments of all samples and rows of some."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .features import FeatureSet
from .gather import gathered, gathered_moments
from .moments import Moments

_WIDE = ("features", "spatial")  # the taps that take the memory
_SETTLE = 4096  # rows that wait before they are summed: few large products beat many small ones


class FeatureBank:
    """Samples of one side, in bounded memory if asked.

    Without ``max_rows`` and in float32 every row is kept, and results do not depend on order,
    batches or ranks to the last digit. Otherwise moments are summed on the way in float64 (of the
    rows as they came) and wide rows are kept in ``dtype``, at most ``max_rows`` of them: those
    with the smallest content keys, which is a random subset that no order or number of ranks
    changes. Distances from moments then agree to 1e-12, counts of neighbours exactly.

    Args:
        max_rows: how many rows of features are kept; None for all.
        dtype: that they are kept in: float32 or float16.

    Raises:
        ValueError: if ``max_rows`` is below 1, or the dtype is another.
    """

    def __init__(self, max_rows: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(f"rows are kept in float32 or float16, got {dtype}")
        self.max_rows, self.dtype = max_rows, dtype
        self.streams = max_rows is not None or dtype != torch.float32
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        # What sync() has brought to every rank must not be gathered twice: it is in ``_shared``.
        self._new: list[FeatureSet] = []
        self._thin, self._rows = FeatureSet(), FeatureSet()
        self._sums: dict[str, Moments] = {}
        self._shared: tuple[FeatureSet, FeatureSet, dict[str, Moments]] | None = None

    def __len__(self) -> int:
        """How many samples were added, repeats included."""
        thin, rows, _ = self._everything()
        return len(thin) if self.streams else len(rows)

    def add(self, features: FeatureSet) -> None:
        """Add samples.

        Raises:
            ValueError: if rows do not fit into float16 where that is kept.
        """
        self._new.append(features)
        if self.streams and sum(map(len, self._new)) >= _SETTLE:
            self._settle()

    def merge(self, other: FeatureBank) -> None:
        """Add all that another bank has seen, of any limit."""
        thin, rows, sums = other._everything()
        if not self.streams:
            if other.streams:
                raise ValueError("a suite that keeps every row cannot take in one that does not")
            self.add(rows)
            return
        self._settle()
        if not other.streams:
            self.add(rows)
            return
        self._take(thin, rows, sums)

    def sync(self) -> None:
        """Bring all ranks' samples to every rank; see ``EvalSuite.sync``."""
        self._settle()
        shared, self._shared = self._shared, None
        mine = gathered(self._thin), gathered(self._rows), gathered_moments(self._sums)
        self._thin, self._rows, self._sums = FeatureSet(), FeatureSet(), {}
        self._take(*mine)
        if shared is not None:
            self._take(*shared)
        self._shared = (self._thin, self._rows, self._sums)
        self._thin, self._rows, self._sums = FeatureSet(), FeatureSet(), {}

    def samples(self) -> FeatureSet:
        """Every sample in the order of content; without wide taps if rows are streamed.

        Raises:
            ValueError: if an index was repeated while rows were streamed: sums cannot forget.
        """
        thin, rows, _ = self._everything()
        found = (thin if self.streams else rows).canonical()
        if self.streams and len(found) < len(thin):
            raise ValueError(
                f"{len(thin) - len(found)} samples were repeated (index), which sums cannot "
                "forget: feed without padding (even_batches=False), or leave out max_rows"
            )
        return found

    def rows(self) -> FeatureSet:
        """The samples whose rows are kept, in the order of content."""
        return self._everything()[1].canonical()

    def moments(self) -> dict[str, Moments]:
        """Moments of all samples by tap, where rows are streamed; empty otherwise."""
        return self._everything()[2]

    def _everything(self) -> tuple[FeatureSet, FeatureSet, dict[str, Moments]]:
        self._settle()
        if self._shared is None:
            return self._thin, self._rows, self._sums
        thin, rows, sums = self._shared
        return (
            FeatureSet.join([thin, self._thin]),
            self._kept([rows, self._rows]),
            _added(sums, self._sums),
        )

    def _settle(self) -> None:
        new, self._new = FeatureSet.join(self._new), []
        if len(new) == 0:
            return
        if not self.streams:
            self._rows = FeatureSet.join([self._rows, new])
            return
        wide = {n: tap for n, tap in new.taps.items() if n.rpartition("/")[2] in _WIDE}
        sums = {name: Moments.of(tap) for name, tap in wide.items()}
        self._take(_thin(new), self._narrowed(new), sums)

    def _take(self, thin: FeatureSet, rows: FeatureSet, sums: dict[str, Moments]) -> None:
        self._thin = FeatureSet.join([self._thin, thin])
        self._rows = self._kept([self._rows, rows])
        self._sums = _added(self._sums, sums)

    def _narrowed(self, new: FeatureSet) -> FeatureSet:
        """The rows to keep of new samples: no spatial taps (only moments are ever used)."""
        features = new.only(("features",))
        taps = {name: tap.to(self.dtype) for name, tap in features.taps.items()}
        for name, tap in taps.items():
            if not bool(torch.isfinite(tap).all()):
                raise ValueError(f"{name} exceed the range of {self.dtype}; keep them in float32")
        return FeatureSet(taps, *features.columns)

    def _kept(self, parts: Sequence[FeatureSet]) -> FeatureSet:
        rows = FeatureSet.join(parts)
        if self.max_rows is None or len(rows) <= self.max_rows:
            return rows
        return rows.canonical().rows(torch.arange(self.max_rows))


def _thin(features: FeatureSet) -> FeatureSet:
    """Without the taps that take the memory."""
    return features.only(("logits", "score"))


def _added(a: dict[str, Moments], b: dict[str, Moments]) -> dict[str, Moments]:
    names = dict.fromkeys([*a, *b])
    return {
        name: a[name] + b[name] if name in a and name in b else a.get(name) or b[name]
        for name in names
    }
