"""PFGM++ (arXiv 2302.04265): EDM's training with another noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.prediction import Kind, Level
from ..core.student import student_noise
from ..core.tensors import per_sample
from ..samplers.pfgmpp import input_scale
from .flow import TIMESTEPS, Network
from .noise import NoiseLaw

__all__ = ["PFGMPPObjective", "edm_loss"]


def edm_loss(
    network: Network,
    clean: Tensor,
    noise: Tensor,
    level: Level,
    labels: Tensor,
    *,
    sigma_data: float = 0.5,
    augment_dim: float = math.inf,
) -> Tensor:
    """EDM's weighted error of the denoised image, one number a sample, (B,).

    The sample is ``x = clean + sigma * noise``. With the weight of Karras et al. 2022 (table 1) the
    loss is the plain error of the raw output F, whose target is ``(clean - c_skip * x) / c_out``.
    The network eats ``c_in * x`` and ``1000 * ln(sigma) / 4``: EDM's c_noise in the units that
    diffusers' time embeddings resolve.

    Args:
        network: ``network(x, timestep, labels)``, output shaped like ``x``.
        clean: images, (B, C, H, W).
        noise: of the law of ``augment_dim``, like ``clean``.
        level: ``alpha`` 1 and ``sigma`` of shape (B,).
        labels: class indices, (B,).
        sigma_data: standard deviation of the images.
        augment_dim: D of the noise; at D <= 2 the input is scaled by its own norm, see
            ``samplers.pfgmpp.input_scale``.
    """
    sigma = per_sample(level.sigma, clean)
    x = clean + sigma * noise
    scale = input_scale(x, level.sigma, sigma_data, augment_dim)
    output = network(scale * x, TIMESTEPS * level.sigma.log() / 4, labels).float()
    a, b = Kind.edm(sigma_data).mix(level, clean)
    return (output - (a * clean + b * noise)).square().flatten(1).mean(1)


@dataclass(frozen=True)
class PFGMPPObjective(NoiseLaw):
    """PFGM++ with EDM's preconditioning; at ``augment_dim`` infinity it is EDM's own training.

    For PFGM++ on the straight path of flow matching give ``FlowMatching`` or ``KDiffObjective`` an
    ``augment_dim``: nothing else changes there either.

    Attributes:
        mean: mean of ln(sigma).
        std: standard deviation of ln(sigma).
        sigma_data: standard deviation of the images.
        augment_dim: D of the noise, see ``NoiseLaw``; infinity is Gaussian.
        stable_targets: learn the mean over the batch (STF), see ``NoiseLaw``.

    Every sigma keeps its value at any D (``samplers.radius_of`` turns one into the paper's r).

    Raises:
        ValueError: unless ``std`` and ``sigma_data`` are positive and ``augment_dim`` is too.
    """

    mean: float = -1.2
    std: float = 1.2
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        super().__post_init__()
        if not (self.std > 0 and self.sigma_data > 0):
            raise ValueError(
                f"std and sigma_data must be positive, got {self.std} and {self.sigma_data}"
            )

    @property
    def kind(self) -> Kind:
        """What the network's raw output means."""
        return Kind.edm(self.sigma_data)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Level]:
        """Noise of ``shape`` (B, ...) and levels of shape (B,), on the generator's device."""
        gauss = torch.randn(shape[0], generator=generator, device=generator.device)
        sigma = (self.mean + self.std * gauss).exp()
        noise = student_noise(generator, shape, self.augment_dim)
        return noise, Level(torch.ones_like(sigma), sigma)

    def __call__(
        self, network: Network, clean: Tensor, noise: Tensor, level: Level, labels: Tensor
    ) -> Tensor:
        """The loss of each sample, (B,); see ``edm_loss``."""
        return edm_loss(
            network,
            clean,
            noise,
            level,
            labels,
            sigma_data=self.sigma_data,
            augment_dim=self.augment_dim,
        )
