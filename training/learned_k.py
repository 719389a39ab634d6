"""A learned k in a training run: its optimizer group, its average, when it is frozen."""

from __future__ import annotations

from typing import Any

import torch

from .config import TrainConfig
from .ema import ExponentialMovingAverage
from .kdiff import LearnedK
from .objectives import k_frozen_from

__all__ = ["KTraining"]


class KTraining:
    """What a trainer does for a k that is learned; with ``module`` None it does nothing.

    Args:
        module: the learned k, or None.
        config: the settings of the run.
    """

    def __init__(self, module: LearnedK | None, config: TrainConfig) -> None:
        self.module, self.config = module, config
        self.frozen_from = k_frozen_from(config) if module is not None else config.steps + 1
        self.ema = None if module is None else ExponentialMovingAverage(module, config.ema)

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer groups to add: one without weight decay, or none."""
        return [] if self.module is None else [self.module.group(self.config.k_rate)]

    def begin_update(self, step: int) -> bool:
        """Freeze k if it is time; True at the update where averages start anew."""
        if self.module is None:
            return False
        self.module.requires_grad_(step < self.frozen_from)
        return step == self.frozen_from

    def share_gradient(self, accelerator: Any) -> None:
        """Mean of the gradient over ranks: k is outside the wrapped network."""
        if self.module is not None and self.module.logit.grad is not None:
            self.module.logit.grad = accelerator.reduce(self.module.logit.grad, "mean")

    def average_from(self, step: int) -> int:
        """The update at which the averages of this one began."""
        return self.frozen_from if step >= self.frozen_from else 0

    def line(self) -> dict[str, float]:
        """What the curve and the progress bar show."""
        return {} if self.module is None else {"k": float(self.module().detach())}

    def end_update(self, step: int) -> None:
        """Average k as the weights are averaged."""
        if self.module is not None and self.ema is not None:
            if step < self.frozen_from:
                self.ema.update(self.module, step)
            elif step == self.frozen_from:
                self.ema.average["logit"] = self.module.logit.detach().float().clone()

    def average(self) -> float | None:
        """The averaged k, which belongs to the averaged weights."""
        return None if self.ema is None else float(torch.sigmoid(self.ema.average["logit"]))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        if self.module is None or self.ema is None:
            return {}
        return {"logit": self.module.logit.detach(), "average": self.ema.average["logit"]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        if self.module is not None and self.ema is not None:
            self.module.logit.copy_(state["logit"])
            self.ema.average["logit"].copy_(state["average"])
