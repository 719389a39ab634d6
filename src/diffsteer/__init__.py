"""Steer diffusion and flow models: at sampling time, in training, and by reward.

The front door: ``steer``, ``load_embedded``, the few types everything is written in, and every
rule of ``diffsteer.guidance``. All are loaded on first use, because importing diffusers takes
seconds and ``import diffsteer`` must not.
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
    from .guidance import *  # noqa: F403
    from .pipelines.class_conditional import ClassConditionalPipeline as ClassConditionalPipeline
    from .pipelines.embedded import load_embedded as load_embedded
    from .pipelines.steer import steer as steer

_HOME = {
    "ClassConditionalPipeline": "pipelines.class_conditional",
    "Guidance": "core.step",
    "Kind": "core.prediction",
    "Level": "core.prediction",
    "Step": "core.step",
    "load_embedded": "pipelines.embedded",
    "steer": "pipelines.steer",
}
_FOLDERS = ("core", "eval", "guidance", "pipelines", "samplers", "training")

__all__ = [
    "ClassConditionalPipeline",
    "Guidance",
    "Kind",
    "Level",
    "Step",
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
