"""An exponential moving average of a model's parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ExponentialMovingAverage", "warmed_decay"]


def warmed_decay(step: int, decay: float) -> float:
    """The decay after ``step`` updates: less at first, so that the start is soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


class ExponentialMovingAverage:
    """Averages trainable parameters in float32: ``average += (1 - decay) * (now - average)``.

    Args:
        model: where the average starts from.
        decay: in [0, 1); see `warmed_decay` for the first updates.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {
            name: parameter.detach().float().clone() for name, parameter in _trained(model).items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the parameters of ``model``; ``step`` counts the updates made before."""
        now = [parameter.detach().float() for parameter in _trained(model).values()]
        weight = 1 - warmed_decay(step, self.decay)
        torch._foreach_lerp_(list(self.average.values()), now, weight)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the average into the parameters of ``model``, in their own dtype."""
        for name, parameter in _trained(model).items():
            parameter.copy_(self.average[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return dict(self.average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over saved averages.

        Raises:
            ValueError: the names are not those of this model.
        """
        if state.keys() != self.average.keys():
            odd = sorted(state.keys() ^ self.average.keys())[:3]
            raise ValueError(f"the saved average is of another model; differing parameters: {odd}")
        for name, value in state.items():
            self.average[name].copy_(value)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
