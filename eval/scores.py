"""One function a metric: from two feature sets to scores. Adding a metric adds one and a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .accuracy import class_accuracy
from .cmmd import cmmd
from .colour import mean_and_stderr
from .fd_infinity import fd_infinity
from .features import FeatureSet
from .frechet import frechet_distance_from_features, frechet_distance_to
from .inception_score import inception_score
from .kernel import kernel_distance, kernel_distance_subsets
from .memorisation import authentic, realism
from .moments import Moments
from .prdc import PRDC, prdc
from .reference import Reference
from .report import Score
from .settings import Settings
from .vendi import mean_cosine_distance, vendi


class CannotScore(Exception):
    """The metric lacks something; the message says what, and the other metrics go on."""


@dataclass
class Inputs:
    """What a metric may use: generated samples in canonical order, the reference, one space."""

    fake: FeatureSet
    reference: Reference
    space: str
    settings: Settings
    primary: bool = True
    classifies: bool = True
    warnings: list[str] = field(default_factory=list)
    per_class: dict[str, list[float]] = field(default_factory=dict)
    neighbours: dict[int, PRDC] = field(default_factory=dict)

    def tap(self, name: str = "features") -> Tensor:
        """Generated rows of a tap, (N, d)."""
        rows = self.fake.taps.get(f"{self.space}/{name}")
        if rows is None:
            raise CannotScore(f"the extractor of {self.space!r} gives no {name}")
        return rows

    def real(self) -> Tensor:
        """Real feature rows, (M, d)."""
        rows = self.reference.features(self.space)
        if rows is None:
            raise CannotScore(
                "needs real features, and the reference holds only mean and covariance: pass real "
                "images, or statistics written with --features"
            )
        return rows

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


def _distance_name(metric: str, space: str) -> str:
    """``fid`` and ``kid`` are names of Inception's space alone; others carry theirs."""
    return {"fd": "fid", "kid": "kid", "sfd": "sfid"}[metric] if space == "inception" else (
        f"{metric}-{space}"
    )  # fmt: skip


def fd(given: Inputs) -> Iterator[Score]:
    """Fréchet distance, through covariance factors where there are fewer samples than features."""
    yield from _frechet(given, "features", "fd")


def sfid(given: Inputs) -> Iterator[Score]:
    """Fréchet distance of spatial features (ADM's sFID)."""
    yield from _frechet(given, "spatial", "sfd")


def _frechet(given: Inputs, tap: str, metric: str) -> Iterator[Score]:
    fake, known = given.tap(tap), given.reference.gaussian_of(given.space, tap)
    if known is None:
        raise CannotScore(f"the reference has no {tap} statistics in the space {given.space!r}")
    if len(fake) < 2:
        raise CannotScore("needs at least 2 samples")
    count, dim = len(fake), fake.shape[1]
    if min(count, known.count or count) <= dim:
        real_count = known.count or "an unknown number of"
        given.warnings.append(
            f"{_distance_name(metric, given.space)}: {count} generated and {real_count} real "
            f"samples for {dim} features: the covariance is rank-deficient and the distance biased "
            "upward; compare at equal N only, or use kid or fd_infinity"
        )
    real = given.reference.features(given.space) if tap == "features" else None
    # The reference's rows may be a part of what its moments were taken from.
    whole = real is not None and given.reference.samples is not None
    if real is not None and whole and max(count, len(real)) <= dim:
        value = frechet_distance_from_features(real, fake)
    else:
        moments = Moments.of(fake)
        value = frechet_distance_to(known.gaussian(), moments.mean, moments.covariance)
    yield Score(_distance_name(metric, given.space), value, None, False, count)


def fd_inf(given: Inputs) -> Iterator[Score]:
    """Fréchet distance extrapolated to infinitely many generated samples."""
    known = given.reference.gaussian_of(given.space)
    if known is None:
        raise CannotScore(f"the reference has no statistics in the space {given.space!r}")
    try:
        found = fd_infinity(known.gaussian(), given.tap())
    except ValueError as error:
        raise CannotScore(str(error)) from error
    name = _distance_name("fd", given.space) + "-infinity"
    yield Score(name, found.value, found.stderr, False, len(given.fake))


def kid(given: Inputs) -> Iterator[Score]:
    """Kernel distance over all samples, and over random subsets where the protocol asks."""
    real, fake, settings = given.real(), given.tap(), given.settings
    if min(len(real), len(fake)) < 2:
        raise CannotScore("needs at least 2 samples a side")
    name = _distance_name("kid", given.space)
    found = kernel_distance(real, fake)
    yield Score(name, found.value, found.stderr, False, len(fake))
    if settings.kid_subsets:
        size = min(1000, len(real), len(fake))
        if size < 1000:
            given.warnings.append(f"kid-subsets: subsets of {size} instead of 1000 samples")
        convention = "torch-fidelity" if settings.seed else "clean-fid"
        found = kernel_distance_subsets(
            real, fake, subsets=settings.kid_subsets, subset_size=size, seed=settings.seed,
            convention=convention,
        )  # fmt: skip
        yield Score(f"{name}-subsets", found.value, found.stderr, False, len(fake))


