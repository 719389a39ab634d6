"""The change of the weights as a LoRA: the best matrices of low rank, and how much they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...pipelines.files import write_bytes

__all__ = ["LORA_FILE", "LowRank", "low_rank", "save_lora"]

LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class LowRank:
    """A LoRA made from changes of weights.

    Attributes:
        state: ``{layer}.lora_A.weight`` and ``{layer}.lora_B.weight``, float32, with alpha = rank.
        energy: the share of the squared norm of all changes that it holds, in [0, 1].
        layers: that share for each layer.
    """

    state: dict[str, Tensor]
    energy: float
    layers: dict[str, float]


@torch.no_grad()
def low_rank(changes: Mapping[str, Tensor], rank: int) -> LowRank:
    """The closest LoRA of a rank, layer by layer, by truncated SVD (Eckart and Young 1936).

    A sum of rank-one perturbations over hundreds of members has full rank: look at the energy
    before you rely on a small LoRA.

    Args:
        changes: by name, ``{layer}.weight``: (m, n), or (O, I, kh, kw) of a convolution, whose
            first factor is then a convolution of ``rank`` outputs and the second one of 1 x 1.
        rank: of each layer, at most; layers that did not change are left out.

    Raises:
        ValueError: ``rank`` is below 1, or a change is one of a bias, which a LoRA does not have.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    state: dict[str, Tensor] = {}
    layers: dict[str, float] = {}
    kept = whole = 0.0
    for name, change in changes.items():
        if not name.endswith(".weight"):
            raise ValueError(
                f"{name} changed as well, and a LoRA cannot hold it; save the full weights, or "
                "train with evolve_bias=False"
            )
        layer = name.removesuffix(".weight")
        u, s, v = torch.linalg.svd(change.detach().flatten(1).double(), full_matrices=False)
        power = s.square()
        if float(power.sum()) == 0:
            continue
        count = min(rank, len(s))
        root = s[:count].sqrt()
        down, up = root[:, None] * v[:count], u[:, :count] * root
        if change.ndim == 4:
            down = down.view(count, *change.shape[1:])
            up = up[:, :, None, None]
        state[f"{layer}.lora_A.weight"] = down.float().contiguous().cpu()
        state[f"{layer}.lora_B.weight"] = up.float().contiguous().cpu()
        layers[layer] = float(power[:count].sum() / power.sum())
        kept, whole = kept + float(power[:count].sum()), whole + float(power.sum())
    return LowRank(state, kept / whole if whole else 1.0, layers)


def save_lora(folder: str | Path, found: LowRank, *, component: str = "transformer") -> Path:
    """Write ``pytorch_lora_weights.safetensors``, which ``pipe.load_lora_weights(folder)`` reads.

    Args:
        folder: it may not exist yet.
        found: from ``low_rank``.
        component: which part of the pipeline the layers are of: "transformer" or "unet".

    Returns:
        The file.

    Raises:
        OSError: it cannot be written; nothing is half-written.
    """
    from safetensors.torch import save

    state = {f"{component}.{name}": value for name, value in found.state.items()}
    note = {"format": "pt", "energy": f"{found.energy:.6f}"}
    path = Path(folder) / LORA_FILE
    write_bytes(path, save(state, metadata=note))
    return path
