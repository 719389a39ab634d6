"""The same metrics as ``torchmetrics.Metric``: update, compute, reset, merge_state, sync.

For code that already collects torchmetrics. ``EvalSuite`` does more (one pass for all, order-free
numbers, warnings). Features go in, or images with an ``extractor``. States are merged by addition
or concatenation, so uneven and empty ranks are right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .accuracy import class_accuracy
from .cmmd import cmmd
from .content import canonical_order, content_keys
from .extractors import Extractor
from .frechet import frechet_distance_of_moments
from .inception_score import inception_score
from .kernel import kernel_distance
from .moments import Moments
from .prdc import prdc
from .vendi import vendi

try:
    from torchmetrics import Metric
except Exception as error:  # a broken torchvision makes this a RuntimeError, not an ImportError
    raise ImportError(
        f"these metrics need a torchmetrics that imports ({error}); if torchvision is to blame, "
        "install torch and torchvision from the same index, or use diffsteer.eval.EvalSuite"
    ) from error


class _Features(Metric):
    """Turns images into features if there is an extractor."""

    full_state_update = False
    is_differentiable = False
    tap = "features"

    def __init__(self, dim: int, extractor: Extractor | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.dim, self.extractor = dim, extractor

    def _rows(self, values: Tensor) -> Tensor:
        if self.extractor is None:
            if values.ndim != 2 or not values.is_floating_point():
                raise ValueError(
                    f"expected {self.tap} of shape (B, {self.dim}), got {tuple(values.shape)} of "
                    f"{values.dtype}; pass extractor=... to feed images"
                )
            rows: Tensor | None = values.detach()
        else:
            rows = getattr(self.extractor(values), self.tap)
        if rows is None:
            raise ValueError(f"the extractor gives no {self.tap}")
        if rows.shape[1] != self.dim:
            raise ValueError(f"expected {self.dim} {self.tap}, got {rows.shape[1]}")
        return rows


class FrechetDistance(_Features):
    """Fréchet distance of real and generated features; see ``frechet.frechet_distance``.

    Args:
        dim: number of features, so that an empty rank knows the shape of its state.
        extractor: turns uint8 images into features; None takes features.
        options: of ``torchmetrics.Metric``.
    """

    higher_is_better = False
    real_sums: Tensor
    fake_sums: Tensor

    def __init__(self, dim: int, extractor: Extractor | None = None, **options: Any) -> None:
        super().__init__(dim, extractor, **options)
        for side in ("real", "fake"):
            self.add_state(f"{side}_sums", Moments.zero(dim).packed(), dist_reduce_fx=_add_packed)

    def update(self, values: Tensor, *, real: bool) -> None:
        """Add features (B, dim), or images where there is an extractor."""
        found, name = Moments.of(self._rows(values)), "real_sums" if real else "fake_sums"
        sums = Moments.unpacked(getattr(self, name).to(found.mean.device)) + found
        setattr(self, name, sums.packed().to(self.device))

    def compute(self) -> Tensor:
        """The distance as a float64 scalar."""
        sides = (Moments.unpacked(sums) for sums in (self.real_sums, self.fake_sums))
        return _number(frechet_distance_of_moments(*sides))

    def set_dtype(self, dst_type: str | torch.dtype) -> FrechetDistance:
        """Does nothing: the sums stay float64."""
        return self


def _add_packed(rows: Tensor) -> Tensor:
    return Moments.merge(Moments.unpacked(row) for row in rows).packed()


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


class _Banks(_Features):
    """Keeps rows in lists, which torchmetrics gathers at any length."""

    def _bank(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self.add_state(name, [], dist_reduce_fx="cat")
        self._empty = {**getattr(self, "_empty", {}), name: torch.zeros(0, *shape, dtype=dtype)}

    def all_rows(self, name: str) -> Tensor:
        """All rows of a bank, (N, ...); none is an empty tensor."""
        held = getattr(self, name)
        return torch.cat([self._empty[name].to(self.device), *held]) if isinstance(
            held, list) else held  # fmt: skip

    def sync(self, *arguments: Any, **options: Any) -> None:
        """As torchmetrics, but a rank without samples takes part instead of failing."""
        for name, empty in self._empty.items():
            held = getattr(self, name)
            if isinstance(held, list) and not held:
                held.append(empty.to(self.device))
        super().sync(*arguments, **options)

    def _add(self, name: str, values: Tensor) -> None:
        getattr(self, name).append(self._rows(values).float().to(self.device))

    def _sorted(self, name: str) -> Tensor:
        """All rows in the order of their content: that of arrival never matters."""
        rows = self.all_rows(name)
        return rows[canonical_order(content_keys(rows)).to(rows.device)]


class _TwoSided(_Banks):
    """Compares real with generated samples."""

    def __init__(self, dim: int, extractor: Extractor | None = None, **options: Any) -> None:
        super().__init__(dim, extractor, **options)
        self._bank("real_rows", dim)
        self._bank("fake_rows", dim)

    def update(self, values: Tensor, *, real: bool) -> None:
        """Add features (B, dim), or images where there is an extractor."""
        self._add("real_rows" if real else "fake_rows", values)

    def _sides(self) -> tuple[Tensor, Tensor]:
        return self._sorted("real_rows"), self._sorted("fake_rows")


class _Generated(_Banks):
    """Scores generated samples alone."""

    def __init__(self, dim: int, extractor: Extractor | None = None, **options: Any) -> None:
        super().__init__(dim, extractor, **options)
        self._bank("fake_rows", dim)

    def update(self, values: Tensor, *, real: bool = False) -> None:
        """Add features (B, dim), or images; of real ones, which a collection hands to all, none."""
        if not real:
            self._add("fake_rows", values)


class KernelDistance(_TwoSided):
    """All-sample unbiased kernel distance (KID); see ``kernel.kernel_distance``."""

    higher_is_better = False

    def compute(self) -> tuple[Tensor, Tensor]:
        """Value and standard error."""
        found = kernel_distance(*self._sides())
        return _number(found.value), _number(found.stderr)


class PrecisionRecall(_TwoSided):
    """Precision, recall, density, coverage; see ``prdc.prdc``.

    Args:
        dim: number of features.
        k: the neighbour.
        strict: whether balls exclude their surface.
        extractor: turns uint8 images into features; None takes features.
        options: of ``torchmetrics.Metric``.
    """

    higher_is_better = True

    def __init__(
        self, dim: int, *, k: int = 3, strict: bool = False, extractor: Extractor | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(dim, extractor, **options)
        self.k, self.strict = k, strict

    def compute(self) -> dict[str, Tensor]:
        """The four scores by name."""
        found = prdc(*self._sides(), self.k, strict=self.strict)
        names = ("precision", "recall", "density", "coverage")
        return {name: _number(getattr(found, name)) for name in names}


class CMMD(_TwoSided):
    """CMMD; see ``cmmd.cmmd``."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """The distance."""
        return _number(cmmd(*self._sides()))


class Vendi(_Generated):
    """Vendi score of the generated samples; see ``vendi.vendi``."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """The effective number of different samples."""
        return _number(vendi(self._sorted("fake_rows")))


class InceptionScore(_Generated):
    """Inception Score over splits in the order of content; ``dim`` is the number of classes.

    Args:
        dim: number of classes.
        splits: see ``inception_score.inception_score``.
        extractor: gives logits; None takes logits.
        options: of ``torchmetrics.Metric``.
    """

    higher_is_better = True
    tap = "logits"

    def __init__(
        self, dim: int, *, splits: int = 10, extractor: Extractor | None = None, **options: Any
    ) -> None:
        super().__init__(dim, extractor, **options)
        self.splits = splits

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and spread over splits."""
        found = inception_score(self._sorted("fake_rows"), splits=self.splits, seed=None)
        return _number(found.value), _number(found.stderr)


