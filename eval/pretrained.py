"""The extractors that have names: one is embedded, the others need their weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .extractors import Extractor, cifar_extractor
from .settings import Settings


def _cifar(settings: Settings, device: torch.device | str) -> Extractor:
    return cifar_extractor(device=device)


EXTRACTORS: dict[str, Callable[[Settings, torch.device | str], Extractor]] = {"cifar": _cifar}


def load_extractor(
    name: str, settings: Settings, *, device: torch.device | str = "cpu"
) -> Extractor:
    """A named extractor, resizing as the protocol says.

    Raises:
        ImportError: if a library that it needs is missing; the message says how to install it.
        ValueError: if there is none of that name, or its weights cannot be had.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"extractor must be one of {', '.join(EXTRACTORS)}, got {name!r}")
    return EXTRACTORS[name](settings, device)
