"""All metrics in one feature pass, in any order and over any number of ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .bank import FeatureBank
from .decode import as_uint8
from .extractors import Extractor, cifar_extractor
from .features import FeatureSet, extract
from .findings import findings
from .gather import Share, world_size
from .inputs import CannotScore, Inputs
from .reference import Reference, statistics_for
from .report import EvalResult, Score
from .scorers import Scorer
from .scores import DEFAULT_METRICS, METRICS, scorer_score
from .settings import Settings, protocol
from .stats import Statistics


class EvalSuite:
    """Feed images, then ``compute`` every metric at once.

    Results do not depend on the order of samples, how they are batched, or how many ranks share
    them: whatever needs an order takes that of the samples' content.

    Args:
        metrics: names from ``scores.METRICS``, or one of them.
        extractors: one or several; the embedded CIFAR-10 network by default. Each runs once.
        settings: a protocol's name, or ``Settings``.
        reference: statistics (a file or ``Statistics``) for the first extractor. None takes the
            embedded CIFAR-10 test set if the extractor is the embedded one; real images may be fed
            by ``update(..., real=True)`` instead, and then replace it.
        force: accept statistics of another extractor.
        scorers: by the name of the score, callables from images and prompts to one value an image
            (``scorers.ClipScorer``, a reward); they see samples that come with prompts.
        max_rows: feature rows kept of each side: a random subset, which all that needs rows uses
            (precision, kernel distance, ...). Means and covariances still see every sample.
        row_dtype: float32, or float16 for half the memory (see ``bank.FeatureBank``).

    Raises:
        ValueError: on an unknown metric or protocol, or statistics that do not fit.
    """

    def __init__(
        self,
        metrics: Sequence[str] | str = DEFAULT_METRICS,
        *,
        extractors: Sequence[Extractor] | Extractor | None = None,
        settings: str | Settings = "default",
        reference: str | Path | Statistics | None = None,
        force: bool = False,
        scorers: Mapping[str, Scorer] | None = None,
        max_rows: int | None = None,
        row_dtype: torch.dtype = torch.float32,
    ) -> None:
        metrics = (metrics,) if isinstance(metrics, str) else metrics
        unknown = [name for name in metrics if name not in METRICS]
        if unknown or not metrics:
            raise ValueError(f"metrics must be among {', '.join(METRICS)}, got {unknown or 'none'}")
        if extractors is None:
            extractors = [cifar_extractor()]
        self.extractors = [extractors] if isinstance(extractors, Extractor) else list(extractors)
        self.metrics = tuple(metrics)
        self.settings = protocol(settings) if isinstance(settings, str) else settings
        self.scorers = dict(scorers or {})
        clash = {e.space for e in self.extractors} & set(self.scorers)
        if clash:
            raise ValueError(f"a scorer and an extractor are both called {clash.pop()!r}")
        self._fake, self._real = (FeatureBank(max_rows, row_dtype) for _ in range(2))
        self._statistics: dict[str, Statistics] = {}
        self._notes: list[str] = []
        self._known: tuple[int, Reference] | None = None
        self._seconds = 0.0
        if reference is not None:
            self.set_reference(reference, force=force)

    def set_reference(self, reference: str | Path | Statistics, *, force: bool = False) -> None:
        """Compare with statistics, in the space of the first extractor.

        Raises:
            ValueError: if they cannot be read or belong to another extractor.
        """
        first = self.extractors[0]
        if not isinstance(reference, Statistics):
            reference, notes = statistics_for(first, reference, force=force)
            self._notes += notes
        self._statistics[first.space], self._known = reference, None

    def update(
        self,
        images: Tensor | list[Tensor],
        *,
        labels: Tensor | Sequence[int] | None = None,
        index: Tensor | Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        real: bool = False,
    ) -> None:
        """Add images: uint8, or floats in [0, 1], (B, 3, H, W) or a list of (3, H, W).

        Args:
            images: an empty batch is welcome.
            labels: shape (B,), the classes that the samples were asked to show.
            index: shape (B,), the caller's numbers; repeats (a loader's padding) count once.
            prompts: what each image was asked to show: scored by the scorers, and the groups of the
                diversity score where there are no labels.
            real: the images are real ones, for the reference.

        Raises:
            TypeError: if images are of another integer type.
            ValueError: if floats leave [0, 1], labels do not fit, or features are not finite.
        """
        if len(images) == 0:
            return
        start = time.perf_counter()
        rule = self.settings.quantise
        images = (
            as_uint8(images, quantise=rule)
            if isinstance(images, Tensor)
            else [as_uint8(image, quantise=rule) for image in images]
        )
        found = extract(
            images, self.extractors, labels=_ints(labels), index=_ints(index), prompts=prompts,
            scorers=self.scorers,
        )  # fmt: skip
        self.add(found, real=real)
        self._seconds += time.perf_counter() - start

    def add(self, features: FeatureSet, *, real: bool = False) -> None:
        """Add features that were extracted before (from a cache, or by another suite)."""
        (self._real if real else self._fake).add(features)

    def merge_state(self, other: EvalSuite) -> None:
        """Add everything that another suite has seen.

        Raises:
            ValueError: if it uses other extractors.
        """
        mine, theirs = [e.id for e in self.extractors], [e.id for e in other.extractors]
        if mine != theirs:
            raise ValueError(f"cannot merge a suite with extractors {theirs} into one with {mine}")
        self._fake.merge(other._fake)
        self._real.merge(other._real)
        self._statistics, self._known = {**other._statistics, **self._statistics}, None

    def sync(self) -> None:
        """Share all samples among the ranks of ``torch.distributed``; a rank may have none.

        Afterwards every rank holds the same samples and computes the same numbers. Without a
        process group nothing happens.
        """
        self._fake.sync()
        self._real.sync()

    def reset(self, *, keep_reference: bool = False) -> None:
        """Forget the generated samples, and the real ones unless ``keep_reference``."""
        self._fake.clear()
        self._seconds = 0.0
        if not keep_reference:
            self._real.clear()
            self._statistics, self._notes, self._known = {}, [], None

    def seen(self, *, real: bool = False) -> FeatureSet:
        """The samples so far whose rows are kept, in the order of their content.

        After ``sync``: of all ranks.
        """
        return (self._real if real else self._fake).rows()

    def reference_features(self) -> Tensor | None:
        """Real rows in the first extractor's space, (N, d); None where only moments are known."""
        return self._reference().features(self.extractors[0].space)

    def compute(self, *, together: bool = False, progress: bool = False) -> EvalResult:
        """Every metric over everything seen so far; metrics that lack something say so.

        Args:
            together: all ranks call this after ``sync`` and share the work on neighbours; without
                it every rank computes for itself, and one alone may. No digit depends on it.
            progress: show a bar over the metrics, on a terminal.

        Raises:
            ValueError: if no generated sample was added.
        """
        every = self._fake.samples()
        if len(every) == 0:
            raise ValueError("no samples to evaluate: call update() with generated images first")
        start = time.perf_counter()
        reference = self._reference()
        share = Share.of_this_rank() if together else Share()
        kept = self._fake.rows() if self._fake.streams else None
        inputs = [
            Inputs(
                every, reference, extractor.space, self.settings, position == 0,
                bool(extractor.class_names), kept=kept, sums=self._fake.moments(), share=share,
                device=_computing_device(extractor.device),
            )
            for position, extractor in enumerate(self.extractors)
        ]  # fmt: skip
        scores: dict[str, Score] = {}
        skipped: dict[str, str] = {}
        work = [(name, given) for given in inputs for name in self.metrics
                if name != "colour" or given.primary]  # fmt: skip
        for name, given in tqdm(work, desc="metrics", disable=None if progress else True):
            try:
                scores.update({score.name: score for score in METRICS[name](given)})
            except CannotScore as reason:
                skipped[given.name(name)] = str(reason)
        for name, scorer in self.scorers.items():
            try:
                scores[name] = scorer_score(inputs[0], name, scorer)
            except CannotScore as reason:
                skipped[name] = str(reason)
        warnings = [*self._notes, *findings(every, reference, self.settings, inputs[0].space)]
        warnings += [warning for given in inputs for warning in given.warnings]
        per_class = {name: values for given in inputs for name, values in given.per_class.items()}
        curves = {name: points for given in inputs for name, points in given.curves.items()}
        meta = self._meta(every, reference, time.perf_counter() - start)
        return EvalResult(scores, meta, warnings, skipped, per_class, curves)

    def _reference(self) -> Reference:
        """What samples are compared with; its moments and factors are kept until it changes."""
        if self._known is None or self._known[0] != len(self._real):
            self._known = (len(self._real), self._build_reference())
        return self._known[1]

    def _build_reference(self) -> Reference:
        real = self._real.samples()
        statistics, first = dict(self._statistics), self.extractors[0]
        if len(real):
            kept = self._real.rows() if self._real.streams else real
            return Reference(kept, statistics, every=real, sums=self._real.moments())
        if not statistics and first.space == "cifar":
            # Not kept: real images that come later take its place.
            statistics[first.space], _ = statistics_for(first, None)
        return Reference(None, statistics)

    def _meta(self, fake: FeatureSet, reference: Reference, seconds: float) -> dict[str, object]:
        known = reference.statistics.get(self.extractors[0].space)
        n_real = len(reference.keys()) or (known.count if known is not None else None)
        return {
            "n_fake": len(fake),
            "n_real": n_real,
            "reference": "images" if reference.samples is not None else (known and known.where),
            "reference_header": known.header if known is not None else {},
            "settings": asdict(self.settings),
            "extractors": {e.space: e.id for e in self.extractors},
            "scorers": {
                name: getattr(s, "id", type(s).__name__) for name, s in self.scorers.items()
            },
            "ranks": world_size(),
            "rows": {"kept": self._fake.max_rows, "dtype": str(self._fake.dtype)},
            "weights": {e.space: e.digest for e in self.extractors},
            "versions": {"torch": torch.__version__},
            "seconds": {"features": self._seconds, "metrics": seconds},
        }


def _computing_device(device: torch.device) -> torch.device:
    """Where metrics are computed: beside the network if float64 works there."""
    return device if device.type == "cuda" else torch.device("cpu")


def _ints(values: Tensor | Sequence[int] | None) -> Tensor | None:
    if values is None or isinstance(values, Tensor):
        return values
    return torch.tensor(list(values), dtype=torch.int64)
