"""Score one batch while the next one is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from .protocol import Metadata
from .reward_set import RewardSet
from .scores import RewardScores

__all__ = ["RewardPool"]


class RewardPool:
    """A thread that scores batches in the background; a context manager.

    Encoders of images, networks and requests to servers leave Python to other threads while they
    work. Batches are scored in the order in which they came, if there is one worker.

    Args:
        rewards: what to score by.
        workers: batches scored at once; above 1 the rewards must be safe to call from several
            threads.

    Raises:
        ValueError: ``workers`` is below 1.
    """

    def __init__(self, rewards: RewardSet, *, workers: int = 1) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.rewards = rewards
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")

    def submit(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata] | None = None,
    ) -> Future[RewardScores]:
        """Begin to score a batch; ``.result()`` waits, and raises what ``RewardSet.score`` raises.

        The images must not be changed in place before that.
        """
        return self._threads.submit(self.rewards.score, images.detach(), prompts, metadata)

    def close(self) -> None:
        """Forget what has not begun, and wait for what has."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
