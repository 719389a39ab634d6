"""The critic with its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..data import derive_seed
from .config import ACFlowConfig
from .critic import Critic
from .critic_memory import CriticMemory
from .features import feature_sizes
from .losses import critic_loss
from .optimise import adam, add_gradients

__all__ = ["CriticLearner"]


class CriticLearner:
    """Fits a `Critic`; every rank takes the same step, on the samples of all.

    Args:
        config: the settings.
        clean: some samples, for their shape.
        features: what is known of their conditions, see `condition_features`.
        images: the pictures of these samples, for the aspect ratio of tokens.
        accelerator: accelerate's.
    """

    def __init__(
        self,
        config: ACFlowConfig,
        clean: Tensor,
        features: Mapping[str, Tensor],
        images: Tensor,
        accelerator: Any,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        shape = tuple(clean.shape[1:])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "critic"))
            self.network = Critic(
                shape,
                feature_sizes(features),
                width=config.critic_width,
                grid=token_grid(shape, images),
            )
        self.network.to(accelerator.device)
        for parameter in self.network.parameters():
            if parameter.ndim == 4:  # the layout in which convolutions run faster
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.parameters = list(self.network.parameters())
        self.optimizer = adam(self.parameters, config.critic_rate, config.weight_decay)
        self.memory = CriticMemory(config.critic_memory)

    def values(self, x: Tensor, sigma: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """Values (B,) of noisy states ``x`` of some samples, each at several levels in a row.

        Args:
            x: the states, (B, ...).
            sigma: their levels, (B,).
            features: of the samples, see `condition_features`; (B / levels, ...).
        """
        rows = {n: f.repeat_interleave(len(x) // len(f), 0) for n, f in features.items()}
        found: Tensor = self.network(x, sigma, rows)
        return found

    def step(
        self,
        x: Tensor,
        sigma: Tensor,
        features: Mapping[str, Tensor],
        shaped: Tensor,
        count: Tensor,
    ) -> Tensor:
        """One step towards ``shaped`` (B,), where NaN is left out; the mean loss of this rank, ().

        Args:
            x: noisy states of samples of this rank, (B, ...).
            sigma: their levels, (B,).
            features: of the samples, see `values`.
            shaped: the targets.
            count: targets of all ranks.
        """
        config, known = self.config, ~shaped.isnan()
        value = self.values(x, sigma, features)
        losses = known * critic_loss(
            value,
            shaped.nan_to_num(),
            target=config.critic_target,
            tau=config.tau,
            huber=config.huber,
        )
        (losses.sum() / count.clamp(min=1)).backward()
        add_gradients(self.parameters, self.accelerator)
        nn.utils.clip_grad_norm_(self.parameters, config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses.detach().sum() / known.sum().clamp(min=1)

    def state_dict(self) -> dict[str, Any]:
        """The network, its optimizer and its memory."""
        return {
            "critic": self.network.state_dict(),
            "critic_optimizer": self.optimizer.state_dict(),
            "critic_memory": self.memory.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.network.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["critic_optimizer"])
        self.memory.load_state_dict(state.get("critic_memory", []), self.accelerator.device)


def token_grid(shape: tuple[int, ...], images: Tensor) -> tuple[int, int] | None:
    """Rows and columns of tokens (N, C), from the aspect ratio of the pictures they make."""
    if len(shape) != 2:
        return None
    height, width = images.shape[-2:]
    rows = [r for r in range(1, shape[0] + 1) if shape[0] % r == 0]
    best = min(rows, key=lambda r: abs(r * r * width / height - shape[0]))
    return best, shape[0] // best
