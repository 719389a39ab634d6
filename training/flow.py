"""Flow matching: the straight path between image and noise, learnt as velocity or as image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.prediction import Kind, Level
from ..core.student import student_noise
from ..core.tensors import per_sample
from ..samplers.pfgmpp import limited
from .noise import NoiseLaw

__all__ = ["TIMESTEPS", "FlowMatching", "Network", "logit_normal", "velocity_loss"]

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``network(x, timestep, labels)``: the raw output, shaped like ``x``."""

TIMESTEPS = 1000.0  # what FlowMatchEulerDiscreteScheduler multiplies sigma by for the network


def logit_normal(gauss: Tensor, *, mean: float, std: float) -> Tensor:
    """Noise levels ``sigmoid(std * gauss + mean)`` in (0, 1), of the shape of ``gauss``."""
    return torch.sigmoid(std * gauss + mean)


def draw_flow(
    shape: tuple[int, ...],
    generator: torch.Generator,
    *,
    mean: float,
    std: float,
    augment_dim: float = math.inf,
) -> tuple[Tensor, Level]:
    """Noise of ``shape`` (B, ...) and logit-normal levels of shape (B,), where the generator is.

    At a finite ``augment_dim`` the noise is the Student-t noise of PFGM++.
    """
    gauss = torch.randn(shape[0], generator=generator, device=generator.device)
    sigma = logit_normal(gauss, mean=mean, std=std)
    noise = student_noise(generator, shape, augment_dim)
    return noise, Level(alpha=1 - sigma, sigma=sigma)


def flow_output(
    network: Network,
    clean: Tensor,
    noise: Tensor,
    level: Level,
    labels: Tensor,
    augment_dim: float = math.inf,
) -> Tensor:
    """What a flow network says to ``alpha * clean + sigma * noise``, float32, (B, ...).

    It eats ``1000 * sigma``; at D <= 2 its input is kept from exploding (``samplers.pfgmpp``).
    """
    x = limited(level.mix(clean, noise), augment_dim)
    return network(x, TIMESTEPS * level.sigma, labels).float()


def velocity_loss(
    network: Network,
    clean: Tensor,
    noise: Tensor,
    level: Level,
    labels: Tensor,
    *,
    prediction: str = "velocity",
    sigma_floor: float = 0.05,
    augment_dim: float = math.inf,
) -> Tensor:
    """Mean squared error of the velocity ``noise - clean``, one number a sample, (B,).

    The sample is ``x = alpha * clean + sigma * noise`` with ``alpha = 1 - sigma``, and the network
    eats ``1000 * sigma``. A network that predicts the denoised image is held to the same loss: on
    this path ``velocity = (x - denoised) / sigma``, so its velocity error is its image error over
    ``sigma``, which ``sigma_floor`` keeps finite.

    Args:
        network: ``network(x, timestep, labels)``, output shaped like ``x``.
        clean: images, (B, C, H, W).
        noise: standard normal noise, like ``clean``.
        level: ``alpha`` and ``sigma`` of shape (B,).
        labels: class indices, (B,).
        prediction: what the network's output means, "velocity" or "denoised".
        sigma_floor: least sigma that an image error is divided by.
        augment_dim: D of the noise; at D <= 2 the network's input is kept from exploding.

    Raises:
        ValueError: ``prediction`` is neither of the two.
    """
    output = flow_output(network, clean, noise, level, labels, augment_dim)
    if prediction == "velocity":
        error = output - (noise - clean)
    elif prediction == "denoised":
        error = (output - clean) / per_sample(level.sigma, clean).clamp(min=sigma_floor)
    else:
        raise ValueError(f"prediction must be 'velocity' or 'denoised', got {prediction!r}")
    return error.square().flatten(1).mean(1)


@dataclass(frozen=True)
class FlowMatching(NoiseLaw):
    """Flow matching with logit-normal noise levels (Esser et al. 2024, arXiv 2403.03206).

    Attributes:
        prediction: what the network predicts, "velocity" or "denoised"; the loss is in velocity
            either way.
        mean: mean of the logit of sigma; above 0 spends more on noisy samples.
        std: standard deviation of the logit of sigma.
        sigma_floor: least sigma that an image error is divided by.
        augment_dim: D of the noise, see ``NoiseLaw``; infinity is Gaussian.
        stable_targets: learn the mean over the batch (STF), see ``NoiseLaw``.

    Raises:
        ValueError: ``prediction`` is neither of the two.
    """

    prediction: str = "velocity"
    mean: float = 0.4
    std: float = 0.8
    sigma_floor: float = 0.05

    def __post_init__(self) -> None:
        """Refuse a prediction that the loss does not know."""
        super().__post_init__()
        if self.prediction not in ("velocity", "denoised"):
            raise ValueError(
                f"prediction must be 'velocity' or 'denoised', got {self.prediction!r}"
            )

    @property
    def kind(self) -> Kind:
        """What the network's raw output means."""
        return Kind(self.prediction)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Level]:
        """Noise of ``shape`` (B, ...) and levels of shape (B,), on the generator's device."""
        dim = self.augment_dim
        return draw_flow(shape, generator, mean=self.mean, std=self.std, augment_dim=dim)

    def __call__(
        self, network: Network, clean: Tensor, noise: Tensor, level: Level, labels: Tensor
    ) -> Tensor:
        """The loss of each sample, (B,); see `velocity_loss`."""
        return velocity_loss(
            network,
            clean,
            noise,
            level,
            labels,
            prediction=self.prediction,
            sigma_floor=self.sigma_floor,
            augment_dim=self.augment_dim,
        )
