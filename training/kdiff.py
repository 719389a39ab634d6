"""k-Diff (arXiv 2601.21419): one target between image and noise prediction.

``u = k * clean - (1 - k) * noise``.

k = 1 predicts the image, k = 1/2 half the velocity (towards the data), k = 0 minus the noise. The
paper's full text was not available: the target and the clamp are known from secondary sources, the
loss is a reconstruction (a velocity loss, clamped on both sides as in JiT), and so is every default
below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.prediction import Q_FLOOR, Kind, Level
from ..core.tensors import widen
from .flow import Network, draw_flow, flow_output
from .noise import NoiseLaw


def kdiff_target(clean: Tensor, noise: Tensor, k: Tensor | float) -> Tensor:
    """``k * clean - (1 - k) * noise``, shape (B, ...)."""
    return k * clean - (1 - k) * noise


def kdiff_q(level: Level, like: Tensor, k: Tensor | float) -> Tensor:
    """``q = alpha * (1 - k) + k * sigma``, by which errors in u become errors in velocity.

    On the straight path q >= min(k, 1 - k): an interior k has no singularity at any noise level.
    """
    alpha, sigma = level.over(like)
    return alpha * (1 - k) + k * sigma


def kdiff_velocity(
    output: Tensor, x: Tensor, level: Level, k: Tensor | float, *, q_floor: float = Q_FLOOR
) -> Tensor:
    """The velocity ``noise - clean`` of diffusers' flow-match schedulers, from a k-Diff output.

    ``-[(1 - 2k) x + (alpha + sigma) u] / max(q, q_floor)``, numerator and quotient in float32 or
    wider: near k = 1 and low noise the numerator is a small difference of large numbers.

    Args:
        output: the network's u, (B, ...).
        x: the noisy sample, same shape.
        level: its noise level, ``alpha + sigma = 1`` on the flow path.
        k: in [0, 1].
        q_floor: least q that is divided by; with k in [0.05, 0.95] it is never reached.

    Returns:
        Shape and dtype of ``output``.
    """
    alpha, sigma = level.over(x)
    q = kdiff_q(level, x, k).clamp_min(q_floor)
    towards_data = ((1 - 2 * k) * widen(x) + (alpha + sigma) * widen(output)) / q
    return (-towards_data).to(output.dtype)


def kdiff_loss(
    network: Network,
    clean: Tensor,
    noise: Tensor,
    level: Level,
    labels: Tensor,
    *,
    k: Tensor | float,
    q_floor: float = Q_FLOOR,
    augment_dim: float = math.inf,
) -> Tensor:
    """Mean squared velocity error of a k-Diff network, one number a sample, (B,).

    ``mean |u_hat - u_k|^2 / max(q, q_floor)^2``: above the floor this is the velocity error
    exactly, and below it prediction and target are clamped alike, so a perfect network still has
    loss 0. Gradients flow through k, in the target and in q; stopping either would leave k nothing
    to learn from.

    Args:
        network: ``network(x, timestep, labels)``, output shaped like ``x``.
        clean: images, (B, ...).
        noise: like ``clean``.
        level: alpha and sigma of shape (B,).
        labels: class indices, (B,).
        k: a number, or a tensor that is being learnt.
        q_floor: least q that is divided by.
        augment_dim: D of the noise; at D <= 2 the network's input is kept from exploding.
    """
    output = flow_output(network, clean, noise, level, labels, augment_dim)
    error = (output - kdiff_target(clean, noise, k)) / kdiff_q(level, clean, k).clamp_min(q_floor)
    return error.square().flatten(1).mean(1)


class LearnedK(nn.Module):
    """The scalar k = sigmoid(w): one float32 parameter, to be trained in a group of its own.

    Args:
        start: the k to start from, strictly between 0 and 1.

    Raises:
        ValueError: if ``start`` is not strictly between 0 and 1, where w would be infinite.
    """

    def __init__(self, start: float = 0.5) -> None:
        super().__init__()
        if not 0 < start < 1:
            raise ValueError(
                f"a learned k starts strictly between 0 and 1, got {start}; "
                "for exactly 0 or 1 use a fixed k"
            )
        self.logit = nn.Parameter(torch.tensor([math.log(start / (1 - start))]))

    def forward(self) -> Tensor:
        """k, shape (1,), float32."""
        return torch.sigmoid(self.logit.float())

    def group(self, learning_rate: float) -> dict[str, object]:
        """The optimizer group: at least ten times the network's rate (try 1e-2), no weight decay.

        Weight decay would pull k to 1/2.
        """
        return {"params": [self.logit], "lr": learning_rate, "weight_decay": 0.0}


@dataclass(frozen=True)
class KDiffObjective(NoiseLaw):
    """k-Diff training with logit-normal noise levels.

    With a finite ``augment_dim`` it learns on the noise of PFGM++.

    Attributes:
        k: a number in [0, 1], or a ``LearnedK``.
        mean: mean of the logit of sigma.
        std: standard deviation of the logit of sigma.
        q_floor: see ``kdiff_loss``.
        loss: ``"velocity"``; ``"target"`` (plain error in u) only for a fixed k.
        augment_dim: D of the noise, see ``NoiseLaw``; infinity is Gaussian.
        stable_targets: learn the mean over the batch (STF), see ``NoiseLaw``.

    Raises:
        ValueError: if k is not in [0, 1], or is learned under the target loss. That choice is
            degenerate: with k free the network is rewarded for an easy target, not for a good
            prediction, and k returns to 1/2 whatever the data.
    """

    k: float | LearnedK = 0.5
    mean: float = 0.4
    std: float = 0.8
    q_floor: float = Q_FLOOR
    loss: str = "velocity"

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        super().__post_init__()
        if self.loss not in ("velocity", "target"):
            raise ValueError(f"loss must be 'velocity' or 'target', got {self.loss!r}")
        if isinstance(self.k, LearnedK):
            if self.loss == "target":
                raise ValueError(
                    "a learned k under loss='target' makes the target easy, not the prediction "
                    "good: its optimum is k = 1/2 for any data. Use loss='velocity' or fix k"
                )
        elif not 0 <= self.k <= 1:
            raise ValueError(f"k must be in [0, 1], got {self.k}")

    @property
    def learned(self) -> LearnedK | None:
        """What is trained beside the network: the k, if it is learned."""
        return self.k if isinstance(self.k, LearnedK) else None

    @property
    def kind(self) -> Kind:
        """What the network's raw output means, at the present k."""
        return Kind.kdiff(float(self.k().detach()) if isinstance(self.k, LearnedK) else self.k)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Level]:
        """Noise of ``shape`` (B, ...) and levels of shape (B,), on the generator's device."""
        dim = self.augment_dim
        return draw_flow(shape, generator, mean=self.mean, std=self.std, augment_dim=dim)

    def __call__(
        self, network: Network, clean: Tensor, noise: Tensor, level: Level, labels: Tensor
    ) -> Tensor:
        """The loss of each sample, (B,); see ``kdiff_loss``."""
        k = self.k().to(clean.device) if isinstance(self.k, LearnedK) else self.k
        dim = self.augment_dim
        if self.loss == "velocity":
            return kdiff_loss(
                network, clean, noise, level, labels, k=k, q_floor=self.q_floor, augment_dim=dim
            )
        output = flow_output(network, clean, noise, level, labels, dim)
        return (output - kdiff_target(clean, noise, k)).square().flatten(1).mean(1)
