"""A guidance method as plain values for a config file, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from .. import guidance
from ..guidance import CosineScale, LinearScale

METHOD = "method"
_PLAIN = (str, bool, int, float, type(None))


def _named() -> dict[str, type]:
    """What a config may name: our methods and scale ramps, and nothing else."""
    ramps = {cls.__name__: cls for cls in (LinearScale, CosineScale)}
    return {**guidance.rules(), **ramps}


def describe(rule: Any) -> dict[str, Any] | None:
    """The method as a dictionary of plain values, its class by name; None if it has no such form.

    Rules inside rules are described likewise. Infinity becomes ``"inf"``, since JSON has none.

    Example:
        >>> describe(guidance.ClassifierFreeGuidance(scale=3.0))
        {'method': 'ClassifierFreeGuidance', 'scale': 3.0}
    """
    name = type(rule).__name__
    if _named().get(name) is not type(rule) or not is_dataclass(rule):
        return None
    description: dict[str, Any] = {METHOD: name}
    for field in fields(rule):
        value = getattr(rule, field.name)
        if isinstance(value, float) and math.isinf(value):
            value = "inf" if value > 0 else "-inf"
        elif not isinstance(value, _PLAIN):
            value = describe(value)
            if value is None:
                return None
        description[field.name] = value
    return description


def restore(description: Mapping[str, Any]) -> Any:
    """The inverse of ``describe``.

    Raises:
        ValueError: if the method, or one of its arguments, is not known to this version.
    """
    arguments = dict(description)
    name = arguments.pop(METHOD, None)
    cls = _named().get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(
            f"a guider config must name a method by {METHOD!r}, one of {', '.join(_named())}; got "
            f"{name!r}. If a newer diffsteer wrote it, upgrade"
        )
    known = {field.name for field in fields(cls)} if is_dataclass(cls) else set()
    if unknown := sorted(set(arguments) - known):
        raise ValueError(
            f"{name} has no argument {', '.join(unknown)}; it takes {', '.join(sorted(known))}"
        )
    for key, value in arguments.items():
        if isinstance(value, Mapping):
            arguments[key] = restore(value)
        elif value in ("inf", "-inf"):
            arguments[key] = float(value)
    return cls(**arguments)
