"""The class that each sample was asked to show: from run.json, sub-folders or a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .images import ImageSource
from .runs import read_run, values_of


def find_labels(
    source: ImageSource, how: str | None = None, *, class_names: tuple[str, ...] = ()
) -> Tensor | None:
    """Labels of all images of ``source``, shape (N,) int64, or None where there are none.

    Args:
        source: from ``open_images``.
        how: None looks at the source itself, then at the ``run.json`` that ``generate.py`` wrote,
            then at sub-folders if they are named as classes; "from-dirs" insists on sub-folders;
            anything else is a CSV file of two columns, file and label.
        class_names: names that stand for labels 0, 1, ...; sub-folders and CSV may use either.

    Raises:
        ValueError: if labels were asked for and are missing for some image, or cannot be read.
    """
    if how is None:
        if source.labels is not None:
            return source.labels
        from_run = values_of(read_run(source.where), "label")
        if from_run:
            return _assign(source, from_run, class_names, f"{source.where}/run.json")
        folders = {Path(name).parent.name for name in source.names}
        if folders <= set(class_names):
            how = "from-dirs"
        else:
            return None
    if how == "from-dirs":
        return _from_folders(source, class_names)
    return _assign(source, _read_csv(Path(how)), class_names, how)


def _read_csv(path: Path) -> dict[str, Any]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read labels from {path}: {error}") from error
    if any(len(row) < 2 for row in rows):
        raise ValueError(f"{path}: expected two columns, file and label, in every row")
    if rows and rows[0][1].strip().lower() in ("label", "class"):
        rows = rows[1:]
    return {row[0].strip(): row[1].strip() for row in rows}


def _from_folders(source: ImageSource, class_names: tuple[str, ...]) -> Tensor:
    parents = [Path(name).parent.name for name in source.names]
    found = sorted(set(parents))
    known = set(found) <= set(class_names)
    if len(found) < 2 and not known:
        raise ValueError(
            f"labels from-dirs: {source.where} has no sub-folder for each class; "
            "expected e.g. cat/0001.png, dog/0001.png"
        )
    number = {name: label for label, name in enumerate(class_names if known else found)}
    return torch.tensor([number[parent] for parent in parents], dtype=torch.int64)


def _assign(
    source: ImageSource, by_file: dict[str, Any], class_names: tuple[str, ...], where: str
) -> Tensor:
    found = match_files(source, by_file, where, "label")
    return torch.tensor([_number(v, class_names, where) for v in found], dtype=torch.int64)


def match_files(source: ImageSource, by_file: dict[str, Any], where: str, what: str) -> list[Any]:
    """The value of each image of ``source``, by its path or, where those differ, its file name.

    Raises:
        ValueError: if an image has none.
    """
    short = {Path(name).name: value for name, value in by_file.items()}
    unique = len(short) == len(by_file)
    found = []
    for name in source.names:
        value = by_file.get(name, short.get(Path(name).name) if unique else None)
        if value is None:
            raise ValueError(f"{where} gives no {what} for {name} of {source.where}")
        found.append(value)
    return found


def _number(value: Any, class_names: tuple[str, ...], where: str) -> int:
    if isinstance(value, str) and value in class_names:
        return class_names.index(value)
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        known = f" or one of {', '.join(class_names)}" if class_names else ""
        raise ValueError(f"{where}: label {value!r} is no integer{known}") from error
