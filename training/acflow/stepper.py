"""The optimizer of the actor as an update uses it: gradients of several passes, then a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .config import ACFlowConfig
from .optimise import adam, clip_gradients
from .policy import Policy
from .sharding import is_sharded, load_optimizer, prepare

__all__ = ["Stepper"]


class Stepper:
    """AdamW on gradients that are averaged over the ranks; weights may be cut over them (FSDP2).

    Args:
        config: the settings.
        policy: its networks are readied for the ranks, and its runner is set.
        accelerator: accelerate's.

    Attributes:
        optimizer: PyTorch's, or what DeepSpeed made of it.
    """

    def __init__(self, config: ACFlowConfig, policy: Policy, accelerator: Any) -> None:
        self.config, self.policy, self.accelerator = config, policy, accelerator
        policy.runner = prepare(accelerator, policy.modules)
        self.optimizer: Any = adam(policy.parameters, config.learning_rate, config.weight_decay)

    @contextmanager
    def passing(self, last: bool) -> Iterator[None]:
        """Around a forward and backward pass; ``last`` says whether a step follows."""
        # Shards leave no room for whole gradients: they are reduced after each pass.
        if last or is_sharded(self.accelerator):
            yield
            return
        with self.accelerator.no_sync(self.policy.runner):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's loss, ()."""
        loss.backward()

    def step(self, rate: float) -> Tensor:
        """Update the weights; the norm of the gradients before they were clipped, ().

        Args:
            rate: factor on the learning rate.
        """
        norm = clip_gradients(self.policy.parameters, self.config.clip)
        self._set_rate(rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the weights have been loaded before."""
        load_optimizer(self.optimizer, state)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate
