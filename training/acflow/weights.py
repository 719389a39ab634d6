"""From advantages to the weights of the flow-matching loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "FAMILIES",
    "NORMALISATIONS",
    "advantage",
    "check_signed",
    "effective_sample_share",
    "family_weights",
    "normalised_weights",
]

FAMILIES = ("exp", "softplus", "relu_linear", "sigmoid", "rank", "binary", "signed")
NORMALISATIONS = ("batch", "group", "none")


def advantage(shaped: Tensor, value: Tensor | float, *, clip: float = 2.0) -> Tensor:
    """``clip(z - V, -clip, clip)``: how much better a sample ended than its noisy state promised.

    Args:
        shaped: shaped rewards of the clean samples, (B,).
        value: the critic's values of their noisy states, (B,), not differentiated; 0 is no critic.
        clip: largest size; infinite for none. Clipping caps the ratio of two exponential weights
            at ``exp(2 * tau * clip)`` and biases the target a little.
    """
    value = value.detach() if isinstance(value, Tensor) else value
    return (shaped - value).clamp(-clip, clip)


def family_weights(advantages: Tensor, *, family: str = "exp", tau: float = 1.0) -> Tensor:
    """Weights ``w(A)``, increasing with ``w(0) = 1``, not yet normalised; float32 or wider.

    ``exp(tau * A)`` (Boltzmann, the default), ``softplus(tau * A) / ln 2``,
    ``max(0, 1 + tau * A)``, ``2 * sigmoid(tau * A)``, twice the ``rank`` in the batch over N - 1,
    ``binary`` (2 above zero, 0 below), and ``signed``, which is the advantage itself (``w(0) = 0``;
    see `check_signed`). Reconstruction: which of them AC-Flow calls generalized critic weighting is
    not public.

    Args:
        advantages: (B,); NaN gives NaN.
        family: one of ``FAMILIES``.
        tau: the inverse temperature.

    Raises:
        ValueError: the family is unknown.
    """
    a = advantages.detach()
    a = a if a.dtype == torch.float64 else a.float()
    if family == "exp":
        return (tau * a).exp()
    if family == "softplus":
        return F.softplus(tau * a) / math.log(2)
    if family == "relu_linear":
        return (1 + tau * a).clamp(min=0)
    if family == "sigmoid":
        return 2 * torch.sigmoid(tau * a)
    if family == "rank":
        return _ranks(a)
    if family == "binary":
        return 1 + a.sign()
    if family == "signed":
        return a
    raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")


def _ranks(a: Tensor) -> Tensor:
    """Twice the rank in [0, 1], ties sharing the mean of theirs; 1 where all are equal."""
    count = (~a.isnan()).sum()
    if count < 2:
        return torch.ones_like(a)
    below = (a[:, None] > a[None, :]).sum(1).to(a.dtype)
    equal = (a[:, None] == a[None, :]).sum(1).to(a.dtype) - 1
    rank = 2 * (below + equal / 2) / (count - 1)
    return torch.where(a.isnan(), torch.nan, rank)


def normalised_weights(
    advantages: Tensor,
    groups: Tensor,
    *,
    family: str = "exp",
    tau: float = 1.0,
    normalise: str = "batch",
) -> Tensor:
    """`family_weights` divided by their mean over the batch or over each prompt.

    With the W2 term the scale of the weights is not separable from alpha, so mean-1 weights give
    alpha a meaning. The batch must be the global one, of all ranks and accumulation passes: the
    learning rate would differ from rank to rank otherwise. Exponential weights subtract the largest
    exponent first and cannot overflow.

    Args:
        advantages: (B,), the whole batch; NaN marks samples without a weight, which get 0 and do
            not count in the mean.
        groups: integer, the prompt of each, (B,).
        family: see `family_weights`.
        tau: the inverse temperature.
        normalise: "batch", "group" (one prompt) or "none".

    Raises:
        ValueError: a name is unknown, or signed weights are to be normalised: their mean is zero.
    """
    if normalise not in NORMALISATIONS:
        raise ValueError(f"normalise must be one of {', '.join(NORMALISATIONS)}, got {normalise!r}")
    if family == "signed" and normalise != "none":
        raise ValueError("signed weights have a mean of about zero: use normalise='none'")
    kept = ~advantages.isnan()
    if family == "exp" and normalise != "none" and len(advantages):
        largest = advantages.nan_to_num(nan=-math.inf).max()
        advantages = advantages - torch.where(largest.isfinite(), largest, 0.0)
    if family == "exp" and normalise == "group":
        advantages = advantages - _group_largest(advantages, groups)
    weight = family_weights(advantages, family=family, tau=tau)
    weight = torch.where(kept, weight, torch.zeros_like(weight))
    if normalise == "none":
        return weight
    member, size = groups * 0, 1
    if normalise == "group":
        member = groups.unique(return_inverse=True)[1]
        size = int(member.max()) + 1 if len(member) else 0
    sums = weight.new_zeros(size).index_add_(0, member, weight)
    count = weight.new_zeros(size).index_add_(0, member, kept.to(weight.dtype))
    mean = (sums / count.clamp(min=1))[member]
    # All weights of a group may be zero (binary, relu_linear): then there is nothing to weigh.
    return torch.where(mean > 0, weight / mean, torch.zeros_like(weight))


def _group_largest(advantages: Tensor, groups: Tensor) -> Tensor:
    member = groups.unique(return_inverse=True)[1]
    largest = advantages.new_full((int(member.max()) + 1,), -math.inf)
    known = advantages.nan_to_num(nan=-math.inf)
    largest = largest.scatter_reduce(0, member, known, "amax")[member]
    return torch.where(largest.isfinite(), largest, torch.zeros_like(largest))


def check_signed(family: str, alpha: float, clip: float) -> None:
    """Refuse signed weights that can make the loss unbounded.

    With ``w = A`` the loss of one state is ``A * |v - u|^2 + alpha * |v - v_ref|^2``. Its
    expectation is convex, but a finite batch is unbounded below unless ``alpha > clip``.

    Raises:
        ValueError: ``alpha`` is not above ``clip``.
    """
    if family == "signed" and not alpha > clip:
        raise ValueError(
            f"signed weights need alpha above the advantage clip, or a batch of bad samples makes "
            f"the loss unbounded below: got alpha={alpha} and advantage_clip={clip}; raise alpha "
            "or lower advantage_clip"
        )


def effective_sample_share(weights: Tensor) -> Tensor:
    """``(sum |w|)^2 / (n * sum w^2)``, (): 1 for equal weights, 1/n where one sample has it all."""
    total = weights.abs().sum().square()
    return total / (len(weights) * weights.square().sum()).clamp(min=torch.finfo(total.dtype).tiny)
