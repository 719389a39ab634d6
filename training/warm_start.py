"""Start from the weights of another pipeline, also one that predicts something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.prediction import Kind

__all__ = ["initial_kind", "start_of_k", "warm_start"]

NEARLY_ONE = 0.9975  # sigmoid(6): a learned k cannot start at 1 itself


def initial_kind(init: str) -> Kind:
    """What the network in a saved pipeline predicts.

    Args:
        init: the folder of a ``ClassConditionalPipeline``, or "embedded".

    Raises:
        FileNotFoundError: if there is no pipeline.
        ValueError: if it is of another class.
    """
    folder = _folder(init)
    saved = json.loads((folder / "model_index.json").read_text())
    if saved.get("_class_name") != "ClassConditionalPipeline":
        raise ValueError(
            f"init: {init!r} holds a {saved.get('_class_name')}; only a ClassConditionalPipeline, "
            "as scripts/train.py saves it, can be trained further here"
        )
    name = saved.get("prediction", "velocity")
    if name == "kdiff":
        return Kind.kdiff(saved["k"])
    if name == "edm":
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        return Kind.edm(scheduler["sigma_data"])
    return Kind(name)


def start_of_k(source: Kind) -> float:
    """Where a learned k starts so that weights of this kind mean the same, or nearly.

    From a velocity it is 1/2, exactly. From a denoised image it is 0.9975, an error of a 400th of
    the target: a learned k cannot be 1.

    Raises:
        ValueError: for EDM weights, which belong to another process.
    """
    if source.name == "kdiff":
        return min(max(source.parameter or 0.0, 1 - NEARLY_ONE), NEARLY_ONE)
    starts = {"velocity": 0.5, "denoised": NEARLY_ONE}
    if source.name not in starts:
        raise ValueError(f"init: {_say(source)} weights cannot start a k-Diff training")
    return starts[source.name]


@torch.no_grad()
def warm_start(model: Any, init: str, target: Kind) -> None:
    """Copy saved weights into ``model`` and fold the change of target into its last layer.

    k-Diff at k = 1/2 is minus half a velocity, so a velocity model starts it exactly; k = 1 is the
    denoised image. ``augment_dim`` may change freely: every sigma keeps its meaning.

    Args:
        model: a ``DiTTransformer2DModel`` of the same shape.
        init: see ``initial_kind``.
        target: what the model is to predict.

    Raises:
        ValueError: if the shapes differ, or the targets are not multiples of one another.
    """
    factor = _factor(initial_kind(init), target, init)
    saved = type(model).from_pretrained(_folder(init) / "transformer").state_dict()
    own = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    odd = [n for n in shapes if n not in saved or tuple(saved[n].shape) != shapes[n]]
    odd += [name for name in saved if name not in shapes]
    if odd:
        raise ValueError(
            f"init: the network in {init!r} has another shape (first difference: {odd[0]}); give "
            "its resolution, patch_size, layers, heads, head_dim and number of classes"
        )
    model.load_state_dict({name: value.to(own[name]) for name, value in saved.items()})
    last: nn.Linear = model.proj_out_2
    last.weight.mul_(factor)
    last.bias.mul_(factor)


def _factor(source: Kind, target: Kind, init: str) -> float:
    """The number that turns an output of one kind into one of the other."""
    if source == target:
        return 1.0
    pair = [_as_kdiff(kind) for kind in (source, target)]
    if source.name != "edm" and target.name != "edm":
        (k, scale), (wanted, wanted_scale) = pair
        if k == wanted or (wanted == NEARLY_ONE and k == 1.0):
            return wanted_scale / scale
    raise ValueError(
        f"init: {init!r} predicts {_say(source)}, which no factor turns into {_say(target)}; from "
        "a velocity start --k 0.5 or learned, from a denoised image --k 1 or learned, from a "
        "k-Diff model its own k or learned"
    )


def _as_kdiff(kind: Kind) -> tuple[float, float]:
    """A kind as (k, factor): its output is ``factor`` times the k-Diff output at k."""
    known = {"velocity": (0.5, -2.0), "denoised": (1.0, 1.0)}
    return known.get(kind.name, (kind.parameter or 0.0, 1.0))


def _say(kind: Kind) -> str:
    return f"{kind.name} k={kind.parameter:g}" if kind.name == "kdiff" else kind.name


def _folder(init: str) -> Path:
    from ..pipelines.embedded import weights_folder

    folder = weights_folder("model") if init == "embedded" else Path(init).expanduser()
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"init: there is no pipeline in {init!r} (no model_index.json); give the model/ folder "
            "of a run, or embedded"
        )
    return folder
