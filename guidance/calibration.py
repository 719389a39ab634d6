"""How honest a classifier's confidence is: expected calibration error and fitted temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gfcg import confusion, reference_class
from .probe import StageLogits


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram in numbers.

    Attributes:
        edges: bin edges, (M + 1,).
        count: samples a bin, (M,).
        confidence: mean confidence a bin, NaN where it is empty, (M,).
        accuracy: share of right answers a bin, NaN where it is empty, (M,).
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error: |accuracy - confidence|, weighted by the bins' counts."""
        gap = (self.accuracy - self.confidence).abs().nan_to_num(0.0)
        return float((gap * self.count).sum() / self.count.sum())


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Confidence against accuracy, in equal-width bins ``(low, high]`` of the top probability.

    Args:
        logits: (N, K).
        labels: (N,).
        bins: M.

    Raises:
        ValueError: without samples, with fewer than one bin, or if shapes do not agree.
    """
    if logits.ndim != 2 or not len(logits) or labels.shape != logits.shape[:1] or bins < 1:
        raise ValueError(
            f"expected logits (N, K), labels (N,), N > 0 and bins > 0, got {tuple(logits.shape)}, "
            f"{tuple(labels.shape)} and {bins}"
        )
    confidence, predicted = logits.double().softmax(1).max(1)
    right = (predicted == labels).double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=logits.device)
    where = (torch.bucketize(confidence, edges) - 1).clamp(0, bins - 1)
    count = torch.bincount(where, minlength=bins).double()
    sums = [torch.bincount(where, weights=value, minlength=bins) for value in (confidence, right)]
    return Reliability(edges, count, sums[0] / count, sums[1] / count)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error in [0, 1]; see ``reliability``."""
    return reliability(logits, labels, bins).error


