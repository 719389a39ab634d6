"""The losses of actor and critic, as functions of predictions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.tensors import widen

__all__ = ["ActorLoss", "actor_loss", "critic_loss", "explained_variance", "forward_noised"]


class ActorLoss(NamedTuple):
    """The terms of `actor_loss`, (B,) each: ``total = weight * flow + alpha * drift``."""

    total: Tensor
    flow: Tensor
    drift: Tensor


def forward_noised(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """States of the forward path ``(1 - sigma) * clean + sigma * noise``, (B, ...), float32.

    The critic and the actor both see these: on a deterministic sampling trajectory a state
    determines its end, so a perfect critic would leave no advantage anywhere.
    """
    level = sigma.reshape(-1, *[1] * (clean.ndim - 1))
    return (1 - level) * widen(clean) + level * widen(noise)


def actor_loss(
    policy: Tensor,
    velocity: Tensor,
    weight: Tensor,
    *,
    reference: Tensor | None = None,
    alpha: float = 1.0,
    level_weight: Tensor | None = None,
) -> ActorLoss:
    """``w * |v - u|^2 + alpha * |v - v_ref|^2`` a sample, means over all but the batch; float32.

    The second term bounds the Wasserstein-2 distance to the reference (Fan et al. 2025, arXiv
    2502.06061, theorem 3: up to a factor that grows with the Lipschitz constant). With ``weight``
    from a critic this is AC-Flow (reconstruction), with ``exp(tau * z)`` ORW-CFM-W2, and with
    ``alpha = 0`` reward-weighted flow matching.

    Args:
        policy: velocity predicted by the trained model, (B, ...).
        velocity: the target ``noise - clean``, same shape.
        weight: (B,), not differentiated.
        reference: velocity predicted by the reference at the same states; None where alpha is 0.
        alpha: the strength of the second term, 0 or more.
        level_weight: a factor (B,) on both terms that depends on the noise level alone; it moves
            no minimum.

    Raises:
        ValueError: alpha is above 0 and there is no reference.
    """
    if alpha > 0 and reference is None:
        raise ValueError("alpha above 0 needs the reference's velocity")
    policy = widen(policy)
    flow = (policy - widen(velocity)).square().flatten(1).mean(1)
    drift = torch.zeros_like(flow)
    if reference is not None:
        drift = (policy - widen(reference).detach()).square().flatten(1).mean(1)
    if level_weight is not None:
        flow, drift = flow * level_weight, drift * level_weight
    return ActorLoss(weight.detach() * flow + alpha * drift, flow, drift)


def critic_loss(
    value: Tensor, shaped: Tensor, *, target: str = "mean", tau: float = 1.0, huber: float = 0.0
) -> Tensor:
    """The regression loss of the critic, one number a state, (B,).

    Args:
        value: ``V(x_t, t, c)``, (B,).
        shaped: the shaped rewards ``z`` of the clean samples, (B,).
        target: "mean" fits ``E[z | x_t]`` by squared errors; "soft" fits
            ``log(E[exp(tau * z) | x_t]) / tau`` by the linex loss, which makes exponential weights
            average to one at every state.
        tau: the inverse temperature of "soft".
        huber: errors above this are charged linearly ("mean" alone); 0 for squares throughout.

    Raises:
        ValueError: the target is unknown.
    """
    error = shaped - value
    if target == "soft":
        scaled = tau * error
        return (scaled.exp() - scaled - 1) / tau**2
    if target != "mean":
        raise ValueError(f"target must be 'mean' or 'soft', got {target!r}")
    if huber > 0:
        small = error.abs() <= huber
        return torch.where(small, error.square(), huber * (2 * error.abs() - huber))
    return error.square()


def explained_variance(
    shaped: Tensor, value: Tensor, sigma: Tensor, *, bins: int = 5
) -> list[float | None]:
    """``1 - Var(z - V) / Var(z)`` in equal bins of the noise level, from clean to noise.

    Args:
        shaped: ``z``, (N,); NaN is left out.
        value: ``V``, (N,).
        sigma: noise level of each state, in [0, 1], (N,).
        bins: how many.

    Returns:
        One number a bin; None where the bin has fewer than two states or the rewards do not vary.
    """
    kept = ~shaped.isnan()
    z, v = shaped[kept].double(), value[kept].double()
    place = (sigma[kept].double() * bins).long().clamp(0, bins - 1)
    found: list[float | None] = []
    for index in range(bins):
        here = place == index
        spread = float(z[here].var(unbiased=False)) if int(here.sum()) > 1 else 0.0
        left = float((z - v)[here].var(unbiased=False)) if spread > 0 else 0.0
        found.append(1 - left / spread if spread > 0 else None)
    return found
