"""Everything that metrics need to know of a set of images, gathered in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .colour import ColourStats, colour_stats
from .content import canonical_order, content_keys
from .extractors import Extractor


@dataclass(frozen=True)
class FeatureSet:
    """Per-sample values of N samples; sets add, and a canonical order makes them order-free.

    Args:
        taps: by "space/tap" (tap: features, logits or spatial), shape (N, d), float32.
        keys: shape (N,), int64, the content of each sample (see ``content``).
        labels: shape (N,), int64, -1 where unknown.
        index: shape (N,), int64, the caller's number for each sample, -1 where not given.
        colour: shape (N, 3): saturation, contrast, clipped share; NaN where unknown.
    """

    taps: dict[str, Tensor] = field(default_factory=dict)
    keys: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    colour: Tensor = field(default_factory=lambda: torch.empty(0, 3))

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, which: Tensor) -> FeatureSet:
        """The samples that ``which`` picks: indices or a mask, (M,) or (N,)."""
        taps = {name: tap[which] for name, tap in self.taps.items()}
        return FeatureSet(
            taps, self.keys[which], self.labels[which], self.index[which], self.colour[which]
        )

    def canonical(self) -> FeatureSet:
        """The same samples in the order of their content, without repeats of an index.

        A repeated index is a sample that a data loader repeated to fill a batch.
        """
        known = self.index >= 0
        ordered = self.rows(torch.argsort(self.index, stable=True)) if bool(known.any()) else self
        first = torch.ones(len(self), dtype=torch.bool)
        if len(self) > 1:
            first[1:] = (ordered.index[1:] != ordered.index[:-1]) | (ordered.index[1:] < 0)
        ordered = ordered.rows(first)
        # Labels break ties between copies: a copy asked to show another class is another sample.
        ordered = ordered.rows(torch.argsort(ordered.labels, stable=True))
        return ordered.rows(canonical_order(ordered.keys))

    @classmethod
    def join(cls, parts: Sequence[FeatureSet]) -> FeatureSet:
        """All samples of ``parts``, in their order; empty parts are welcome.

        Raises:
            ValueError: if two parts were made with different extractors.
        """
        filled = [part for part in parts if len(part)]
        if not filled:
            return parts[0] if parts else cls()
        names = filled[0].taps.keys()
        for part in filled[1:]:
            if part.taps.keys() != names:
                raise ValueError(
                    f"cannot join features of {sorted(names)} with those of {sorted(part.taps)}"
                )
        return cls(
            {name: torch.cat([part.taps[name] for part in filled]) for name in names},
            torch.cat([part.keys for part in filled]),
            torch.cat([part.labels for part in filled]),
            torch.cat([part.index for part in filled]),
            torch.cat([part.colour for part in filled]),
        )


def extract(
    images: Tensor | list[Tensor],
    extractors: Sequence[Extractor],
    *,
    labels: Tensor | None = None,
    index: Tensor | None = None,
) -> FeatureSet:
    """One forward pass of each extractor over uint8 images, and everything else that is measured.

    Args:
        images: uint8, shape (B, 3, H, W), or a list of (3, H, W).
        extractors: each runs once.
        labels: shape (B,), integer; -1 for unknown.
        index: shape (B,), integer numbers of the samples; repeats are counted once.

    Raises:
        ValueError: if labels or index do not fit the images.
    """
    count = len(images)
    for name, given in (("labels", labels), ("index", index)):
        if given is not None and given.shape != (count,):
            raise ValueError(f"{name} must have shape ({count},), got {tuple(given.shape)}")
    unknown = torch.full((count,), -1, dtype=torch.int64)
    taps = {}
    for extractor in extractors:
        found = extractor(images)
        for tap in ("features", "logits", "spatial"):
            value = getattr(found, tap)
            if value is not None:
                taps[f"{extractor.space}/{tap}"] = value
    return FeatureSet(
        taps,
        content_keys(images),
        unknown if labels is None else labels.cpu().to(torch.int64),
        unknown if index is None else index.cpu().to(torch.int64),
        _colour(images),
    )


def _colour(images: Tensor | list[Tensor]) -> Tensor:
    if isinstance(images, Tensor):
        return _columns(colour_stats(images))
    return torch.cat([_columns(colour_stats(image[None])) for image in images])


def _columns(stats: ColourStats) -> Tensor:
    return torch.stack([stats.saturation, stats.contrast, stats.clipped], 1).cpu()
