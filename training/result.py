"""From a run to a pipeline: the averaged weights, and what they must be sampled with."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..core.prediction import Kind
from .ema import ExponentialMovingAverage
from .network import build_transformer
from .run_folder import newest_state, read_run

__all__ = ["averaged_model", "averaged_pipeline", "describe_target", "make_pipeline", "save_weak"]

Target = dict[str, Any]


def averaged_model(out: Path) -> nn.Module:
    """The network of the run in ``out`` with the averaged weights of its newest checkpoint.

    Raises:
        FileNotFoundError: there is no run, or it has no checkpoint yet.
        CheckpointError: the checkpoint is damaged.
    """
    return _averaged(out)[0]


def averaged_pipeline(out: Path) -> Any:
    """The pipeline of the run in ``out``: ``averaged_model`` and what it must be sampled with.

    Arguments and errors as there.
    """
    return make_pipeline(*_averaged(out))


def describe_target(kind: Kind, augment_dim: float) -> Target:
    """What a network predicts and on which noise, as plain values for a file.

    Args:
        kind: of its output.
        augment_dim: D of the noise.
    """
    return {
        "prediction": kind.name,
        "k": kind.parameter if kind.name == "kdiff" else None,
        "augment_dim": None if math.isinf(augment_dim) else augment_dim,
        "sigma_data": kind.parameter if kind.name == "edm" else None,
    }


def make_pipeline(model: nn.Module, target: Target, names: Sequence[str]) -> Any:
    """A ``ClassConditionalPipeline`` around a trained network.

    Args:
        model: the network.
        target: what ``describe_target`` gave.
        names: of the classes.
    """
    from ..pipelines.class_conditional import ClassConditionalPipeline

    said = {name: target[name] for name in ("prediction", "k", "augment_dim")}
    return ClassConditionalPipeline(
        model, _scheduler(target), id2label=dict(enumerate(names)), **said
    )


def save_weak(model: Any, folder: Path, target: Target) -> None:
    """Save early weights with a note of what they predict; a learned k was another one then."""
    from ..pipelines.files import whole_folder

    with whole_folder(folder) as aside:
        model.save_pretrained(aside)
        (aside / "target.json").write_text(json.dumps(target) + "\n")


def _scheduler(target: Target) -> Any:
    from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

    if target["prediction"] != "edm":
        return FlowMatchEulerDiscreteScheduler()
    if target["augment_dim"] is None:
        return EDMEulerScheduler(sigma_data=target["sigma_data"])
    from ..samplers.pfgmpp_schedulers import PFGMPPHeunScheduler

    said = {name: target[name] for name in ("augment_dim", "sigma_data")}
    return PFGMPPHeunScheduler(**said)


def _averaged(out: Path) -> tuple[nn.Module, Target, tuple[str, ...]]:
    config, names = read_run(out)
    state = newest_state(out)
    if state is None:
        raise FileNotFoundError(f"the training run in {out} has no checkpoint yet")
    model = build_transformer(config, len(names))
    model.load_state_dict(state["model"])
    ema = ExponentialMovingAverage(model, config.ema)
    ema.load_state_dict(state["ema"])
    ema.copy_to(model)
    # Checkpoints of before there was a choice do not say it: they are of flow matching.
    target = state.get("target") or describe_target(Kind(config.prediction), math.inf)
    return model.eval(), target, names