def _neighbours(given: Inputs) -> PRDC:
    settings = given.settings
    if settings.k not in given.neighbours:  # precision/recall and density/coverage share a pass
        real, fake = given.real()[: settings.neighbours_real], given.tap()
        fake = fake[: settings.neighbours_fake]
        if min(len(real), len(fake)) <= settings.k:
            raise CannotScore(
                f"k = {settings.k} needs more than {settings.k} samples a side, got {len(real)} "
                f"real and {len(fake)} generated"
            )
        if len(real) != len(fake):
            given.warnings.append(
                f"precision and recall compare {len(real)} real with {len(fake)} generated "
                "samples; they depend on both counts"
            )
        given.neighbours[settings.k] = prdc(real, fake, settings.k, strict=settings.strict)
    return given.neighbours[settings.k]


def pr(given: Inputs) -> Iterator[Score]:
    """Precision and recall."""
    found = _neighbours(given)
    yield Score(given.name("precision"), found.precision, None, True, found.n_fake)
    yield Score(given.name("recall"), found.recall, None, True, found.n_fake)


def dc(given: Inputs) -> Iterator[Score]:
    """Density and coverage."""
    found = _neighbours(given)
    yield Score(given.name("density"), found.density, None, True, found.n_fake)
    yield Score(given.name("coverage"), found.coverage, None, True, found.n_fake)


def inception(given: Inputs) -> Iterator[Score]:
    """Inception Score; splits follow the order of content, which is random and reproducible."""
    logits, settings = given.tap("logits"), given.settings
    if settings.split_size is None and settings.splits > len(logits):
        raise CannotScore(f"{settings.splits} splits need as many samples, got {len(logits)}")
    found = inception_score(
        logits, splits=settings.splits, split_size=settings.split_size, seed=None
    )
    name = "inception_score" if given.space == "inception" else f"is-{given.space}"
    yield Score(name, found.value, found.stderr, True, len(logits))


def accuracy(given: Inputs) -> Iterator[Score]:
    """Top-1, top-5 and macro precision of the extractor's classifier against the labels."""
    logits, labels = given.tap("logits"), given.labels()
    if not given.classifies:
        raise CannotScore(f"the extractor of {given.space!r} is no classifier of these classes")
    if int(labels.max()) >= logits.shape[1]:
        raise CannotScore(
            f"label {int(labels.max())} is no class of a classifier with {logits.shape[1]} classes"
        )
    found, count = class_accuracy(logits, labels), len(labels)
    yield Score(given.name("accuracy"), found.top1, found.stderr, True, count)
    yield Score(given.name("accuracy_top5"), found.top5, None, True, count)
    yield Score(given.name("macro_precision"), found.macro_precision, None, True, count)
    given.per_class[given.name("accuracy")] = found.per_class.tolist()
    if found.never_predicted:
        given.warnings.append(f"macro_precision: {found.never_predicted} classes never predicted")


def colour(given: Inputs) -> Iterator[Score]:
    """Saturation, contrast, clipped pixels; neither direction is better, so compare with real."""
    for column, name in enumerate(("saturation", "contrast", "clipped")):
        values = given.fake.colour[:, column]
        value, stderr = mean_and_stderr(values)
        yield Score(name, value, stderr, None, len(values))


def cmmd_score(given: Inputs) -> Iterator[Score]:
    """CMMD: Gaussian-kernel distance of unit features."""
    name = "cmmd" if given.space == "clip" else f"cmmd-{given.space}"
    yield Score(name, cmmd(given.real(), given.tap()), None, False, len(given.fake))


def vendi_score(given: Inputs) -> Iterator[Score]:
    """Vendi score of the generated samples."""
    yield Score(given.name("vendi"), vendi(given.tap()), None, True, len(given.fake))


def diversity(given: Inputs) -> Iterator[Score]:
    """Mean cosine distance of two samples of a class, or of all samples without labels."""
    labels = given.fake.labels
    groups = labels if bool((labels >= 0).all()) else None
    try:
        value = mean_cosine_distance(given.tap(), groups)
    except ValueError as error:
        raise CannotScore(str(error)) from error
    yield Score(given.name("diversity"), value, None, True, len(given.fake))


def realism_score(given: Inputs) -> Iterator[Score]:
    """Mean realism."""
    if len(given.real()) <= given.settings.k:
        raise CannotScore(f"needs more than k = {given.settings.k} real samples")
    scores = realism(given.real(), given.tap(), given.settings.k)
    finite = scores[torch.isfinite(scores)]  # a copy of a real sample is infinitely real
    value, stderr = mean_and_stderr(finite)
    yield Score(given.name("realism"), value, stderr, True, len(finite))


def authpct(given: Inputs) -> Iterator[Score]:
    """Share of samples that are no copies, in percent."""
    if len(given.real()) < 2:
        raise CannotScore("needs at least 2 real samples")
    value, stderr = mean_and_stderr(100 * authentic(given.real(), given.tap()).double())
    yield Score(given.name("authpct"), value, stderr, True, len(given.fake))


METRICS: dict[str, Callable[[Inputs], Iterator[Score]]] = {
    "fd": fd, "kid": kid, "pr": pr, "dc": dc, "is": inception, "accuracy": accuracy,
    "colour": colour, "fd_infinity": fd_inf, "sfid": sfid, "cmmd": cmmd_score,
    "vendi": vendi_score, "diversity": diversity, "realism": realism_score, "authpct": authpct,
}  # fmt: skip
DEFAULT_METRICS = ("fd", "kid", "pr", "dc", "accuracy", "colour")
