"""Several rewards with weights, scored together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .protocol import Metadata, Reward, RewardError, as_reward, scores_tensor
from .scores import RewardScores

__all__ = ["RewardSet"]

logger = logging.getLogger(__name__)


class RewardSet:
    """A weighted sum of rewards.

    A reward that raises has failed on that batch: its scores are NaN, its images are counted in
    ``RewardScores.failed``, the first error of each kind is logged, and the work goes on.

    Args:
        rewards: a callable (see ``as_reward``), or a callable and its weight, by name.

    Raises:
        ValueError: there is none, or a weight is not finite.
        TypeError: a reward is no callable.

    Example:
        >>> rewards = RewardSet({"bright": lambda images: images.mean((1, 2, 3))})
        >>> rewards.score(torch.ones(2, 3, 4, 4), ["a", "b"]).total
        tensor([1., 1.])
    """

    def __init__(
        self, rewards: Mapping[str, Callable[..., Any] | tuple[Callable[..., Any], float]]
    ) -> None:
        if not rewards:
            raise ValueError("give at least one reward: RewardSet({'jpeg': (JpegSize(), 1.0)})")
        pairs = {
            name: value if isinstance(value, tuple) else (value, 1.0)
            for name, value in rewards.items()
        }
        self.rewards: dict[str, Reward] = {n: as_reward(pair[0]) for n, pair in pairs.items()}
        self.weights = {name: float(pair[1]) for name, pair in pairs.items()}
        wrong = [name for name, weight in self.weights.items() if not math.isfinite(weight)]
        if wrong:
            raise ValueError(
                f"the weight of reward {wrong[0]!r} must be finite, got {self.weights[wrong[0]]}"
            )
        self._reported: set[tuple[str, str]] = set()

    def __repr__(self) -> str:
        parts = (f"{weight:g} * {name}" for name, weight in self.weights.items())
        return f"RewardSet({' + '.join(parts)})"

    @torch.no_grad()
    def score(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata] | None = None,
    ) -> RewardScores:
        """Score a batch.

        Args:
            images: (B, 3, H, W), floats in [0, 1], on any device.
            prompts: one an image.
            metadata: one mapping an image; None is an empty one each.

        Returns:
            Scores on the CPU.

        Raises:
            RewardError: a reward gives the wrong number of scores, or no numbers.
            ValueError: images, prompts and metadata do not belong together.
            TypeError: the images are not floats.
        """
        metadata = [{}] * len(prompts) if metadata is None else metadata
        _check(images, prompts, metadata)
        values, failed, errors = {}, {}, {}
        for name, reward in self.rewards.items():
            try:
                result = reward(images, prompts, metadata)
            except (KeyboardInterrupt, RewardError):
                raise
            except Exception as error:  # whatever the user's code raises
                errors[name] = f"{type(error).__name__}: {error}"
                self._report(name, error)
                result = torch.full((len(prompts),), float("nan"))
            values[name], failed[name] = scores_tensor(result, len(prompts), name)
        return RewardScores(values, failed, self.weights, errors)

    def _report(self, name: str, error: Exception) -> None:
        key = (name, type(error).__name__)
        if key not in self._reported:
            self._reported.add(key)
            logger.warning(
                "reward %r raised %s: %s; its images are counted as failed, and further ones "
                "of this kind are not reported", name, type(error).__name__, error, exc_info=error,
            )  # fmt: skip


def _check(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floats in [0, 1], got {images.dtype}; divide by 255")
    if not len(images) == len(prompts) == len(metadata):
        raise ValueError(
            f"expected one prompt and one mapping of metadata an image, got {len(images)} images, "
            f"{len(prompts)} prompts and {len(metadata)} of metadata"
        )
