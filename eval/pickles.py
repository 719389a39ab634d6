"""Read pickled numbers without running pickled code."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

# What a pickle of nested dicts of numpy arrays needs, under old and new module names.
_ALLOWED = {
    (module, name)
    for name in ("_reconstruct", "scalar")
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
} | {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
}


class UnsafePickle(ValueError):
    """The pickle wants something that is not an array, a container or a number."""


class _NumbersOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UnsafePickle(
                f"the pickle asks for {module}.{name}, which statistics do not need; refusing to "
                "load it, since a pickle can run any program"
            )
        if module.startswith("numpy.core"):  # numpy 2 renamed it and warns about the old name
            module = module.replace("numpy.core", "numpy._core", 1)
            if not hasattr(np, "_core"):
                module = module.replace("numpy._core", "numpy.core", 1)
        return super().find_class(module, name)


def read_numbers(path: Path) -> Any:
    """Unpickle dicts, lists, numbers and numpy arrays from ``path``; refuse everything else.

    Raises:
        UnsafePickle: if the pickle names any other class or function.
        ValueError: if it cannot be read.
    """
    data = path.read_bytes()
    try:
        return _NumbersOnly(io.BytesIO(data)).load()
    except UnsafePickle as error:
        raise UnsafePickle(f"{path}: {error}") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError,
            ImportError, ValueError) as error:  # fmt: skip
        raise ValueError(f"{path} is no readable pickle: {error}") from error
