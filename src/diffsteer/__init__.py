"""Steer diffusion and flow models: at sampling time, in training, and by reward."""

from __future__ import annotations

import importlib
from typing import Any

from ._version import __version__ as __version__

# Front-door names, loaded on first use: importing diffusers takes seconds, `import diffsteer` must not.
_FRONT_DOOR = {
    "steer": "pipelines.steer",
    "load_embedded": "pipelines.embedded",
    "ClassConditionalPipeline": "pipelines.class_conditional",
    "ClassifierFreeGuidance": "guidance",
    "AdaptiveProjectedGuidance": "guidance",
    "GuidanceInterval": "guidance",
    "Step": "core.step",
    "Level": "core.prediction",
    "Kind": "core.prediction",
}

__all__ = ["__version__", *_FRONT_DOOR]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _FRONT_DOOR:
        raise AttributeError(f"module 'diffsteer' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_FRONT_DOOR[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
