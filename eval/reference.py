"""What samples are compared with: real features, or statistics of them, in each feature space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .extractors import Extractor
from .features import FeatureSet
from .moments import Moments
from .stats import Statistics, read_statistics

EMBEDDED = Path(__file__).resolve().parent / "embedded" / "cifar10_test.npz"

# Feature spaces by their size, for files that do not say where they come from.
_KNOWN_SIZES = {2048: "inception", 1024: "dinov2", 768: "clip"}


@dataclass
class Reference:
    """Real samples as features (``samples``), as statistics by space, or both.

    Args:
        samples: real samples whose rows are kept, in the order of content.
        statistics: by space, from files.
        every: all real samples, if only some rows are kept.
        sums: moments of all real samples by "space/tap", if only some rows are kept.
    """

    samples: FeatureSet | None = None
    statistics: dict[str, Statistics] = field(default_factory=dict)
    every: FeatureSet | None = None
    sums: dict[str, Moments] = field(default_factory=dict)
    _found: dict[tuple[str, str], Statistics | None] = field(default_factory=dict, repr=False)

    def features(self, space: str) -> Tensor | None:
        """Rows in canonical order, (N, d), or None where only moments are known."""
        if self.samples is not None:
            return self.samples.taps.get(f"{space}/features")
        known = self.statistics.get(space)
        return None if known is None else known.features

    def all_features(self, space: str) -> Tensor | None:
        """The rows if they are those of every real sample, else None."""
        return None if self.samples is None or self.sums else self.features(space)

    def gaussian_of(self, space: str, tap: str = "features") -> Statistics | None:
        """Mean and covariance in a space, computed once, or None where nothing is known of it."""
        if (space, tap) not in self._found:
            self._found[space, tap] = self._gaussian_of(space, tap)
        return self._found[space, tap]

    def _gaussian_of(self, space: str, tap: str) -> Statistics | None:
        known = self.statistics.get(space)
        if known is not None and tap == "features":
            return known
        if known is not None and tap == "spatial" and known.spatial is not None:
            return Statistics(*known.spatial, known.count, where=known.where)
        sums = self.sums.get(f"{space}/{tap}")
        rows = None if self.samples is None else self.samples.taps.get(f"{space}/{tap}")
        if sums is None and rows is not None and len(rows) > 1:
            sums = Moments.of(rows)
        if sums is None or sums.count < 2:
            return None
        return Statistics.of_moments(sums, where="the reference images")

    def count(self, space: str) -> int | None:
        """How many real samples there are, or None where a file does not say."""
        if len(self.keys()):
            return len(self.keys())
        known = self.statistics.get(space)
        return None if known is None else known.count

    @property
    def labels(self) -> Tensor | None:
        """Labels of all real samples, None where unknown."""
        known = self.every if self.every is not None else self.samples
        return None if known is None else known.labels

    def keys(self) -> Tensor:
        """Content keys of the real samples, to find copies; empty where unknown."""
        known = self.every if self.every is not None else self.samples
        return torch.empty(0, dtype=torch.int64) if known is None else known.keys


def statistics_for(
    extractor: Extractor, where: str | Path | None, *, force: bool = False
) -> tuple[Statistics, list[str]]:
    """Read statistics and check that they belong to ``extractor``.

    Args:
        extractor: the samples go through.
        where: the file; None takes the embedded CIFAR-10 test set.
        force: accept statistics of another extractor.

    Returns:
        The statistics, and remarks for the result.

    Raises:
        ValueError: if the file is unreadable, or belongs to another extractor and ``force`` is not
            set.
    """
    if where is None:
        if extractor.space != "cifar":
            raise ValueError(
                f"there are no embedded statistics for the space {extractor.space!r}; pass a "
                "reference: real images, or statistics made by `evaluate.py stats`"
            )
        where = EMBEDDED
    edm2_space = {"inception": "fid", "dinov2": "fd_dinov2"}.get(extractor.space)
    found = read_statistics(where, space=edm2_space)
    if found.extractor is None:
        guess = _KNOWN_SIZES.get(found.dim, "an unknown space")
        remark = (
            f"{where} does not say which extractor made it; with {found.dim} dimensions it is "
            f"taken for {guess}, and compared with {extractor.id}"
        )
        return found, [remark]
    if found.extractor != extractor.id and not force:
        raise ValueError(
            f"{where} was made with the extractor {found.extractor}, but the samples go through "
            f"{extractor.id}; distances between the two mean nothing. Make new statistics with "
            "`evaluate.py stats`, or pass --force"
        )
    remarks = (
        [] if found.extractor == extractor.id else [f"{where} is of another extractor (--force)"]
    )
    return found, remarks


def statistics_of(
    samples: FeatureSet, extractor: Extractor, *, rows: int | None = 0, **header: object
) -> Statistics:
    """Statistics of real samples, ready to be written.

    Args:
        samples: from ``extract``.
        extractor: they went through.
        rows: how many feature rows to keep for precision, recall and kernel distances: 0 for none,
            None for all. They are the first in the order of content, so a random subset.
        header: further entries of the file's header.
    """
    ordered = samples.canonical()
    features = ordered.taps[f"{extractor.space}/features"]
    spatial = ordered.taps.get(f"{extractor.space}/spatial")
    kept = slice(None) if rows is None else slice(rows)
    with_rows = rows is None or rows > 0
    known = bool((ordered.labels >= 0).all())
    # Written as float16: the moments are those of the rows as they were.
    moments = None if spatial is None else Moments.of(spatial)
    return Statistics.of_moments(
        Moments.of(features),
        extractor=extractor.id,
        features=features[kept] if with_rows else None,
        labels=ordered.labels[kept] if with_rows and known else None,
        spatial=None if moments is None else (moments.mean, moments.covariance),
        header={"space": extractor.space, **header},
    )


def find_extractor(extractors: Sequence[Extractor], space: str) -> Extractor:
    """The extractor of a space.

    Raises:
        ValueError: if there is none.
    """
    for extractor in extractors:
        if extractor.space == space:
            return extractor
    raise ValueError(f"no extractor for the space {space!r} among {[e.space for e in extractors]}")
