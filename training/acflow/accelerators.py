"""The accelerator that a fine-tuning run makes for itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import ACFlowConfig
from .policy import weights_digest
from .sharding import launch_kind
from .zero import check_zero

__all__ = ["check_distribution", "check_same_weights", "make_accelerator"]

OTHERS = ("MEGATRON_LM", "TP")


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
    """Refuse launches that shard weights in a way that sampling and averages cannot follow.

    Raises:
        NotImplementedError: with what to use instead.
    """
    kind = launch_kind(accelerator)
    if kind in OTHERS:
        raise NotImplementedError(
            f"accelerate was launched with {kind}, whose shards cannot be sampled from here; use "
            "--use_fsdp --fsdp_version 2, or --multi_gpu where a copy of the weights fits each GPU"
        )
    if kind == "FSDP":
        _check_fsdp(accelerator.state.fsdp_plugin)
    if kind == "DEEPSPEED":
        check_zero(accelerator.state.deepspeed_plugin)
    mesh = getattr(accelerator, "parallelism_config", None)
    if getattr(mesh, "non_data_parallel_size", 1) > 1:
        raise NotImplementedError(
            "accelerate was launched with tensor, context or sequence parallelism; every rank has "
            "samples of its own here: use data parallelism alone"
        )


def check_same_weights(accelerator: Any, pipe: Any) -> None:
    """Refuse ranks that start from different weights: their samples would be of different models.

    Raises:
        ValueError: with the part of the pipeline.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    parts = {n: part for n, part in pipe.components.items() if isinstance(part, nn.Module)}
    for name, part in parts.items():
        if len(set(gather_object([weights_digest(part)]))) > 1:
            raise ValueError(
                f"the ranks hold different weights of the pipeline's {name}. Under FSDP, "
                "transformers leaves models empty on all ranks but the first if they are loaded "
                "after the accelerator was made: load them before, or set "
                "fsdp_cpu_ram_efficient_loading: false"
            )


def _check_fsdp(plugin: Any) -> None:
    wrong = {
        "fsdp_version: 2": getattr(plugin, "fsdp_version", 1) == 2,
        # It would choose the arithmetic by where the weights rest.
        "fsdp_offload_params: false": type(plugin.cpu_offload).__name__ != "CPUOffloadPolicy",
        "fsdp_activation_checkpointing: false, and gradient_checkpointing here": (
            not plugin.activation_checkpointing
        ),
    }
    for remedy, holds in wrong.items():
        if not holds:
            raise NotImplementedError(f"this FSDP launch cannot be trained with; set {remedy}")
