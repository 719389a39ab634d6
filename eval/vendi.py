"""Vendi score (Friedman & Dieng 2022): the effective number of different samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .moments import check_features


def vendi(features: Tensor, *, order: float = 1.0) -> float:
    """Exponential of the Rényi entropy of the cosine-similarity matrix's spectrum.

    The eigenvalues are those of the smaller of the N x N similarity and the d x d second moment, so
    N may be large.

    Args:
        features: shape (N, d); rows are scaled to unit length. Computed in float64.
        order: of the entropy: 1 is Shannon's, infinity the inverse of the largest eigenvalue.

    Returns:
        Between 1 (all alike) and N (all orthogonal).

    Raises:
        ValueError: if there are no rows, a value is not finite, or the order is negative.
    """
    check_features(features, "features")
    if len(features) == 0 or not order >= 0:
        raise ValueError(f"expected samples and an order >= 0, got {len(features)} and {order}")
    unit = F.normalize(features.double(), dim=1)
    gram = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    values = torch.linalg.eigvalsh(gram / len(unit))
    values = values[values > len(gram) * torch.finfo(torch.float64).eps * values[-1]]
    if math.isinf(order):
        return 1 / float(values[-1])
    if order == 1:
        return math.exp(-float(torch.special.xlogy(values, values).sum()))
    return math.exp(math.log(float(values.pow(order).sum())) / (1 - order))


def mean_cosine_distance(features: Tensor, groups: Tensor | None = None) -> float:
    """Mean cosine distance of two different samples of a group: diversity after fine-tuning.

    A closed form of the sum of unit rows, so all pairs are counted at the cost of one pass.

    Args:
        features: shape (N, d).
        groups: shape (N,), integer, the class or prompt of each sample; one group by default.

    Returns:
        Mean over groups with at least two samples, in [0, 2]; 0 is mode collapse.

    Raises:
        ValueError: if a value is not finite, or no group has two samples.
    """
    check_features(features, "features")
    unit = F.normalize(features.double(), dim=1)
    if groups is None:
        groups = torch.zeros(len(unit), dtype=torch.int64)
    member: Tensor = torch.unique(groups.to(unit.device), return_inverse=True)[1]
    count = torch.bincount(member).double()
    total = torch.zeros(len(count), unit.shape[1], dtype=torch.float64, device=unit.device)
    total.index_add_(0, member, unit)
    own = torch.zeros_like(count).index_add_(0, member, unit.square().sum(1))
    several = count > 1
    if not bool(several.any()):
        raise ValueError("diversity needs a class or prompt with at least two samples")
    pairs = count * (count - 1)
    similarity = (total.square().sum(1) - own)[several] / pairs[several]
    return float((1 - similarity).mean())
