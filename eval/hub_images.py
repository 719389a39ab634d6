"""Images and labels of a dataset: a parquet file, or a hub id through the ``datasets`` library."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .images import ImageSource

_IMAGE_COLUMNS = ("image", "img", "images", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")


def open_dataset(where: str) -> ImageSource:
    """Open a parquet file, or a hub dataset by ``owner/name`` or ``owner/name@split``.

    Without a split, "test" is taken where there is one, then "validation", then "train".

    Raises:
        ImportError: if the library that reads it is missing.
        ValueError: if the dataset cannot be loaded, or has no image column.
    """
    return _parquet(Path(where)) if where.endswith(".parquet") else _hub(where)


def _parquet(path: Path) -> ImageSource:
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(f"reading {path} needs pyarrow: pip install datasets") from error
    try:
        table = parquet.read_table(path, memory_map=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    image, label = _columns(str(path), table.column_names)
    column = table[image]

    def read(index: int) -> Any:
        return _bytes_or_path(column[index].as_py())

    labels = None if label is None else _labels(table[label].to_pylist())
    stat = path.stat()
    fingerprint = hashlib.sha256(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return _source(str(path), len(table), read, fingerprint.hexdigest(), labels)


def _hub(where: str) -> ImageSource:
    try:
        import datasets  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(
            f"there is no folder or file {where!r}; a hub dataset of that name needs the datasets "
            "library: pip install diffsteer[train]"
        ) from error
    name, _, chosen = where.partition("@")
    try:
        parts = datasets.load_dataset(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"there is no folder or file {where!r}, nor a hub dataset of that name that can be "
            f"loaded: {error}"
        ) from error
    wanted = [chosen] if chosen else ["test", "validation", "train", *parts]
    split = next((s for s in wanted if s in parts), None)
    if split is None:
        raise ValueError(f"the dataset {name!r} has no split {chosen!r}, only {', '.join(parts)}")
    data = parts[split]
    image, label = _columns(where, data.column_names)
    # Undecoded: bytes are decoded on our threads, by our rules.
    data = data.cast_column(image, datasets.Image(decode=False))
    labels = None if label is None else _labels(data[label][:])
    return _source(
        where, len(data), lambda i: _bytes_or_path(data[i][image]), str(data._fingerprint), labels
    )


def _columns(where: str, names: Sequence[str]) -> tuple[str, str | None]:
    image = next((name for name in _IMAGE_COLUMNS if name in names), None)
    if image is None:
        raise ValueError(
            f"{where} has no image column: expected one of {_IMAGE_COLUMNS}, got {tuple(names)}"
        )
    return image, next((name for name in _LABEL_COLUMNS if name in names), None)


def _labels(values: Sequence[Any]) -> Tensor | None:
    """Class numbers; texts and gaps are no labels."""
    if not all(isinstance(value, int) for value in values):
        return None
    return torch.tensor(values, dtype=torch.int64)


def _bytes_or_path(entry: Any) -> Any:
    if isinstance(entry, bytes):
        return entry
    return entry["bytes"] if entry["bytes"] is not None else Path(entry["path"])


def _source(
    where: str, count: int, read: Callable[[int], Any], fingerprint: str, labels: Tensor | None
) -> ImageSource:
    return ImageSource(where, [f"row {i}" for i in range(count)], read, fingerprint, labels)
