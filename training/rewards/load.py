"""Rewards by name, for command lines: built in, in a module, or in a file."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .aesthetic import AestheticScore
from .class_probability import ClassProbability
from .colour import Brightness, ColourTarget
from .image_reward import ImageReward
from .jpeg import JpegSize
from .protocol import Reward, as_reward
from .reward_set import RewardSet
from .text_image import ClipScore, HPSv2, PickScore

__all__ = ["BUILTIN", "load_reward", "load_rewards"]

BUILTIN: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "jpeg": (JpegSize, {}),
    "jpeg-large": (JpegSize, {"compressible": False}),
    "brightness": (Brightness, {}),
    "colour": (ColourTarget, {}),
    "class-probability": (ClassProbability, {"classifier": "guidance"}),
    "class-correct": (ClassProbability, {"classifier": "evaluation", "mode": "correct"}),
    "clip": (ClipScore, {}),
    "pickscore": (PickScore, {}),
    "hpsv2": (HPSv2, {}),
    "aesthetic": (AestheticScore, {}),
    "image-reward": (ImageReward, {}),
}


def load_reward(spec: str, *, device: torch.device | str | None = None) -> Reward:
    """A reward from a line of text.

    Args:
        spec: a name of ``BUILTIN``, with options as in ``"jpeg:quality=80"`` or
            ``"class-probability:label='cat',mode='log'"``; or a callable or class of the user,
            ``"package.module:name"`` or ``"path/to/file.py:name"``.
        device: where rewards that are models go.

    Raises:
        ValueError: the name, an option or the callable is unknown.
        TypeError: what was found is no reward.
    """
    name, colon, rest = spec.partition(":")
    if name in BUILTIN:
        factory, defaults = BUILTIN[name]
        options = {**defaults, **_options(rest, factory, name)}
        if device is not None and "device" in inspect.signature(factory).parameters | _inherited(
            factory
        ):
            options.setdefault("device", device)
        return as_reward(factory(**options))
    if not colon:
        raise ValueError(
            f"unknown reward {spec!r}; give one of {', '.join(BUILTIN)}, or package.module:name, "
            "or path/to/file.py:name"
        )
    module, _, attribute = spec.rpartition(":")
    found = _from_module(module, attribute)
    return as_reward(found() if isinstance(found, type) else found)


def load_rewards(specs: Sequence[str], *, device: torch.device | str | None = None) -> RewardSet:
    """A weighted sum of rewards from texts such as ``["pickscore", "jpeg:quality=80@0.5"]``.

    Args:
        specs: as for ``load_reward``, each with an optional ``@weight`` at its end.
        device: where rewards that are models go.

    Raises:
        ValueError: a weight is no number, or two rewards have the same name.
        TypeError: what was found is no reward.
    """
    found: dict[str, tuple[Reward, float]] = {}
    for spec in specs:
        text, at, weight = spec.rpartition("@")
        text = text if at else spec
        try:
            factor = float(weight) if at else 1.0
        except ValueError as error:
            raise ValueError(f"the weight of reward {spec!r} is no number") from error
        name = text.partition(":")[0] if text.partition(":")[0] in BUILTIN else text
        name = name if name not in found else text
        if name in found:
            raise ValueError(f"the reward {text!r} is given twice")
        found[name] = (load_reward(text, device=device), factor)
    return RewardSet(found)


def _options(text: str, factory: Callable[..., Any], name: str) -> dict[str, Any]:
    """Options written as a call would have them; a bare word stands for itself."""
    if not text:
        return {}
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        pairs = {item.arg: item.value for item in getattr(call, "keywords", [])}
        if not pairs or None in pairs or getattr(call, "args", []):
            raise ValueError("expected name=value")
        options = {
            str(key): value.id if isinstance(value, ast.Name) else ast.literal_eval(value)
            for key, value in pairs.items()
        }
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"cannot read the options {text!r} of reward {name!r} ({error}); write them as "
            "name=value,name=value"
        ) from error
    known = inspect.signature(factory).parameters | _inherited(factory)
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(
            f"the reward {name!r} has no option {unknown[0]!r}; it has "
            f"{', '.join(key for key in known if key != 'options')}"
        )
    return options


def _inherited(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that a constructor hands on to that of its parent."""
    if not isinstance(factory, type) or "options" not in inspect.signature(factory).parameters:
        return {}
    parents = (parent for parent in factory.__mro__[1:-1])
    return {n: p for parent in parents for n, p in inspect.signature(parent).parameters.items()}


def _from_module(module: str, attribute: str) -> Any:
    path = Path(module)
    try:
        if path.suffix == ".py":
            spec = importlib.util.spec_from_file_location(path.stem, path)
            if spec is None or spec.loader is None or not path.is_file():
                raise ImportError(f"there is no file {path}")
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            loaded = importlib.import_module(module)
        return getattr(loaded, attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"cannot load the reward {module}:{attribute} ({error}); its module must be importable "
            "from here, or give path/to/file.py:name"
        ) from error
