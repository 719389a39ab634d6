"""Extracted features on disk, under keys that change whenever anything that made them does."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from .features import COLUMNS, FeatureSet
from .report import whole_file


def default_cache_folder() -> Path:
    """``$XDG_CACHE_HOME/diffsteer/features``, or the same under ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "diffsteer" / "features"


class FeatureCache:
    """A folder of feature sets; the least recently used go when it outgrows its limit.

    Args:
        folder: where; made on first writing.
        limit: bytes that it may take.
        verify: key images by the bytes of every file instead of their sizes and times: slower, and
            right even where files change without either.
    """

    def __init__(
        self, folder: Path | None = None, *, limit: int = 20 * 2**30, verify: bool = False
    ) -> None:
        self.folder, self.limit, self.verify = folder or default_cache_folder(), limit, verify

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Only one process at a time is inside for a key; the others wait.

        The system drops the lock of a process that ends, however it ends. Where there is no such
        lock (Windows, some network disks), two processes may extract the same features; the files
        stay whole.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f".{key}.lock"
        file = _locked(path)
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no open file
                path.unlink()
            file.close()

    @staticmethod
    def key(*parts: str | Sequence[int]) -> str:
        """SHA-256 of everything that features depend on: files, extractor ids, indices, rules."""
        digest = hashlib.sha256()
        for part in parts:
            text = part if isinstance(part, str) else ",".join(map(str, part))
            digest.update(f"{len(text)}:{text}".encode())
        return digest.hexdigest()

    def get(self, key: str) -> tuple[FeatureSet, dict[str, Any]] | None:
        """What was stored under ``key`` with its notes, or None; an unreadable file is no hit."""
        path = self.folder / f"{key}.npz"
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: torch.from_numpy(stored[name]) for name in stored if name != "note"}
                note = json.loads(str(stored["note"][()]))
            found = FeatureSet(
                {name[4:]: array for name, array in arrays.items() if name.startswith("tap/")},
                *(arrays[name] for name in COLUMNS),
            )
            os.utime(path)
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            return None
        return found, note

    def put(self, key: str, features: FeatureSet, note: dict[str, Any]) -> None:
        """Store under ``key``: written aside and renamed, so readers see all of it or nothing."""
        arrays: dict[str, Any] = {f"tap/{n}": t.numpy() for n, t in features.taps.items()}
        for name in COLUMNS:
            arrays[name] = getattr(features, name).numpy()
        with whole_file(self.folder / f"{key}.npz", overwrite=True) as file:
            np.savez(file, note=np.array(json.dumps(note)), **arrays)
        self._shrink(keep=f"{key}.npz")

    def _shrink(self, keep: str) -> None:
        files = []
        for path in self.folder.glob("*.npz"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process removed it
                continue
            files.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                return
            if path.name != keep:
                path.unlink(missing_ok=True)
                total -= size


def _locked(path: Path) -> IO[str]:
    """The file at ``path``, locked where that can be; one that its last holder removed is none."""
    while True:
        file = path.open("w")
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()
