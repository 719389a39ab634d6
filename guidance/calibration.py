"""How honest a classifier's confidence is: expected calibration error and fitted temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    low, high = -4.158883083359672, 4.158883083359672  # log of 1/64 and 64, in log(1 / T)
    for _ in range(iterations):
        middle = (low + high) / 2
        p = (z * torch.tensor(middle).exp().double()).softmax(1)
        slope = float((wanted - (p * z).sum(1)).mean())
        low, high = (middle, high) if slope > 0 else (low, middle)
    return float(torch.tensor(-(low + high) / 2, dtype=torch.float64).exp())
