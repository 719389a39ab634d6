"""Labelled images, and an order to draw them in that is a pure function of (seed, position)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMN = "label"


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part; unrelated for parts that differ in anything."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class LabelledImages:
    """All images in memory: ``pixels`` uint8 (N, 3, H, W), ``labels`` int64 (N,), ``names`` one a class."""

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1] as float32 (B, 3, H, W), mirrored where ``flip``, and their labels (B,)."""
        pixels = self.pixels[indices]
        pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
        return pixels.float() / 127.5 - 1, self.labels[indices]


class EpochOrder:
    """An endless order of ``count`` items: every epoch a fresh permutation, each a function of the seed alone.

    There is no state to save: the items of any stretch of the order can be asked for at any time.
    """

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError("there is nothing to draw from: the data has no images")
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def epoch(self, epoch: int) -> Tensor:
        """The order of the items in one epoch, (count,)."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            self._permutation = torch.randperm(self.count, generator=generator)
            self._epoch = epoch
        return self._permutation

    def stretch(self, start: int, length: int) -> Tensor:
        """The items at positions ``start`` to ``start + length``, (length,)."""
        parts = []
        while length:
            epoch, offset = divmod(start, self.count)
            part = self.epoch(epoch)[offset : offset + length]
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return torch.cat(parts)


def load_images(source: str, *, split: str = "train", resolution: int = 32) -> LabelledImages:
    """Read a labelled image dataset and decode it once into memory.

    Args:
        source: A folder of parquet files, a parquet file, a folder of class folders of images, or the name of a
            hub dataset. Columns ``img`` or ``image``, and ``label``.
        split: Which split to read; a file or folder without splits is "train".
        resolution: Side of the square images; others are cropped at the centre and resized.

    Raises:
        FileNotFoundError: A path that does not exist.
        ConnectionError: A hub dataset that cannot be fetched.
        ValueError: Columns, split or images that are not as described.
    """
    table = _open(source, split)
    image, label = _columns(table, source)
    names = _class_names(table, label)
    pixels = np.empty((len(table), 3, resolution, resolution), dtype=np.uint8)
    labels = np.empty(len(table), dtype=np.int64)
    for index, row in enumerate(_decoded(table, image)):
        pixels[index] = _square(row[image], resolution, source, index)
        labels[index] = _label(row[label], len(names), source, index)
    return LabelledImages(torch.from_numpy(pixels), torch.from_numpy(labels), names)


def _open(source: str, split: str) -> Any:
    from datasets import load_dataset

    path = Path(source)
    if path.is_file():
        return load_dataset("parquet", data_files={split: str(path)}, split=split)
    if not path.is_dir() and (path.is_absolute() or source.startswith(".") or source.count("/") != 1):
        raise FileNotFoundError(
            f"data {source!r} does not exist; give a parquet file, a folder of parquet files or of class folders, "
            "or a hub dataset such as 'uoft-cs/cifar10'"
        )
    try:
        return load_dataset(source, split=split)
    except ValueError as error:
        raise ValueError(f"cannot read the split {split!r} of {source!r}: {error}") from error
    except Exception as error:
        if path.is_dir():
            raise ValueError(f"cannot read {source!r} as parquet files or class folders: {error}") from error
        raise ConnectionError(
            f"{source!r} is no folder here, and the hub dataset of that name could not be fetched ({error}); "
            "check the name and the network, or give a local folder"
        ) from error


def _columns(table: Any, source: str) -> tuple[str, str]:
    image = next((name for name in IMAGE_COLUMNS if name in table.column_names), None)
    if image is None or LABEL_COLUMN not in table.column_names:
        raise ValueError(
            f"expected the columns 'img' or 'image', and 'label', in {source!r}; found {table.column_names}; "
            "rename the columns of the data"
        )
    return image, LABEL_COLUMN


def _class_names(table: Any, label: str) -> tuple[str, ...]:
    names = getattr(table.features[label], "names", None)
    if names:
        return tuple(names)
    values = table[label]
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise ValueError("expected the column 'label' to hold class numbers from 0 or a ClassLabel feature")
    return tuple(str(index) for index in range(max(values, default=-1) + 1))


def _decoded(table: Any, image: str) -> Any:
    from datasets import Image

    if not isinstance(table.features[image], Image):
        table = table.cast_column(image, Image())
    return table


def _square(picture: Any, resolution: int, source: str, index: int) -> np.ndarray[Any, Any]:
    try:
        picture = picture.convert("RGB")
    except Exception as error:
        raise ValueError(f"image {index} of {source!r} cannot be decoded: {error}") from error
    if picture.size != (resolution, resolution):
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = (left, top, left + side, top + side)
        picture = picture.resize((resolution, resolution), box=box, resample=3)
    return np.asarray(picture, dtype=np.uint8).transpose(2, 0, 1)


def _label(value: Any, classes: int, source: str, index: int) -> int:
    if value is None or not 0 <= value < classes:
        raise ValueError(f"image {index} of {source!r} has the label {value!r}, expected 0 to {classes - 1}")
    return int(value)
