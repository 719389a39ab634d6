"""What an epoch is judged by: collected on the device, read once at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .losses import explained_variance
from .warmup import late_explained
from .weights import effective_sample_share

__all__ = ["BINS", "Measures", "check_finite", "shown"]

BINS = 5


class Measures:
    """Collects tensors during an epoch, without waiting for the device."""

    def __init__(self) -> None:
        self._means: dict[str, list[Tensor]] = {}
        self._critic: list[Tensor] = []
        self._weights: list[Tensor] = []

    def mean(self, name: str, value: Tensor) -> None:
        """A quantity of this rank, whose mean over updates and ranks is wanted."""
        self._means.setdefault(name, []).append(value.detach().float().mean())

    def critic(self, shaped: Tensor, value: Tensor, sigma: Tensor) -> None:
        """Targets, values and levels of all ranks, (rows,), before the critic saw the targets."""
        self._critic.append(torch.stack([shaped, value, sigma]))

    def weights(self, weights: Tensor, advantages: Tensor, sigma: Tensor) -> None:
        """Weights, advantages and levels of all ranks, (rows,)."""
        self._weights.append(torch.stack([weights.float(), advantages, sigma]))

    def read(self, accelerator: Any, *, clip: float) -> dict[str, Any]:
        """Everything by name, the same on every rank; then forget it. Waits for the device."""
        found: dict[str, Any] = {}
        names = sorted(self._means)
        if names:
            local = torch.stack([torch.stack(self._means[name]).mean() for name in names])
            means = accelerator.reduce(local, "mean").tolist()
            found |= dict(zip(names, means, strict=True))
        if self._critic:
            found |= critic_measures(torch.cat(self._critic, 1).cpu())
        if self._weights:
            found |= weight_measures(torch.cat(self._weights, 1).cpu(), clip)
        self._means, self._critic, self._weights = {}, [], []
        return found


def critic_measures(rows: Tensor) -> dict[str, Any]:
    """Explained variance by bins of sigma (clean to noise), and its mean over the cleaner half."""
    explained = explained_variance(*rows, bins=BINS)
    return {"explained": explained, "explained_late": late_explained(explained)}


def weight_measures(rows: Tensor, clip: float) -> dict[str, Any]:
    """How uneven the weights are, and how advantages spread over the noise levels."""
    weights, advantages, sigma = rows
    kept = ~advantages.isnan()
    if not bool(kept.any()):
        return {"weighed_share": 0.0}
    w, a, s = weights[kept], advantages[kept], sigma[kept]
    place = (s * BINS).long().clamp(0, BINS - 1)
    parts = [a[place == b] for b in range(BINS)]
    return {
        "weighed_share": float(kept.float().mean()),
        "effective_share": float(effective_sample_share(w)),
        "weight_mean": float(w.mean()),
        "weight_max": float(w.max()),
        "clipped_share": float((a.abs() >= clip).float().mean()),
        "advantage_std": [float(x.std(unbiased=False)) if len(x) > 1 else None for x in parts],
    }


def check_finite(measured: Mapping[str, Any], epoch: int) -> None:
    """Refuse to go on from weights that are no numbers any more.

    Raises:
        FloatingPointError: with what is not finite, and what to do.
    """
    for name, value in measured.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} in epoch {epoch}; the last checkpoint is untouched. Lower "
                "learning_rate or tau, bound the weights (advantage_clip, normalise='batch') or "
                "shape the rewards (reward_shaping), and go on in another folder or with "
                "--allow-change"
            )


def shown(line: Mapping[str, Any]) -> dict[str, str]:
    """The mean rewards of a line of the log, for a progress bar."""
    shown = {k.split("/")[1]: f"{v:.4g}" for k, v in line.items() if k.startswith("reward/")}
    return {name: value for name, value in shown.items() if not name.endswith(("_std", "_failed"))}
