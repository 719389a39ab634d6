"""The result of a run: a pipeline folder with the new weights, and the change as a LoRA."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..checkpoint import write_json
from .lora import LowRank, low_rank, save_lora
from .optimizer import Eggroll

__all__ = ["save_result"]


def save_result(
    pipe: Any, eggroll: Eggroll, out: str | Path, *, component: str, lora_rank: int = 0
) -> LowRank | None:
    """Write ``out/model``, and ``out/lora`` if a rank is given.

    Args:
        pipe: the pipeline with the mean of the population in its denoiser.
        eggroll: of that denoiser.
        out: the folder of the run.
        component: the denoiser's name in the pipeline.
        lora_rank: of the LoRA; 0 writes none.

    Returns:
        The LoRA, or None. ``lora/energy.json`` says which share of the change it holds.

    Raises:
        ValueError: biases evolved, and a LoRA is asked for.
        OSError: something cannot be written; an earlier result stays.
    """
    out = Path(out)
    found = None
    if lora_rank:
        found = low_rank(eggroll.offsets.parameters, lora_rank)
        save_lora(out / "lora", found, component=component)
        note = {"rank": lora_rank, "energy": found.energy, "layers": found.layers}
        write_json(out / "lora" / "energy.json", note)
    aside, final = out / ".model.writing", out / "model"
    shutil.rmtree(aside, ignore_errors=True)
    pipe.save_pretrained(aside)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    return found
