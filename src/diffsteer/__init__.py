"""Steer diffusion and flow models: at sampling time, in training, and by reward.

The front door: ``steer``, ``load_embedded``, the few types everything is written in, every rule of
``diffsteer.guidance``, and the trainers, objectives, schedulers and scores of the other folders.
All are loaded on first use, because importing diffusers takes seconds and ``import diffsteer``
must not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .core.prediction import Kind as Kind
    from .core.prediction import Level as Level
    from .core.step import Guidance as Guidance
    from .core.step import Step as Step
    from .eval import EvalSuite as EvalSuite
    from .guidance import *  # noqa: F403
    from .pipelines.class_conditional import ClassConditionalPipeline as ClassConditionalPipeline
    from .pipelines.embedded import load_embedded as load_embedded
    from .pipelines.steer import steer as steer
    from .samplers.pfgmpp_schedulers import PFGMPPEulerScheduler as PFGMPPEulerScheduler
    from .samplers.pfgmpp_schedulers import PFGMPPHeunScheduler as PFGMPPHeunScheduler
    from .training import KDiffObjective as KDiffObjective
    from .training import PFGMPPObjective as PFGMPPObjective
    from .training import TrainConfig as TrainConfig
    from .training import Trainer as Trainer
    from .training.acflow import ACFlowConfig as ACFlowConfig
    from .training.acflow import ACFlowTrainer as ACFlowTrainer
    from .training.eggroll import Eggroll as Eggroll
    from .training.eggroll import EggrollConfig as EggrollConfig
    from .training.eggroll import EggrollTrainer as EggrollTrainer
    from .training.rewards import RewardSet as RewardSet

_HOME = {
    "ACFlowConfig": "training.acflow",
    "ACFlowTrainer": "training.acflow",
    "ClassConditionalPipeline": "pipelines.class_conditional",
    "Eggroll": "training.eggroll",
    "EggrollConfig": "training.eggroll",
    "EggrollTrainer": "training.eggroll",
    "EvalSuite": "eval",
    "Guidance": "core.step",
    "KDiffObjective": "training",
    "Kind": "core.prediction",
    "Level": "core.prediction",
    "PFGMPPEulerScheduler": "samplers.pfgmpp_schedulers",
    "PFGMPPHeunScheduler": "samplers.pfgmpp_schedulers",
    "PFGMPPObjective": "training",
    "RewardSet": "training.rewards",
    "Step": "core.step",
    "TrainConfig": "training",
    "Trainer": "training",
    "load_embedded": "pipelines.embedded",
    "steer": "pipelines.steer",
}
_FOLDERS = ("core", "eval", "guidance", "pipelines", "samplers", "training")

__all__ = [
    "ACFlowConfig",
    "ACFlowTrainer",
    "ClassConditionalPipeline",
    "Eggroll",
    "EggrollConfig",
    "EggrollTrainer",
    "EvalSuite",
    "Guidance",
    "KDiffObjective",
    "Kind",
    "Level",
    "PFGMPPEulerScheduler",
    "PFGMPPHeunScheduler",
    "PFGMPPObjective",
    "RewardSet",
    "Step",
    "TrainConfig",
    "Trainer",
    "__version__",
    "load_embedded",
    "steer",
]


def __getattr__(name: str) -> Any:
    """A front-door name, a folder, or any public name of ``diffsteer.guidance``, loaded now."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in _FOLDERS:
        return importlib.import_module(f".{name}", __name__)
    if not name.startswith("_"):  # a probe such as hasattr(module, "__wrapped__") loads nothing
        guidance = importlib.import_module(".guidance", __name__)
        if name in guidance.__all__:
            return getattr(guidance, name)
    raise AttributeError(f"module 'diffsteer' has no attribute {name!r}")


def __dir__() -> list[str]:
    guidance = importlib.import_module(".guidance", __name__)
    return sorted({*__all__, *_FOLDERS, *guidance.__all__})
