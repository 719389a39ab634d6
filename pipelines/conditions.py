"""What makes a text-to-image model conditional on each of a closed set of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..core.step import MissingPrediction, Step
from .observe import Call, first_tensor
from .steer import steer
from .validate import find_denoisers

_NOT_CONDITIONS = ("timestep", "timesteps", "t", "sigma", "return_dict")


class _Seen(Exception):
    """Leaves the pipeline once its first call was seen."""


def prompt_conditions(
    pipe: Any, prompts: Sequence[str], *, batch_size: int = 8, **call: Any
) -> dict[str, Any]:
    """The denoiser's arguments for each prompt: ``condition=`` of GFCG for a closed set.

    The pipeline is started once for every ``batch_size`` prompts and left at its first network
    call, so what it does with prompts need not be known. Give it the arguments that the real call
    will have (height, width, max_sequence_length).

    Args:
        pipe: a text-to-image pipeline.
        prompts: the closed set, two or more; row k of each table is prompt k.
        batch_size: prompts a call.
        **call: further arguments of the pipeline's call.

    Returns:
        For each argument that differs between prompts a table (K, ...) on the CPU, nested as the
        argument is (SDXL's ``added_cond_kwargs``).

    Raises:
        ValueError: for fewer than two prompts, one given twice, or if nothing in the call depends
            on the prompt as one row each (lists of embeddings of any length, as in Z-Image).
    """
    if isinstance(prompts, str) or len(prompts) < 2 or len(set(prompts)) < len(prompts):
        raise ValueError(f"prompts must name two classes or more, each once, got {prompts!r}")
    parts = [
        _first_call(pipe, list(prompts[start : start + batch_size]), call)
        for start in range(0, len(prompts), batch_size)
    ]
    tables = {name: _joined([part[name] for part in parts], len(prompts)) for name in parts[0]}
    tables = {name: table for name, table in tables.items() if table is not None}
    if not tables:
        raise ValueError(
            f"{type(pipe).__name__} gives its network no tensor with one row a prompt: there is no "
            "table to make; GFCG cannot ask it for another prompt"
        )
    return tables


def _first_call(pipe: Any, prompts: list[str], call: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    module = find_denoisers(pipe, None)[0]

    def look(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        sample = Call(module, args, kwargs, first_tensor(output)).sample_name
        found["names"] = [name for name in kwargs if name not in (*_NOT_CONDITIONS, sample)]

    class Look:
        commutes = True

        def __call__(self, step: Step) -> Tensor:
            for name in found.pop("names"):
                try:
                    value = step.argument(name)
                except MissingPrediction:
                    continue
                found[name] = tree_map(lambda leaf: _kept(leaf, len(prompts)), value)
            raise _Seen

    handle = module.register_forward_hook(look, with_kwargs=True)
    try:
        with torch.no_grad(), steer(pipe, Look()):
            pipe(**{"prompt": prompts, "num_inference_steps": 2, **call})
    except _Seen:
        pass
    finally:
        handle.remove()
    return found


def _kept(leaf: Any, rows: int) -> Any:
    whole = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == rows
    return leaf.detach().cpu().clone() if whole else None


def _joined(values: list[Any], count: int) -> Any:
    """One table of all prompts, or None where nothing differs between them."""
    if isinstance(values[0], dict):
        inner = {key: _joined([value[key] for value in values], count) for key in values[0]}
        return {key: table for key, table in inner.items() if table is not None} or None
    if not all(isinstance(value, Tensor) for value in values):
        return None
    if len({value.shape[1:] for value in values}) > 1:
        return None  # padded to the longest prompt of each batch
    table = torch.cat(values)
    return table if len(table) == count and not bool((table == table[:1]).all()) else None
