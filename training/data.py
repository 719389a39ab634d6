"""Labelled images, and an order to draw them in that is a pure function of (seed, position)."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["EpochOrder", "Images", "LabelledImages", "StoredImages", "derive_seed", "load_images"]

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMN = "label"
EXAMPLE = "'uoft-cs/cifar10'"


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part; unrelated for parts that differ in anything."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Images(Protocol):
    """What training needs of a data set; ``names`` holds one name a class."""

    names: tuple[str, ...]

    def __len__(self) -> int:
        """How many images there are."""

    def take(self, indices: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1], float32 (B, 3, H, W), mirrored where ``flip``, and labels (B,)."""

    def digest(self) -> str:
        """A text that differs where the data differ."""


@dataclass(frozen=True)
class LabelledImages:
    """Images in memory: ``pixels`` uint8 (N, 3, H, W), ``labels`` int64 (N,), class ``names``."""

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.pixels)

    def take(self, indices: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1], float32 (B, 3, H, W), mirrored where ``flip``, and labels (B,)."""
        return _as_input(self.pixels[indices], flip), self.labels[indices]

    def digest(self) -> str:
        """A text that differs where the data differ: a hash of every pixel and label."""
        sums = hashlib.blake2b(digest_size=16)
        sums.update(repr((tuple(self.pixels.shape), self.names)).encode())
        sums.update(self.pixels.contiguous().numpy().data)
        sums.update(self.labels.contiguous().numpy().data)
        return sums.hexdigest()


@dataclass(frozen=True)
class StoredImages:
    """Images that stay on disk and are decoded when they are drawn, by several threads."""

    table: Any
    source: str
    resolution: int
    names: tuple[str, ...]
    threads: int = 8

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.table)

    def take(self, indices: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1], float32 (B, 3, H, W), mirrored where ``flip``, and labels (B,)."""
        with ThreadPoolExecutor(self.threads) as pool:
            rows = list(pool.map(self._row, indices.tolist()))
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in rows]))
        return _as_input(pixels, flip), torch.tensor([label for _, label in rows])

    def digest(self) -> str:
        """A text that differs where the data differ, from the table's own fingerprint."""
        return f"{self.table._fingerprint}-{self.resolution}"

    def _row(self, index: int) -> tuple[np.ndarray[Any, Any], int]:
        row = self.table[index]
        image, label = _columns(self.table, self.source)
        pixels = _square(row[image], self.resolution, self.source, index)
        return pixels, _label(row[label], len(self.names), self.source, index)


class EpochOrder:
    """An endless order of ``count`` items; each epoch is a permutation that the seed alone decides.

    There is no state to save: the items of any stretch of the order can be asked for at any time.

    Raises:
        ValueError: ``count`` is less than 1.
    """

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError("there is nothing to draw from: the data hold no images")
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
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


def load_images(
    source: str, *, split: str = "train", resolution: int = 32, memory: float = 8e9
) -> LabelledImages | StoredImages:
    """Read a labelled image data set through the ``datasets`` library.

    What fits into ``memory`` is decoded once; what does not stays on disk and is decoded as it is
    drawn.

    Args:
        source: a parquet file, a folder of parquet files, a folder of class folders of images, or
            the name of a hub data set. Columns ``img`` or ``image``, and ``label``.
        split: which split to read; a file, or a folder without splits, is "train".
        resolution: side of the square images; others are cropped at the centre and resized.
        memory: bytes that the decoded images may take.

    Raises:
        FileNotFoundError: a path that does not exist.
        ConnectionError: a hub data set that cannot be fetched.
        ValueError: columns, split, labels or images that are not as described.
    """
    table = _open(source, split)
    image, label = _columns(table, source)
    names = _class_names(table, label, source)
    table = _decoded(table, image, source)
    if len(table) * 3 * resolution**2 > memory:
        return StoredImages(table, source, resolution, names)
    pixels = np.empty((len(table), 3, resolution, resolution), dtype=np.uint8)
    labels = np.empty(len(table), dtype=np.int64)
    for index in range(len(table)):
        row = _read(table, index, source)
        pixels[index] = _square(row[image], resolution, source, index)
        labels[index] = _label(row[label], len(names), source, index)
    return LabelledImages(torch.from_numpy(pixels), torch.from_numpy(labels), names)


