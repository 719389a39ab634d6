"""Files that are either whole or not there: written aside, then renamed."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError

WHOLE_FILE = 64 * 2**20  # of larger files a fingerprint reads both ends


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``path`` whole or not at all; what was there stays until the new file is complete.

    Raises:
        OSError: if the disk is full or the folder cannot be written; the message names the file and
            what to do, and the half-written file is gone.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
        os.replace(aside, path)
    except OSError as error:
        _remove(aside)
        raise _unwritten(path, error) from error
    except BaseException:
        _remove(aside)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of ``path`` at the end, or vanishes.

    For what other libraries write file by file, such as ``pipe.save_pretrained``.

    Raises:
        OSError: as in ``write_bytes``, also where safetensors calls it an error of its own.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        shutil.rmtree(path, ignore_errors=True)
        os.replace(aside, path)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise _unwritten(path, error) from error
        raise


def _unwritten(path: Path, error: Exception) -> OSError:
    found = re.search(r"(?:I/O error: )?([^:]*) \(os error (\d+)\)", str(error))  # safetensors'
    reason = found[1] if found else getattr(error, "strerror", None) or str(error)
    number = getattr(error, "errno", None) or (int(found[2]) if found else errno.EIO)
    return OSError(
        number,
        f"cannot write {path}: {reason}. Nothing that was finished is lost: "
        "mend that (free some space, or choose another folder) and run the same command again",
    )


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as readable JSON, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_png(path: Path, image: Image.Image) -> None:
    """Write an image as PNG, whole or not at all."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def is_whole_image(path: Path) -> bool:
    """Whether ``path`` is an image that decodes to its last pixel."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):  # SyntaxError is PIL's word for a broken PNG chunk
        return False
    return True


def folder_digest(folder: Path) -> str:
    """A fingerprint of a model folder: names, sizes and contents of its files, 16 hex digits.

    Of a file above 64 MiB only the size and both ends are read, so that the fingerprint of a large
    model takes no time; it tells versions of a model apart and is no proof against tampering.
    """
    digest = hashlib.sha256()
    files = (path for path in folder.rglob("*") if path.is_file())
    visible = [path for path in files if not path.relative_to(folder).as_posix().startswith(".")]
    for path in sorted(visible):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}:{size};".encode())
        with open(path, "rb") as file:
            digest.update(file.read(WHOLE_FILE))
            if size > WHOLE_FILE:
                file.seek(-min(2**20, size - WHOLE_FILE), os.SEEK_END)
                digest.update(file.read())
    return digest.hexdigest()[:16]


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # the error that brought us here is the one to report
