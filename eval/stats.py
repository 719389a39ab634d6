"""Reference statistics: ours to write, and those of ADM, EDM, EDM2, clean-fid to read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .arrays import open_array
from .frechet import Gaussian
from .moments import Moments
from .pickles import read_numbers
from .report import whole_file

FORMAT = 1


@dataclass(frozen=True)
class Statistics:
    """What is known of a set of images in one feature space.

    Args:
        mean: shape (d,), float64.
        covariance: shape (d, d), float64, ddof 1.
        count: number of images, or None where the file does not say.
        extractor: ``id`` of the extractor, or None where the file does not say.
        features: shape (n, d), some or all of the rows, or None.
        labels: shape (n,), int64, or None.
        header: everything else that the file says about itself.
        spatial: mean and covariance of the spatial features (ADM's sFID), or None.
        where: the file it was read from, for messages.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None
    extractor: str | None = None
    features: Tensor | None = None
    labels: Tensor | None = None
    header: dict[str, Any] = field(default_factory=dict)
    spatial: tuple[Tensor, Tensor] | None = None
    where: str = "memory"

    @classmethod
    def of_moments(cls, moments: Moments, **more: Any) -> Statistics:
        """Statistics of summed features; ``more`` are further fields."""
        return cls(moments.mean, moments.covariance, moments.count, **more)

    @property
    def dim(self) -> int:
        """Number of features, d."""
        return self.mean.shape[0]

    def gaussian(self) -> Gaussian:
        """The Gaussian that a Fréchet distance is measured to, checked and factored once.

        Raises:
            ValueError: if the statistics are not finite, not symmetric or indefinite.
        """
        return self._gaussian

    @cached_property
    def _gaussian(self) -> Gaussian:
        try:
            return Gaussian.of(self.mean, self.covariance)
        except ValueError as error:
            raise ValueError(f"statistics from {self.where}: {error}") from error


def write_statistics(path: Path, statistics: Statistics, *, overwrite: bool = False) -> None:
    """Write our .npz: mu, sigma, n, a JSON header, and features (float16) and labels if any.

    ``mu`` and ``sigma`` are named as the peers name them, so their programs can read the file. It
    is written beside its place and renamed: no half file is left behind.

    Raises:
        FileExistsError: if ``path`` exists and ``overwrite`` is false.
    """
    arrays: dict[str, NDArray[Any]] = {
        "mu": statistics.mean.cpu().numpy(),
        "sigma": statistics.covariance.cpu().numpy(),
        "n": np.array(-1 if statistics.count is None else statistics.count, np.int64),
    }
    if statistics.features is not None:
        arrays["features"] = _float16(statistics.features)
    if statistics.spatial is not None:
        arrays["mu_s"], arrays["sigma_s"] = (part.cpu().numpy() for part in statistics.spatial)
    if statistics.labels is not None:
        arrays["labels"] = statistics.labels.cpu().numpy().astype(np.int32)
    header = {"format": FORMAT, "extractor": statistics.extractor, **statistics.header}
    arrays["header"] = np.array(json.dumps(header, sort_keys=True))
    with whole_file(path, overwrite=overwrite) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_statistics(path: str | Path, *, space: str | None = None) -> Statistics:
    """Read statistics in any of the formats in use.

    Ours, ADM (mu, sigma, mu_s, sigma_s), EDM, clean-fid and pytorch-fid (mu, sigma), dgm-eval
    (reps) as .npz; EDM2 as .pkl; torch-fidelity as .pt. Pickles are read by a restricted reader.

    Args:
        path: the file.
        space: which of several feature spaces in one file (EDM2: "fid" or "fd_dinov2").

    Raises:
        ValueError: if the file is missing, holds no statistics, or they are no mean and covariance.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no statistics at {path}: the file does not exist")
    if path.suffix == ".npz":
        found = _from_npz(path)
    elif path.suffix in (".pkl", ".pickle"):
        found = _from_edm2(path, space)
    elif path.suffix in (".pt", ".pth"):
        found = _from_torch(path)
    else:
        raise ValueError(f"{path}: expected statistics as .npz, .pkl or .pt")
    found.gaussian()  # validates
    return found


def _from_npz(path: Path) -> Statistics:
    mean, covariance = open_array(path, ("mu",)), open_array(path, ("sigma",))
    features = open_array(path, ("features", "feats", "reps"))
    rows = None if features is None else torch.from_numpy(np.array(features)).float()
    if mean is None or covariance is None:
        if rows is None:
            raise ValueError(f"{path} holds neither mu and sigma nor features")
        moments = Moments.of(rows)
        return Statistics.of_moments(moments, features=rows, where=str(path))
    header = open_array(path, ("header",))
    spatial = open_array(path, ("mu_s",)), open_array(path, ("sigma_s",))
    labels, count = open_array(path, ("labels",)), open_array(path, ("n",))
    about: dict[str, Any] = {} if header is None else json.loads(str(header[()]))
    return Statistics(
        _tensor(mean),
        _tensor(covariance),
        None if count is None or int(count) < 0 else int(count),
        about.get("extractor"),
        rows,
        None if labels is None else _tensor(labels).long(),
        about,
        None if spatial[0] is None or spatial[1] is None else (
            _tensor(spatial[0]), _tensor(spatial[1])),
        str(path),
    )  # fmt: skip


def _from_edm2(path: Path, space: str | None) -> Statistics:
    data = read_numbers(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a dict of statistics, got {type(data).__name__}")
    if "mu" in data and "sigma" in data:
        chosen: Any = data
    else:
        spaces = [key for key, value in data.items() if isinstance(value, dict) and "mu" in value]
        space = space or (spaces[0] if len(spaces) == 1 else None)
        if space not in spaces:
            raise ValueError(f"{path} holds the spaces {spaces}; say which one, got {space!r}")
        chosen = data[space]
    count = data.get("num_images")
    return Statistics(
        _tensor(chosen["mu"]), _tensor(chosen["sigma"]), None if count is None else int(count),
        header={"space": space}, where=str(path),
    )  # fmt: skip


def _from_torch(path: Path) -> Statistics:
    from numpy._core import multiarray

    allowed: list[Any] = [np.ndarray, np.dtype, multiarray._reconstruct, type(np.dtype(np.float64)),
               type(np.dtype(np.float32))]  # fmt: skip
    try:
        with torch.serialization.safe_globals(allowed):
            data = torch.load(path, map_location="cpu", weights_only=True)
        return Statistics(_tensor(data["mu"]), _tensor(data["sigma"]), where=str(path))
    except Exception as error:
        raise ValueError(
            f"{path} holds no mu and sigma that can be read safely: {error}"
        ) from error


def _tensor(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array.double()
    return torch.from_numpy(np.array(array)).double()


def _float16(features: Tensor) -> NDArray[Any]:
    if float(features.abs().max()) > 65504:
        raise ValueError(
            "features exceed the range of float16; write statistics without --features"
        )
    rows: NDArray[Any] = features.cpu().numpy().astype(np.float16)
    return rows
