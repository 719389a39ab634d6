"""Stochastic solver steps: fresh noise on the way, the same marginals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.denoiser import Denoise
from ..core.prediction import Level
from ..core.tensors import send
from .ode import Memory, heun_step, look

NoiseLike = Callable[[Tensor], Tensor]


def ancestral_noise_share(now: Level, then: Level, eta: float) -> tuple[Tensor, Tensor]:
    """Split the next sigma: ``kept^2 + fresh^2 = sigma_next^2``.

    Args:
        now: the level of the sample.
        then: the next level, less noisy.
        eta: 0 keeps all of the predicted noise (DDIM); 1 is the posterior of the forward process
            (DDPM).

    Returns:
        (kept, fresh), shapes of the levels.
    """
    # Variance of the forward posterior: sigma'^2 (1 - (alpha sigma' / (alpha' sigma))^2).
    gain = (now.alpha * then.sigma) / (then.alpha * now.sigma)
    fresh = eta * then.sigma * (1 - gain**2).clamp_min(0).sqrt()
    return (then.sigma**2 - fresh**2).clamp_min(0).sqrt(), fresh


@dataclass(frozen=True)
class AncestralStep:
    """DDIM with ``eta``: one evaluation; the share ``eta`` of each step's noise is drawn afresh.

    Args:
        noise_like: draws standard normal noise of a sample's shape; use per-seed generators, e.g.
            ``lambda x: noise_like_seeds(generators, x.shape[1:])``.
        eta: 0 (deterministic) to 1 (ancestral; Song et al. 2021, eq. 16, for any alpha and sigma).
        level: what a sigma means: ``Level.ve`` (default) or ``Level.flow``.

    Raises:
        ValueError: if ``eta`` is not in [0, 1].
    """

    noise_like: NoiseLike
    eta: float = 1.0
    level: Callable[[Tensor], Level] = Level.ve

    def __post_init__(self) -> None:
        """Check eta."""
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        memory: Memory | None = None,
    ) -> Tensor:
        """The sample at ``sigma_next``; shapes as ``ode.euler_step``."""
        now, then = self.level(sigma), self.level(sigma_next)
        x, denoised = look(denoise, x, sigma)
        if sigma_next == 0:
            return denoised
        noise = (x - now.alpha * denoised) / now.sigma
        kept, fresh = ancestral_noise_share(now, then, self.eta)
        out = then.alpha * denoised + kept * noise
        return out + fresh * send(self.noise_like(x), x.device, x.dtype) if self.eta > 0 else out


@dataclass(frozen=True, kw_only=True)
class Churn:
    """Raise the noise a little, then take a Heun step down: what both churning steps share.

    Args:
        gamma: relative rise of sigma, S_churn / N in Karras et al. 2022; at most sqrt(2) - 1 there.
        low: no churn at or below this sigma.
        high: no churn above this sigma.

    Raises:
        ValueError: if gamma is negative or low >= high.
    """

    gamma: float = 0.1
    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.gamma >= 0:
            raise ValueError(f"gamma must not be negative, got {self.gamma}")
        if not self.low < self.high:
            raise ValueError(f"expected low < high, got low={self.low}, high={self.high}")

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        memory: Memory | None = None,
    ) -> Tensor:
        """The sample at ``sigma_next``; shapes as ``ode.euler_step``."""
        sigma = torch.as_tensor(sigma)
        if self.gamma > 0 and self.low < float(sigma) <= self.high:
            raised = sigma * (1 + self.gamma)
            x, sigma = self.lift(denoise, x, sigma, raised), raised
        return heun_step(denoise, x, sigma, sigma_next)

    def lift(self, denoise: Denoise, x: Tensor, sigma: Tensor, raised: Tensor) -> Tensor:
        """The sample carried up from ``sigma`` to ``raised``."""
        raise NotImplementedError


@dataclass(frozen=True)
class ChurnStep(Churn):
    """EDM's stochastic step (Karras et al. 2022, Algorithm 2); two evaluations.

    For ``x = clean + sigma * noise`` with *Gaussian* noise only; a PFGM++ sample at finite D has
    another noise, and adding Gaussian noise to it leaves its marginals.

    Args:
        noise_like: draws standard normal noise of a sample's shape.
        noise_scale: the paper's S_noise.
        gamma: see ``Churn``.
        low: see ``Churn``.
        high: see ``Churn``.

    Raises:
        ValueError: if gamma or noise_scale is negative, or low >= high.
    """

    noise_like: NoiseLike
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        if not self.noise_scale >= 0:
            raise ValueError(f"noise_scale must not be negative, got {self.noise_scale}")

    def lift(self, denoise: Denoise, x: Tensor, sigma: Tensor, raised: Tensor) -> Tensor:
        """Add Gaussian noise; asks ``denoise`` nothing."""
        rise = (raised**2 - sigma**2).sqrt() * self.noise_scale
        return x + rise * send(self.noise_like(x), x.device, x.dtype)
