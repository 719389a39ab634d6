"""Which weights the samples of an epoch are drawn with."""

from __future__ import annotations

from torch import Tensor

from .config import ACFlowConfig
from .learner import Learner
from .sharding import placed

__all__ = ["SamplingWeights"]


class SamplingWeights:
    """The trained weights themselves, or a copy that is renewed every ``sync_every`` epochs.

    Samples of older weights are reweighted without an importance ratio, so a copy should not grow
    older than a few epochs.

    Attributes:
        copy: the copy, or None where there is none.
    """

    def __init__(self, config: ACFlowConfig, learner: Learner) -> None:
        self.config, self.learner = config, learner
        self.copy: dict[str, Tensor] | None = None

    def at(self, epoch: int) -> dict[str, Tensor] | None:
        """The weights for an epoch; None means those being trained."""
        config, learner = self.config, self.learner
        if config.sampler == "policy" and config.sync_every == 1:
            return None
        if self.copy is None or epoch % config.sync_every == 0:
            averaged = config.sampler == "ema" and learner.ema is not None
            source = learner.average() if averaged else learner.policy.state_dict()
            self.copy = {name: value.clone() for name, value in (source or {}).items()}
        return self.copy

    def load(self, copy: dict[str, Tensor] | None) -> None:
        """Take over the copy of a checkpoint."""
        self.copy = None if copy is None else placed(copy, self.learner.policy.state_dict())