def fit_temperature(logits: Tensor, labels: Tensor, iterations: int = 60) -> float:
    """The temperature T that minimises the negative log-likelihood of ``softmax(logits / T)``.

    The likelihood is concave in 1 / T, so its slope is bisected over T in [1/64, 64].

    Args:
        logits: (N, K).
        labels: (N,).
        iterations: halvings of the bracket, in log T.

    Returns:
        T > 1 for an over-confident classifier; an end of the bracket where the likelihood has no
        interior maximum (every answer right, or logits that say nothing).

    Raises:
        ValueError: if shapes do not agree or logits are not finite.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(logits):
        raise ValueError(
            f"expected logits (N, K) and labels (N,), got {tuple(logits.shape)}, "
            f"{tuple(labels.shape)}"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits are not finite")
    z = logits.double()
    wanted = z.gather(1, labels[:, None])[:, 0]
    low, high = -math.log(64), math.log(64)  # in log(1 / T)
    for _ in range(iterations):
        middle = (low + high) / 2
        p = (z * math.exp(middle)).softmax(1)
        slope = float((wanted - (p * z).sum(1)).mean())
        low, high = (middle, high) if slope > 0 else (low, middle)
    return math.exp(-(low + high) / 2)


@dataclass(frozen=True)
class StageCalibration:
    """How honest the classifier is at one stage of sampling.

    Attributes:
        ratio: noise-to-signal ratio of the stage.
        count: samples.
        accuracy: share that is named as the label the sampler was given.
        confidence: mean top probability.
        error: expected calibration error.
        error_fitted: the same with the fitted temperature.
        temperature: what this stage alone would be given.
        doubt: mean ``"pair"`` confusion at the fitted temperature, see ``gfcg.confusion``.
        contrast: mean relative distance of the predictions for the wanted and the reference class;
            None where it was not measured.
        diagram: the reliability diagram at temperature 1.
    """

    ratio: float
    count: int
    accuracy: float
    confidence: float
    error: float
    error_fitted: float
    temperature: float
    doubt: float
    contrast: float | None
    diagram: Reliability


@dataclass(frozen=True)
class Calibration:
    """Calibration along a trajectory, and the settings that follow from it.

    Attributes:
        stages: from noise to data.
        error: mean over the stages of the expected calibration error (EluCD's integral error).
        error_fitted: the same with the fitted temperature.
        temperature: fitted on all stages inside the interval together.
        low: below this noise-to-signal ratio a reference class has no influence.
        high: above it the classifier has lost half of its accuracy.
    """

    stages: tuple[StageCalibration, ...]
    error: float
    error_fitted: float
    temperature: float
    low: float
    high: float


def calibrate(
    stages: Sequence[StageLogits], *, bins: int = 15, least_influence: float = 0.01
) -> Calibration:
    """Fit temperature and interval for the classifier rules.

    The interval ends where, coming from the data, accuracy falls half-way to chance; it begins
    where the mean of confusion times contrast (confusion alone, where no contrast was measured)
    rises above ``least_influence`` of its maximum. Ends lie between two stages, at their geometric
    mean.

    Args:
        stages: of one run, from noise to data; see ``ClassifierProbe``.
        bins: of the reliability diagrams.
        least_influence: see above.

    Raises:
        ValueError: without stages, or if the classifier is no better than chance at the last one.

    Source: the mean error after arXiv 2310.11311, over the stages actually taken; bins, interval
    and temperature are ours.
    """
    if not stages:
        raise ValueError("no stages: nothing was sampled")
    stages = sorted(stages, key=lambda stage: -stage.ratio)
    accuracies = [_accuracy(stage) for stage in stages]
    chance = 1 / stages[-1].logits.shape[1]
    if accuracies[-1] <= chance:
        raise ValueError(
            f"the classifier names {accuracies[-1]:.1%} of the finished samples as their label, "
            f"which is chance: check decode, the label map and the value range of its images"
        )
    half = chance + (accuracies[-1] - chance) / 2
    first = len(stages) - 1
    while first > 0 and accuracies[first - 1] >= half:
        first -= 1
    inside = stages[first:]
    logits = torch.cat([stage.logits for stage in inside])
    temperature = fit_temperature(logits, torch.cat([stage.labels for stage in inside]))
    rows = tuple(_stage(stage, temperature, bins) for stage in stages)
    low = _lowest([_influence(row) for row in rows], stages, least_influence)
    high = math.inf if first == 0 else _between(stages[first - 1].ratio, stages[first].ratio)
    mean, fitted = (
        sum(getattr(row, name) for row in rows) / len(rows) for name in ("error", "error_fitted")
    )
    return Calibration(rows, mean, fitted, temperature, min(low, stages[first].ratio / 2), high)


def _stage(stage: StageLogits, temperature: float, bins: int) -> StageCalibration:
    diagram = reliability(stage.logits, stage.labels, bins)
    reference = reference_class(stage.logits, stage.labels)
    doubt = confusion(stage.logits, stage.labels, reference, temperature=temperature)
    return StageCalibration(
        ratio=stage.ratio,
        count=len(stage.labels),
        accuracy=_accuracy(stage),
        confidence=float(stage.logits.double().softmax(1).amax(1).mean()),
        error=diagram.error,
        error_fitted=calibration_error(stage.logits / temperature, stage.labels, bins),
        temperature=fit_temperature(stage.logits, stage.labels),
        doubt=float(doubt.mean()),
        contrast=None if stage.contrast is None else float(stage.contrast.mean()),
        diagram=diagram,
    )


def _influence(row: StageCalibration) -> float:
    return row.doubt if row.contrast is None else row.doubt * row.contrast


def _accuracy(stage: StageLogits) -> float:
    return float((stage.logits.argmax(1) == stage.labels).double().mean())


def _lowest(influence: list[float], stages: Sequence[StageLogits], least: float) -> float:
    """The ratio between the last stage with influence and the first without."""
    floor, last = least * max(influence), len(stages) - 1
    while last > 0 and influence[last] < floor:
        last -= 1
    return 0.0 if last == len(stages) - 1 else _between(stages[last].ratio, stages[last + 1].ratio)


def _between(noisier: float, cleaner: float) -> float:
    return math.sqrt(noisier * cleaner) if math.isfinite(noisier) else 2 * cleaner
