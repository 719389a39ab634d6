"""One function a metric: from two feature sets to scores. Adding a metric adds one and a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .accuracy import class_accuracy
from .adm_float16 import prdc_adm_float16
from .cmmd import cmmd
from .colour import mean_and_stderr
from .fd_infinity import fd_infinity
from .frechet import frechet_distance_from_features, frechet_distance_to
from .inception_score import inception_score
from .inputs import CannotScore, Inputs
from .kernel import kernel_distance, kernel_distance_subsets
from .memorisation import authentic, realism
from .prdc import PRDC, prdc
from .report import Score
from .scorers import Scorer
from .vendi import mean_cosine_distance, vendi

CURVE_KS = (1, 2, 3, 5, 10, 20)
OVER_K = "-over-k"  # how the names of these curves end


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
    sums, known = given.moments(tap), given.reference.gaussian_of(given.space, tap)
    name, count, dim = _distance_name(metric, given.space), sums.count, sums.dim
    if known is None:
        raise CannotScore(f"the reference has no {tap} statistics in the space {given.space!r}")
    if count < 2:
        raise CannotScore("needs at least 2 samples")
    if min(count, known.count or count) <= dim:
        real_count = known.count or "an unknown number of"
        given.warnings.append(
            f"{name}: {count} generated and {real_count} real samples for {dim} features: the "
            "covariance is rank-deficient and the distance biased upward; compare at equal N only, "
            "or use kid or fd_infinity"
        )
    rows = None if given.sums or tap != "features" else given.reference.all_features(given.space)
    if rows is not None and max(count, len(rows)) <= dim:
        value = frechet_distance_from_features(rows.to(given.device), given.tap(tap))
    else:
        value = frechet_distance_to(known.gaussian(), sums.mean, sums.covariance, rank=count - 1)
    if value <= 1e-12 * float(sums.scatter.trace()) / (count - 1):
        given.warnings.append(f"{name}: zero to rounding error; are these the same images?")
    yield Score(name, value, None, False, count)


def fd_inf(given: Inputs) -> Iterator[Score]:
    """Fréchet distance extrapolated to infinitely many generated samples."""
    known = given.reference.gaussian_of(given.space)
    if known is None:
        raise CannotScore(f"the reference has no statistics in the space {given.space!r}")
    rows = given.tap()
    try:
        found = fd_infinity(known.gaussian(), rows)
    except ValueError as error:
        raise CannotScore(str(error)) from error
    name = _distance_name("fd", given.space) + "-infinity"
    given.curves[name] = [found.counts.tolist(), found.distances.tolist()]
    yield Score(name, found.value, found.stderr, False, len(rows))


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
        found = kernel_distance_subsets(
            real, fake, subsets=settings.kid_subsets, subset_size=size, seed=settings.seed,
            convention=settings.kid_convention,
        )  # fmt: skip
        yield Score(f"{name}-subsets", found.value, found.stderr, False, len(fake))


def _neighbours(given: Inputs, k: int | None = None) -> PRDC:
    settings = given.settings
    k = k or settings.k
    if k not in given.neighbours:  # precision/recall and density/coverage share a pass
        real, fake = given.real()[: settings.neighbours_real], given.tap()
        fake = fake[: settings.neighbours_fake]
        if min(len(real), len(fake)) <= k:
            raise CannotScore(
                f"k = {k} needs more than {k} samples a side, got {len(real)} real and "
                f"{len(fake)} generated"
            )
        if len(real) != len(fake) and not given.neighbours:
            given.warnings.append(
                f"precision and recall compare {len(real)} real with {len(fake)} generated "
                "samples; they depend on both counts"
            )
        if settings.distances == "adm-float16":
            given.neighbours[k] = prdc_adm_float16(real, fake, k)
        else:
            given.neighbours[k] = prdc(real, fake, k, strict=settings.strict, share=given.share)
    return given.neighbours[k]


def pr(given: Inputs) -> Iterator[Score]:
    """Precision and recall."""
    found = _neighbours(given)
    name, error = given.name("precision"), found.precision_stderr
    yield Score(name, found.precision, error, True, found.n_fake)
    yield Score(given.name("recall"), found.recall, None, True, found.n_fake)


def dc(given: Inputs) -> Iterator[Score]:
    """Density and coverage."""
    found = _neighbours(given)
    yield Score(given.name("density"), found.density, found.density_stderr, True, found.n_fake)
    yield Score(given.name("coverage"), found.coverage, None, True, found.n_fake)


def over_k(given: Inputs) -> Iterator[Score]:
    """Curves of precision, recall, density and coverage over k; a pass over neighbours each."""
    smaller = min(len(given.real()), len(given.tap()))
    wanted = [k for k in sorted({*CURVE_KS, given.settings.k}) if k < smaller]
    if not wanted:
        raise CannotScore("needs at least 2 samples a side")
    found = [_neighbours(given, k) for k in wanted]
    for name in ("precision", "recall", "density", "coverage"):
        values = [float(getattr(scores, name)) for scores in found]
        given.curves[given.name(name) + OVER_K] = [[float(k) for k in wanted], values]
    yield from ()


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
    error = (found.top5 * (1 - found.top5) / count) ** 0.5
    yield Score(given.name("accuracy_top5"), found.top5, error, True, count)
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
    fake = given.tap()
    yield Score(name, cmmd(given.real(), fake), None, False, len(fake))


def vendi_score(given: Inputs) -> Iterator[Score]:
    """Vendi score of the generated samples."""
    fake = given.tap()
    yield Score(given.name("vendi"), vendi(fake), None, True, len(fake))


def diversity(given: Inputs) -> Iterator[Score]:
    """Mean cosine distance of two samples of a class, or of a prompt, or of all samples."""
    held = given.fake if given.kept is None else given.kept
    known = [ids for ids in (held.labels, held.prompts) if bool((ids >= 0).all())]
    try:
        value = mean_cosine_distance(given.tap(), known[0] if known else None)
    except ValueError as error:
        raise CannotScore(str(error)) from error
    yield Score(given.name("diversity"), value, None, True, len(held))


def realism_score(given: Inputs) -> Iterator[Score]:
    """Mean realism."""
    real, k = given.real(), given.settings.k
    if len(real) <= k:
        raise CannotScore(f"needs more than k = {k} real samples")
    scores = realism(real, given.tap(), k, share=given.share)
    finite = scores[torch.isfinite(scores)]  # a copy of a real sample is infinitely real
    value, stderr = mean_and_stderr(finite)
    yield Score(given.name("realism"), value, stderr, True, len(finite))


def authpct(given: Inputs) -> Iterator[Score]:
    """Share of samples that are no copies, in percent."""
    real = given.real()
    if len(real) < 2:
        raise CannotScore("needs at least 2 real samples")
    genuine = authentic(real, given.tap(), share=given.share)
    value, stderr = mean_and_stderr(100 * genuine.double())
    yield Score(given.name("authpct"), value, stderr, True, len(genuine))


def scorer_score(given: Inputs, name: str, scorer: Scorer) -> Score:
    """Mean of a scorer over samples with prompts; values that are not finite are left out."""
    values = given.fake.taps.get(f"{name}/score")
    if values is None:
        raise CannotScore("needs the prompt of every sample: a run.json with prompts, or --prompts")
    finite = values[torch.isfinite(values)]
    if len(finite) < len(values):
        given.warnings.append(f"{name}: no value for {len(values) - len(finite)} samples")
    if len(finite) == 0:
        raise CannotScore("the scorer gave no finite value")
    cut = getattr(scorer, "truncated", 0)
    if cut:
        given.warnings.append(f"{name}: {cut} prompts are longer than the model reads and were cut")
    value, stderr = mean_and_stderr(finite)
    return Score(name, value, stderr, getattr(scorer, "higher_is_better", True), len(finite))


METRICS: dict[str, Callable[[Inputs], Iterator[Score]]] = {
    "fd": fd, "kid": kid, "pr": pr, "dc": dc, "is": inception, "accuracy": accuracy,
    "colour": colour, "fd_infinity": fd_inf, "sfid": sfid, "cmmd": cmmd_score,
    "vendi": vendi_score, "diversity": diversity, "realism": realism_score, "authpct": authpct,
    "over_k": over_k,
}  # fmt: skip
DEFAULT_METRICS = ("fd", "kid", "pr", "dc", "accuracy", "colour")