class ClassAccuracy(_Banks):
    """Top-1, top-5 and macro precision against the labels; see ``accuracy.class_accuracy``.

    Args:
        dim: number of classes.
        extractor: gives logits; None takes logits.
        options: of ``torchmetrics.Metric``.
    """

    higher_is_better = True
    tap = "logits"
    labels: list[Tensor]

    def __init__(self, dim: int, extractor: Extractor | None = None, **options: Any) -> None:
        super().__init__(dim, extractor, **options)
        self._bank("logits", dim)
        self._bank("labels", dtype=torch.int64)

    def update(self, values: Tensor, labels: Tensor) -> None:
        """Add logits (B, dim), or images where there is an extractor, and labels (B,)."""
        if labels.shape != (len(values),):
            raise ValueError(f"expected {len(values)} labels, got {tuple(labels.shape)}")
        self._add("logits", values)
        self.labels.append(labels.to(self.device, torch.int64))

    def compute(self) -> dict[str, Tensor]:
        """The three scores by name."""
        found = class_accuracy(self.all_rows("logits"), self.all_rows("labels"))
        names = ("top1", "top5", "macro_precision")
        return {name: _number(getattr(found, name)) for name in names}


__all__ = [
    "CMMD",
    "ClassAccuracy",
    "FrechetDistance",
    "InceptionScore",
    "KernelDistance",
    "PrecisionRecall",
    "Vendi",
]
