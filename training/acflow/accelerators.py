"""The accelerator that a fine-tuning run makes for itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .config import ACFlowConfig

__all__ = ["check_distribution", "make_accelerator"]

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")


def make_accelerator(config: ACFlowConfig, out: Path) -> Any:
    """An ``accelerate.Accelerator`` with the trackers that the config names."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # The last block of some transformers computes tokens that nothing reads: their adapters get no
    # gradient, which DDP must be told. Autocast is around the denoiser alone, see `autocasting`.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        # Without this a machine without accelerators joins no ranks under `accelerate launch`.
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",
        log_with=config.log_with or None,
        project_dir=str(out),
        kwargs_handlers=[unused],
    )
    if config.log_with:
        accelerator.init_trackers("diffsteer-acflow", config=asdict(config))
    return accelerator


def check_distribution(accelerator: Any) -> None:
    """Refuse launches that shard weights: every rank must hold them all.

    Raises:
        NotImplementedError: with what to use instead.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in SHARDED:
        raise NotImplementedError(
            f"accelerate was launched with {kind}, which shards weights over the ranks; sampling, "
            "averages and checkpoints here need whole ones. Use --multi_gpu (DDP), with "
            "tune='lora' and gradient_checkpointing to save memory"
        )
