"""Where images come from: folders, zip files, arrays in npz, datasets; read in order, lazily."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .arrays import open_array
from .decode import Alpha, ImageError, as_uint8, decode

OnError = Literal["fail", "skip"]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
# A disk, an archive with a damaged member, an array of another range, a row without a picture.
_UNREADABLE = (OSError, zipfile.BadZipFile, zlib.error, ValueError, TypeError)


@dataclass
class ImageSource:
    """A fixed list of images that can be read one by one, in any order, from several threads.

    Args:
        where: the path or dataset id, for messages.
        names: one name an image.
        read: from an index to what ``decode`` takes, or to a uint8 tensor (3, H, W).
        fingerprint: changes whenever a file is added, removed or written to.
        labels: shape (N,), int64, or None where no label is known.
        ignored: files found beside the images that are no images.
    """

    where: str
    names: Sequence[str]
    read: Callable[[int], Any]
    fingerprint: str
    labels: Tensor | None = None
    ignored: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.names)

    def content(self) -> str:
        """A digest of the names and of every byte of every image: ``fingerprint`` without trust."""
        digest = hashlib.sha256()
        for index, name in enumerate(self.names):
            try:
                data = self.read(index)
                raw = data.read_bytes() if isinstance(data, Path) else data
            except _UNREADABLE as error:
                raise ImageError(f"cannot read image {name} of {self.where}: {error}") from error
            raw = raw.numpy().tobytes() if isinstance(raw, Tensor) else raw
            digest.update(f"{name}\0{len(raw)}\0".encode())
            digest.update(raw)
        return digest.hexdigest()

    def image(self, index: int, *, alpha: Alpha = "white") -> Tensor:
        """Image ``index`` as uint8, shape (3, H, W).

        Raises:
            ImageError: if it cannot be read; the message names the file.
        """
        name = f"{self.names[index]} of {self.where}"
        try:
            data = self.read(index)
        except _UNREADABLE as error:
            raise ImageError(f"cannot read image {name}: {error}") from error
        if isinstance(data, Tensor):
            return data
        return decode(data, name, alpha=alpha, notes=self.notes)


@dataclass(frozen=True)
class Batch:
    """Some images in a row: (B, 3, H, W) if all have one size, a list of (3, H, W) if not."""

    images: Tensor | list[Tensor]
    indices: list[int]


def open_images(where: str | Path) -> ImageSource:
    """Open a folder, zip, npz, npy or parquet file, or a hub dataset by its id.

    A folder that has an ``images`` folder inside (what ``generate.py`` writes) stands for that;
    folders are searched through all levels.

    Raises:
        ValueError: if there is no such thing, or there are no images in it.
    """
    path = Path(where)
    if path.is_dir():
        source = _folder(path)
    elif path.suffix == ".zip" and path.is_file():
        source = _zip(path)
    elif path.suffix in (".npz", ".npy") and path.is_file():
        source = _array(path)
    elif path.suffix == ".parquet" or (not path.exists() and str(where).count("/") == 1):
        from .hub_images import open_dataset

        source = open_dataset(str(where))
    else:
        raise ValueError(
            f"no images at {where!r}: expected a folder, .zip, .npz, .npy or .parquet file that "
            "exists, or the id of a hub dataset (owner/name)"
        )
    if len(source) == 0:
        raise ValueError(
            f"no images in {where!r}: expected files that end in {', '.join(SUFFIXES)}"
        )
    return source


def _folder(path: Path) -> ImageSource:
    root = path / "images" if (path / "images").is_dir() else path
    files = sorted(f for f in root.rglob("*") if f.is_file() and not f.name.startswith("."))
    images = [f for f in files if f.suffix.lower() in SUFFIXES]
    digest = hashlib.sha256()
    for file in images:
        stat = file.stat()
        digest.update(f"{file.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    names = [file.relative_to(path).as_posix() for file in images]
    ignored = len(files) - len(images)
    return ImageSource(str(path), names, lambda i: images[i], digest.hexdigest(), None, ignored)


def _zip(path: Path) -> ImageSource:
    try:
        with zipfile.ZipFile(path) as archive:
            files = [info for info in archive.infolist() if not info.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    images = sorted((f for f in files if f.filename.lower().endswith(SUFFIXES)),
                    key=lambda f: f.filename)  # fmt: skip
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    for info in images:
        digest.update(f"{info.filename}\0{info.file_size}\0{info.CRC}\n".encode())

    def read(index: int) -> bytes:
        with zipfile.ZipFile(path) as archive:  # a handle of its own: threads may read at once
            return archive.read(images[index])

    names = [info.filename for info in images]
    return ImageSource(str(path), names, read, digest.hexdigest(), None, len(files) - len(images))


def _array(path: Path) -> ImageSource:
    found = open_array(path, ("arr_0", "images", "samples"))
    if found is None:
        raise ValueError(f"{path} holds no image array: expected arr_0, images or samples in it")
    array = found
    if array.ndim != 4 or 3 not in (array.shape[1], array.shape[-1]):
        raise ValueError(f"{path}: expected images of shape (N, H, W, 3), got {array.shape}")
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path}: expected uint8 images, got {array.dtype}")
    channels_last = array.shape[-1] == 3

    def read(index: int) -> Tensor:
        image = torch.from_numpy(np.array(array[index]))
        image = image.permute(2, 0, 1).contiguous() if channels_last else image
        return as_uint8(image)

    stat = path.stat()
    digest = hashlib.sha256(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    labels = open_array(path, ("labels", "arr_1")) if path.suffix == ".npz" else None
    if labels is not None and labels.shape != (len(array),):
        labels = None
    names = [f"image {i}" for i in range(len(array))]
    return ImageSource(
        str(path), names, read, digest.hexdigest(),
        None if labels is None else torch.from_numpy(np.array(labels)).to(torch.int64),
    )  # fmt: skip


def batches(
    source: ImageSource,
    batch_size: int,
    *,
    indices: Sequence[int] | None = None,
    workers: int = 4,
    on_error: OnError = "fail",
    skipped: list[str] | None = None,
    alpha: Alpha = "white",
) -> Iterator[Batch]:
    """Read ``source`` in order, decoding ahead on threads.

    Args:
        source: from ``open_images``.
        batch_size: images a batch; the last may be smaller.
        indices: which images, all by default.
        workers: decoding threads; 0 decodes in the caller.
        on_error: "fail" raises on the first image that cannot be read, "skip" leaves it out.
        skipped: receives the messages of images left out.
        alpha: see ``decode``.

    Raises:
        ImageError: on the first bad image with ``on_error="fail"``, and with "skip" as soon as more
            than 1 % of all images (and more than one) are bad.
    """
    wanted = range(len(source)) if indices is None else indices
    skipped = [] if skipped is None else skipped
    allowed = max(1, len(wanted) // 100)
    images: list[Tensor] = []
    kept: list[int] = []
    for index, outcome in _read_ahead(source, wanted, workers, alpha):
        if isinstance(outcome, ImageError):
            if on_error == "fail":
                raise outcome
            skipped.append(str(outcome))
            if len(skipped) > allowed:
                raise ImageError(
                    f"more than 1 % of {len(wanted)} images cannot be read, the last: {outcome}"
                ) from outcome
            continue
        images.append(outcome)
        kept.append(index)
        if len(images) == batch_size:
            yield Batch(_stacked(images), kept)
            images, kept = [], []
    if images:
        yield Batch(_stacked(images), kept)


def _stacked(images: list[Tensor]) -> Tensor | list[Tensor]:
    same = all(image.shape == images[0].shape for image in images)
    return torch.stack(images) if same else images


def _read_ahead(
    source: ImageSource, wanted: Sequence[int], workers: int, alpha: Alpha
) -> Iterator[tuple[int, Tensor | ImageError]]:
    def read(index: int) -> Tensor | ImageError:
        try:
            return source.image(index, alpha=alpha)
        except ImageError as error:
            return error

    if workers == 0:
        yield from ((index, read(index)) for index in wanted)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending: list[tuple[int, Future[Tensor | ImageError]]] = []
        for index in wanted:
            pending.append((index, pool.submit(read, index)))
            if len(pending) >= 64 * workers:
                ready, future = pending.pop(0)
                yield ready, future.result()
        for ready, future in pending:
            yield ready, future.result()
