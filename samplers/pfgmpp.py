"""PFGM++ (arXiv 2302.04265): the same equation as EDM's, another prior, another way to churn.

With the alignment ``r = sigma * sqrt(D)`` the field of PFGM++ integrates as
``dx / dsigma = (x - denoised) / sigma``: every deterministic solver of ``samplers`` is valid at
every D, and only the noise differs (``core.student``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.denoiser import Denoise
from ..core.noise import noise_like_seeds
from ..core.student import check_augment_dim, check_overflow, student_noise
from ..core.tensors import per_sample, sample_dot, sample_norm, send, widen
from .ode import look
from .stochastic import Churn


def radius_of(sigma: float, augment_dim: float) -> float:
    """The transfer rule ``r = sigma * sqrt(D)``: a diffusion model's sigma as a PFGM++ radius.

    Every hyper-parameter that is a sigma (the training levels, sigma_min, sigma_max, rho) is kept
    as it is at any D; only quantities that are radii change.
    """
    return sigma * math.sqrt(check_augment_dim(augment_dim))


def pfgmpp_prior(
    generators: Sequence[torch.Generator],
    shape: Sequence[int],
    augment_dim: float,
    sigma_max: float = 80.0,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Samples of the kernel at ``sigma_max``: where a PFGM++ trajectory starts.

    Args:
        generators: one a sample.
        shape: of one sample.
        augment_dim: the D the model was trained with.
        sigma_max: the first sigma of the grid. The result is already multiplied by it.
        device: where the result goes.
        dtype: of the result.

    Returns:
        Shape (B, *shape).

    Raises:
        ValueError: if a sample is empty, ``augment_dim`` not positive, or float16 overflows.
    """
    unit = student_noise(generators, shape, augment_dim, device=device)
    return check_overflow((sigma_max * unit).to(dtype), augment_dim)


def posterior_scale(x: Tensor, denoised: Tensor, sigma: Tensor, augment_dim: float) -> Tensor:
    """Parameters of the inverse-gamma posterior of the squared noise factor, given one sample.

    With noise ``sqrt(tau) * sigma * gauss`` and ``D / tau`` a chi-square, the posterior of tau
    where the clean sample is known is InvGamma((D + N) / 2, (D + |x - denoised|^2 / sigma^2) / 2).

    Returns:
        The rate (D + |x - denoised|^2 / sigma^2) / 2, shape (B,), float64.
    """
    # float64 for one number a sample alone: whole samples in it would be slow on a GPU.
    square = sample_norm(widen(x) - widen(denoised)).double() ** 2
    return (augment_dim + square / sigma.double() ** 2) / 2


@dataclass(frozen=True)
class StudentChurnStep(Churn):
    """Raise the noise a little with noise of the right law, then take a Heun step down.

    Reconstruction: the published sampler has no valid stochastic form at finite D (Student-t noise
    is not closed under addition, so Gaussian churn leaves the marginals). Here the squared factor
    tau is drawn from its posterior given the sample, and Gaussian noise of variance
    ``tau * (sigma_hat^2 - sigma^2)`` is added, which is exact where the clean sample is determined
    and a good approximation at small sigma. Costs one more evaluation than ``ChurnStep``.

    Args:
        generators: one a sample, advanced by every churn.
        augment_dim: the D of the model; must be finite (use ``ChurnStep`` for Gaussian noise).
        gamma: see ``Churn``.
        low: see ``Churn``.
        high: see ``Churn``.

    Raises:
        ValueError: if ``augment_dim`` is infinite or not positive, gamma is negative or low >=
            high.
    """

    generators: Sequence[torch.Generator]
    augment_dim: float

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        if math.isinf(check_augment_dim(self.augment_dim)):
            raise ValueError("augment_dim is infinite: the noise is Gaussian, use ChurnStep")

    def lift(self, denoise: Denoise, x: Tensor, sigma: Tensor, raised: Tensor) -> Tensor:
        """Add noise of the posterior scale; a sample that a rule has moved is what is raised."""
        x, denoised = look(denoise, x, sigma)
        return student_raise(x, denoised, sigma, raised, self.augment_dim, self.generators)


def student_raise(
    x: Tensor,
    denoised: Tensor,
    sigma: Tensor,
    raised: Tensor,
    augment_dim: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Carry a PFGM++ sample from ``sigma`` up to ``raised``; see ``StudentChurnStep``.

    Args:
        x: the sample at ``sigma``, (B, ...).
        denoised: its denoised prediction.
        sigma: shape ().
        raised: shape (), larger.
        augment_dim: finite D.
        generators: one a sample.

    Returns:
        Shape of ``x``.

    Raises:
        ValueError: if there is not one generator a sample.
    """
    if len(generators) != x.shape[0]:
        raise ValueError(f"expected {x.shape[0]} generators, one a sample, got {len(generators)}")
    rate = posterior_scale(x, denoised, sigma, augment_dim)
    half = (augment_dim + x[0].numel()) / 2
    draws = [
        torch._standard_gamma(
            torch.full((1,), half, dtype=torch.float64, device=g.device), generator=g
        )
        for g in generators
    ]
    tau = rate / send(torch.cat(draws), rate.device)
    gauss = noise_like_seeds(generators, x.shape[1:], device=x.device, dtype=x.dtype)
    width = (tau * (raised.double() ** 2 - sigma.double() ** 2)).sqrt().to(x.dtype)
    return x + per_sample(width, x) * gauss


def input_scale(x: Tensor, sigma: Tensor, sigma_data: float, augment_dim: float) -> Tensor:
    """The factor c_in that brings a noisy sample to about unit size for the network.

    For D > 2 it is EDM's ``1 / sqrt(sigma^2 + sigma_data^2)``, as the authors use it at every D. At
    D <= 2 the noise has no variance and that factor lets inputs explode; there the realised root
    mean square of each sample is used instead (reconstruction).

    Args:
        x: noisy samples, (B, ...).
        sigma: shape () or (B,).
        sigma_data: standard deviation of the clean data.
        augment_dim: D > 0.

    Returns:
        Broadcasts over ``x``.
    """
    if check_augment_dim(augment_dim) > 2:
        return per_sample((sigma**2 + sigma_data**2).rsqrt(), x)
    return per_sample(_mean_square(x).clamp_min(1e-3 * sigma_data**2).rsqrt(), x)


def limited(x: Tensor, augment_dim: float, *, limit: float = 2.0) -> Tensor:
    """The input of a *flow* network: ``x`` itself, but kept from exploding where D <= 2.

    There a sample whose root mean square exceeds ``limit`` is scaled down to it (reconstruction: a
    flow network has no c_in, and Student-t noise of two dimensions or less has no variance).

    Args:
        x: noisy samples, (B, ...).
        augment_dim: D > 0.
        limit: largest root mean square; noise alone has 1.

    Returns:
        Shape of ``x``.
    """
    if check_augment_dim(augment_dim) > 2:
        return x
    return x * per_sample((limit * _mean_square(x).rsqrt()).clamp_max(1), x)


def _mean_square(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return sample_dot(flat, flat) / flat.shape[1]
