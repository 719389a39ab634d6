"""Errors of scores, and of differences between two sets of samples that share their seeds.

Scores such as the Fréchet distance and recall are no means over samples, and resampling with
replacement breaks those that look at neighbours (a copy is its own nearest neighbour). Here every
score is taken again on random halves, drawn *without* replacement. Of a mean over n samples the
variance over such halves is just its own variance s^2 / n, so the spread over halves is used as the
standard error of every score. Two sets over the same seeds are cut into the same halves, so that
what their samples have in common cancels in a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import FeatureSet
from .frechet import Gaussian, frechet_distance_to
from .moments import Moments
from .neighbours import pair_up, radii_squared
from .vendi import mean_cosine_distance

COLOURS = ("saturation", "contrast", "clipped")


@dataclass(frozen=True)
class Estimate:
    """A score on all samples, and on each of the halves.

    Args:
        value: on all samples.
        halves: shape (H,), float64.
    """

    value: float
    halves: Tensor

    @property
    def stderr(self) -> float:
        """Standard error, from the spread over halves."""
        return float(self.halves.std()) if len(self.halves) > 1 else float("nan")

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference of two scores over the same seeds, half by half."""
        return Estimate(self.value - other.value, self.halves - other.halves)

    def differs(self, width: float = 1.96) -> bool:
        """Whether 0 lies outside ``value`` plus or minus ``width`` standard errors."""
        return abs(self.value) > width * self.stderr


def mean_of(parts: list[Estimate]) -> Estimate:
    """The mean over independent sets of seeds.

    Raises:
        ValueError: if there is none.
    """
    if not parts:
        raise ValueError("expected at least one estimate")
    values = torch.tensor([part.value for part in parts], dtype=torch.float64)
    return Estimate(float(values.mean()), torch.stack([part.halves for part in parts]).mean(0))


class HalfSampling:
    """Scores with errors, against one reference.

    Args:
        gaussian: mean and covariance of real features, for the Fréchet distance.
        real: real feature rows, (M, d), for precision and recall; None leaves these out.
        space: of the features, e.g. "cifar".
        k: the neighbour of precision and recall.
        halves: H; the first is the same for every set with as many samples.
        seed: of the draws.
    """

    def __init__(
        self,
        gaussian: Gaussian,
        real: Tensor | None = None,
        *,
        space: str = "cifar",
        k: int = 3,
        halves: int = 100,
        seed: int = 0,
    ) -> None:
        if halves < 2:
            raise ValueError(f"halves must be at least 2, got {halves}")
        self.gaussian, self.space, self.k, self.halves, self.seed = gaussian, space, k, halves, seed
        self.real = None if real is None else real.double()
        self._radii: Tensor | None = None

    def __call__(self, samples: FeatureSet) -> dict[str, Estimate]:
        """Every score that the samples allow, by name.

        Args:
            samples: in the order of their seeds, with labels if there are any.

        Raises:
            ValueError: if there are fewer than four times ``k`` samples.
        """
        count = len(samples)
        if count < 4 * self.k:
            raise ValueError(f"expected at least {4 * self.k} samples, got {count}")
        generator = torch.Generator().manual_seed(self.seed)
        drawn = [
            torch.randperm(count, generator=generator)[: count // 2].sort().values
            for _ in range(self.halves)
        ]
        everything = torch.arange(count)
        found = {}
        for name, score in self._scores(samples).items():
            halves = torch.tensor([score(rows) for rows in drawn], dtype=torch.float64)
            found[name] = Estimate(score(everything), halves)
        return found

    def _scores(self, samples: FeatureSet) -> Mapping[str, Callable[[Tensor], float]]:
        features = samples.taps[f"{self.space}/features"].double()
        logits, labels = samples.taps.get(f"{self.space}/logits"), samples.labels
        scores: dict[str, Callable[[Tensor], float]] = {
            "fd": lambda rows: self._distance(features[rows])
        }
        if logits is not None and bool((labels >= 0).all()):
            right = (logits.argmax(1) == labels).double()
            scores["accuracy"] = lambda rows: float(right[rows].mean())
            if len(samples) // 2 > len(torch.unique(labels)):  # then any half holds a pair
                scores["diversity"] = lambda rows: mean_cosine_distance(
                    features[rows], labels[rows]
                )
        if self.real is not None:
            scores |= self._manifold(features)
        for column, name in enumerate(COLOURS):
            values = samples.colour[:, column].double()
            scores[name] = lambda rows, values=values: float(values[rows].mean())  # type: ignore[misc]
        return scores

    def _distance(self, features: Tensor) -> float:
        moments = Moments.of(features)
        return frechet_distance_to(self.gaussian, moments.mean, moments.covariance)

    def _manifold(self, fake: Tensor) -> dict[str, Callable[[Tensor], float]]:
        """Precision and recall as ``prdc`` defines them, from distances that are taken once."""
        if self.real is None:
            return {}
        if self._radii is None:
            self._radii = radii_squared(pair_up(self.real, self.real)[0], self.k).sqrt()
        to_real, among = torch.cdist(fake, self.real), torch.cdist(fake, fake)
        inside = (to_real <= self._radii).any(1).double()

        def recall(rows: Tensor) -> float:
            own = among[rows][:, rows]
            radius = own.kthvalue(self.k + 1, dim=1).values  # the nearest is the sample itself
            return float((to_real[rows] <= radius[:, None]).any(0).double().mean())

        return {"precision": lambda rows: float(inside[rows].mean()), "recall": recall}