def _as_input(pixels: Tensor, flip: Tensor) -> Tensor:
    pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
    return pixels.float() / 127.5 - 1


def _open(source: str, split: str) -> Any:
    """The table of one split, with errors that say what to do."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"reading {source!r} needs the datasets library: pip install diffsteer[train]"
        ) from error
    path = Path(source).expanduser()
    local = path.exists() or path.is_absolute() or source.startswith((".", "~"))
    if local and not path.exists():
        raise FileNotFoundError(
            f"data {source!r} does not exist; give a parquet file, a folder of parquet files or of "
            f"class folders, or a hub data set such as {EXAMPLE}"
        )
    try:
        if path.is_file():
            return load_dataset("parquet", data_files={split: str(path)}, split=split)
        return load_dataset(str(path) if local else source, split=split)
    except Exception as error:
        text = " ".join(str(error).split())
        if "split" in text.lower():
            raise ValueError(f"cannot read the split {split!r} of {source!r}: {text}") from error
        if local:
            raise ValueError(
                f"cannot read {source!r} as parquet or as class folders of images: {text}"
            ) from error
        raise ConnectionError(
            f"there is no folder {source!r}, and no hub data set of that name could be fetched; "
            f"check the name (such as {EXAMPLE}) and the network, or give a local path ({text})"
        ) from error


def _columns(table: Any, source: str) -> tuple[str, str]:
    image = next((name for name in IMAGE_COLUMNS if name in table.column_names), None)
    if image is None or LABEL_COLUMN not in table.column_names:
        raise ValueError(
            f"expected the columns 'img' or 'image', and 'label', in {source!r}; found "
            f"{table.column_names}; rename the columns of the data"
        )
    return image, LABEL_COLUMN


def _class_names(table: Any, label: str, source: str) -> tuple[str, ...]:
    names = getattr(table.features[label], "names", None)
    if names:
        return tuple(names)
    values = table.unique(label)
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise ValueError(
            f"expected the column 'label' of {source!r} to hold class numbers from 0 or class "
            f"names, found values such as {values[:3]}"
        )
    return tuple(str(index) for index in range(max(values, default=-1) + 1))


def _decoded(table: Any, image: str, source: str) -> Any:
    """The table with its image column read as pictures, also where the file does not say so."""
    from datasets import Image

    if isinstance(table.features[image], Image):
        return table
    try:
        return table.cast_column(image, Image())
    except Exception as error:
        raise ValueError(
            f"expected encoded images in the column {image!r} of {source!r}, found "
            f"{table.features[image]}"
        ) from error


def _read(table: Any, index: int, source: str) -> Any:
    try:
        return table[index]
    except Exception as error:  # whatever the decoder raises
        raise ValueError(f"image {index} of {source!r} cannot be decoded: {error}") from error


def _square(picture: Any, resolution: int, source: str, index: int) -> np.ndarray[Any, Any]:
    """One image as uint8 (3, resolution, resolution)."""
    try:
        picture = picture.convert("RGB")
    except Exception as error:  # whatever the decoder raises
        raise ValueError(f"image {index} of {source!r} cannot be decoded: {error}") from error
    if picture.size != (resolution, resolution):
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = (left, top, left + side, top + side)
        # Cropped first: resize(box=...) lets the filter reach beyond the box.
        picture = picture.crop(box).resize((resolution, resolution), resample=3)  # bicubic
    return np.asarray(picture, dtype=np.uint8).transpose(2, 0, 1)


def _label(value: Any, classes: int, source: str, index: int) -> int:
    if value is None or not 0 <= value < classes:
        raise ValueError(
            f"image {index} of {source!r} has the label {value!r}, expected 0 to {classes - 1}"
        )
    return int(value)
