"""What metrics are computed from: the samples, the reference, and one feature space."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .features import FeatureSet
from .gather import Share
from .moments import Moments
from .prdc import PRDC
from .reference import Reference
from .settings import Settings


class CannotScore(Exception):
    """The metric lacks something; the message says what, and the other metrics go on."""


@dataclass
class Inputs:
    """What a metric may use: generated samples in canonical order, the reference, one space.

    Args:
        fake: all generated samples.
        reference: what they are compared with.
        space: of the features.
        settings: the protocol.
        primary: whether this is the first space, whose results have short names.
        classifies: whether the space's logits are classes of the data.
        kept: the samples whose rows of features are kept; all of ``fake`` by default.
        sums: moments of all samples by "space/tap", where only some rows are kept.
        share: this rank's part of the work on neighbours.
        device: that rows are brought to, to be computed with.
    """

    fake: FeatureSet
    reference: Reference
    space: str
    settings: Settings
    primary: bool = True
    classifies: bool = True
    kept: FeatureSet | None = None
    sums: dict[str, Moments] = field(default_factory=dict)
    share: Share = field(default_factory=Share)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    warnings: list[str] = field(default_factory=list)
    per_class: dict[str, list[float]] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    neighbours: dict[int, PRDC] = field(default_factory=dict)

    def tap(self, name: str = "features") -> Tensor:
        """Generated rows of a tap, (N, d): of all samples, or of those whose rows are kept."""
        wide = name in ("features", "spatial") and self.kept is not None
        held = self.kept if wide and self.kept is not None else self.fake
        rows = held.taps.get(f"{self.space}/{name}")
        if rows is None:
            raise CannotScore(f"the extractor of {self.space!r} gives no {name}")
        return rows.to(self.device)

    def moments(self, name: str) -> Moments:
        """Moments of a tap over all generated samples."""
        known = self.sums.get(f"{self.space}/{name}")
        return Moments.of(self.tap(name)) if known is None else known

    def real(self) -> Tensor:
        """Real feature rows, (M, d)."""
        rows = self.reference.features(self.space)
        if rows is None:
            raise CannotScore(
                "needs real features, and the reference holds only mean and covariance: pass real "
                "images, or statistics written with --features"
            )
        return rows.to(self.device)

    def labels(self) -> Tensor:
        """The classes that samples were conditioned on, (N,)."""
        if len(self.fake) == 0 or bool((self.fake.labels < 0).any()):
            raise CannotScore(
                "needs the label of every sample: a run.json with labels, sub-folders named by "
                "class, or --labels file.csv"
            )
        return self.fake.labels

    def name(self, metric: str) -> str:
        """The result's name: the first space has no suffix, others have theirs."""
        return metric if self.primary else f"{metric}-{self.space}"
