"""How many dimensions the data really has, and the k of k-Diff that follows.

The rule ``k* = D / (D + d)``, D ambient and d intrinsic, is attributed to the paper by a secondary
source; its derivation here (for the best linear predictor) is a reconstruction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.student import check_augment_dim


def _rows(data: Tensor) -> Tensor:
    if data.ndim < 2 or data.shape[0] < 3 or not data[0].numel():
        raise ValueError(
            f"expected at least three samples of at least one value, got shape {tuple(data.shape)}"
        )
    return data.flatten(1).double()


def participation_ratio(data: Tensor) -> float:
    """``(trace C)^2 / trace C^2`` of the covariance: how many directions share the variance.

    Args:
        data: samples, (N, ...), N > 2.

    Returns:
        Between 1 and the ambient dimension, if the data varies at all.

    Raises:
        ValueError: for fewer than three samples, or data without variance.
    """
    rows = _rows(data)
    rows = rows - rows.mean(0)
    # trace C and trace C^2 from whichever Gram matrix is smaller.
    gram = rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows
    trace, square = gram.diagonal().sum(), gram.square().sum()
    if not square > 0:
        raise ValueError("the data does not vary: every sample is the same")
    return float(trace**2 / square)


def maximum_likelihood_dimension(data: Tensor, neighbours: int = 10, chunk: int = 1024) -> float:
    """The nearest-neighbour estimate of Levina and Bickel (2004), averaged in its inverse.

    It is the inverse that has no bias with ``neighbours - 1`` terms (MacKay and Ghahramani 2005);
    Levina and Bickel's divisor belongs to a mean of the estimates themselves.

    Args:
        data: samples, (N, ...); duplicates are ignored.
        neighbours: how many neighbours each estimate uses, at least 3.
        chunk: rows of the distance matrix at a time.

    Returns:
        The dimension of the manifold that the samples lie near.

    Raises:
        ValueError: if there are not more samples than neighbours.
    """
    rows = torch.unique(_rows(data), dim=0)
    if neighbours < 3 or rows.shape[0] <= neighbours:
        raise ValueError(
            f"neighbours must be at least 3 and less than the {rows.shape[0]} distinct samples, "
            f"got {neighbours}"
        )
    inverse = []
    for part in rows.split(chunk):
        near = torch.cdist(part, rows).topk(neighbours + 1, largest=False).values[:, 1:].log()
        inverse.append((near[:, -1:] - near[:, :-1]).sum(1) / (neighbours - 1))
    return float(1 / torch.cat(inverse).mean())


def trace_dimension(data: Tensor) -> float:
    """``trace C`` of data in units where noise has variance 1 a dimension: the energy rule's d.

    The target ``u_k`` has the least energy at ``k = D / (D + trace C)``, with the samples scaled as
    they are fed to the network.
    """
    return float(_rows(data).var(0, correction=1).sum())


def suggest_k(
    data: Tensor,
    method: str = "trace",
    patch_size: int | None = None,
    augment_dim: float = math.inf,
) -> float:
    """``D / (D + d)`` from data alone, without training.

    Args:
        data: images as they are fed to the network, (N, C, H, W), or vectors (N, D).
        method: how d is estimated: ``"trace"`` (robust and quick), ``"participation"`` or
            ``"neighbours"``.
        patch_size: cut images into patches of this side first: a patch is what one token predicts.
        augment_dim: of PFGM++: Student-t noise has ``augment_dim / (augment_dim - 2)`` times the
            energy of Gaussian noise, and the ambient D counts noise energy. Infinite at 2 or less.

    Returns:
        k in [1/2, 1) where d <= D; 1 where the noise has no variance.

    Raises:
        ValueError: for an unknown method or a patch size that does not divide the image.
    """
    estimators = {
        "trace": trace_dimension,
        "participation": participation_ratio,
        "neighbours": maximum_likelihood_dimension,
    }
    if method not in estimators:
        raise ValueError(f"method must be one of {', '.join(estimators)}, got {method!r}")
    if patch_size is not None:
        data = patches(data, patch_size)
    if check_augment_dim(augment_dim) <= 2:
        return 1.0
    gain = 1.0 if math.isinf(augment_dim) else augment_dim / (augment_dim - 2)
    ambient = gain * data[0].numel()
    return ambient / (ambient + estimators[method](data))


def patches(images: Tensor, size: int) -> Tensor:
    """Non-overlapping patches, (N * patches, C * size * size).

    Raises:
        ValueError: if ``size`` does not divide height and width.
    """
    if images.ndim != 4 or size < 1 or images.shape[2] % size or images.shape[3] % size:
        raise ValueError(
            f"patch_size {size} must divide the sides of images (N, C, H, W), "
            f"got {tuple(images.shape)}"
        )
    columns = torch.nn.functional.unfold(images.float(), size, stride=size)
    return columns.transpose(1, 2).flatten(0, 1)
