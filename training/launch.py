"""What ranks share: accelerate's launcher, and when to stop."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .config import TrainConfig

__all__ = ["agree", "make_accelerator"]


def make_accelerator(config: TrainConfig, out: Path) -> Any:
    """The ``accelerate.Accelerator`` of a run, with the tracker that the config names."""
    from accelerate import Accelerator

    # Autocast is done in `as_network`, around the network alone, whatever the launcher says. On a
    # machine without an accelerator the ranks find each other only if told that it is the CPU.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",
        log_with=config.log_with or None,
        project_dir=str(out),
    )
    if config.log_with:
        accelerator.init_trackers("diffsteer", config=asdict(config))
    return accelerator


def agree(accelerator: Any, asked: bool) -> bool:
    """Whether any rank was asked."""
    if accelerator.num_processes == 1:
        return asked
    flag = torch.tensor(float(asked), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum") > 0)
