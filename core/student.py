"""The noise of PFGM++: a Gaussian times one heavy-tailed factor a sample (Student-t)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .noise import noise_like_seeds
from .tensors import per_sample, send


def check_augment_dim(augment_dim: float) -> float:
    """The number of augmented dimensions D as a float.

    Raises:
        TypeError: if it is not a number.
        ValueError: unless D > 0; infinity is the Gaussian limit.
    """
    if isinstance(augment_dim, bool) or not isinstance(augment_dim, (int, float)):
        raise TypeError(f"augment_dim must be a number, got {augment_dim!r}")
    if not augment_dim > 0:
        raise ValueError(
            f"augment_dim (the D of PFGM++) must be positive, or infinite for Gaussian noise, "
            f"got {augment_dim}"
        )
    return float(augment_dim)


def student_factor(
    count: int, augment_dim: float, generator: torch.Generator | None = None
) -> Tensor:
    """``sqrt(D / chi2_D)``, the factor that turns Gaussian noise into the noise of PFGM++.

    The PFGM++ kernel is a multivariate Student-t with D degrees of freedom, hence this factor, *one
    a sample* (one an element would be another model). It equals the published beta-distributed
    radius in law and needs no clipping at any D (spec: arXiv 2302.04265, section 3; derived form).

    Args:
        count: how many samples.
        augment_dim: D > 0; infinity gives ones and draws nothing.
        generator: where the randomness comes from; None is the global generator.

    Returns:
        Shape (count,), float64 on the generator's device. For D well below 1 single values can
        overflow; they are infinite then.
    """
    dim = check_augment_dim(augment_dim)
    device = generator.device if generator is not None else torch.device("cpu")
    if math.isinf(dim):
        return torch.ones(count, dtype=torch.float64, device=device)
    half = torch.full((count,), dim / 2, dtype=torch.float64, device=device)
    # The public gamma sampler takes no generator. In few operations: beside a Gaussian draw that
    # has emptied the caches, each costs tens of microseconds.
    gamma = torch._standard_gamma(half, generator=generator)
    return gamma.mul_(2 / dim).rsqrt_()


def student_noise(
    generators: Sequence[torch.Generator] | torch.Generator | None,
    shape: Sequence[int],
    augment_dim: float,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Unit Student-t noise; multiply by sigma to get the PFGM++ perturbation.

    Args:
        generators: one a sample (a seed then names a sample), or a single one for the whole batch,
            or None for the global generator.
        shape: of one sample if ``generators`` is a sequence; else of the whole batch, (B, ...).
        augment_dim: D > 0. At infinity the result equals the Gaussian draw of the same generators
            bit for bit: the Gaussian is drawn first, the factor after it.
        device: where the result goes; by default where the generator lives.
        dtype: of the result.

    Returns:
        Shape (B, ...).

    Raises:
        ValueError: if a sample has no elements, or if the noise overflows ``dtype`` (float16 at
            small D; only then is the result inspected).
    """
    if not math.prod(shape) or not (shape or isinstance(generators, Sequence)):
        raise ValueError(f"the noise of an empty sample was asked for: shape {tuple(shape)}")
    first = generators[0] if isinstance(generators, Sequence) and generators else generators
    home = first.device if isinstance(first, torch.Generator) else torch.device("cpu")
    if isinstance(generators, Sequence):
        gauss = noise_like_seeds(generators, shape, device=home)
        if math.isinf(check_augment_dim(augment_dim)):
            factor = torch.ones(len(generators), dtype=torch.float64)
        else:
            factor = torch.cat([student_factor(1, augment_dim, g) for g in generators])
    else:
        gauss = torch.randn(tuple(shape), generator=generators, device=home)
        factor = student_factor(shape[0], augment_dim, generators)
    device = home if device is None else device
    # In float32 and in place: against a plain Gaussian draw this must cost next to nothing.
    noise = gauss.mul_(per_sample(factor.to(gauss), gauss))
    return check_overflow(send(noise, device, dtype), augment_dim)


def check_overflow(noisy: Tensor, augment_dim: float) -> Tensor:
    """``noisy`` itself; float16 is inspected, and only float16, because that waits for the device.

    Raises:
        ValueError: if a float16 value is not finite: the noise of a small D is heavy-tailed.
    """
    if noisy.dtype == torch.float16 and not bool(torch.isfinite(noisy).all()):
        raise ValueError(
            f"Student-t noise at augment_dim={augment_dim} overflows float16; "
            "use bfloat16 or float32, or a larger augment_dim"
        )
    return noisy


def student_log_weights(x: Tensor, points: Tensor, sigma: Tensor, augment_dim: float) -> Tensor:
    """Posterior log-weights of a finite data set under the PFGM++ kernel.

    Args:
        x: noisy samples, (B, ...).
        points: the data set, (M, ...).
        sigma: shape () or (B,).
        augment_dim: D > 0; at infinity the Gaussian weights.

    Returns:
        Shape (B, M), normalised, float64: the exponent (N + D) / 2 would lose all digits in
        float32.
    """
    dim = check_augment_dim(augment_dim)
    flat, atoms = x.flatten(1).double(), points.flatten(1).double()
    # Not by a matrix product, which cancels, nor by broadcasting, which needs B * M * N numbers.
    square = torch.cdist(flat, atoms, compute_mode="donot_use_mm_for_euclid_dist").square()
    variance = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).square().reshape(-1, 1)
    if math.isinf(dim):
        return (-square / (2 * variance)).log_softmax(1)
    return (-(atoms.shape[1] + dim) / 2 * torch.log1p(square / (dim * variance))).log_softmax(1)


def student_denoise(x: Tensor, points: Tensor, sigma: Tensor, augment_dim: float) -> Tensor:
    """The exact PFGM++ denoiser of a finite data set, ``E[point | x]``; shape of ``x``.

    Arguments as ``student_log_weights``. It is the minimiser of the PFGM++ objective, so it serves
    as ground truth, and over a reference batch as the stable target of STF.
    """
    weight = student_log_weights(x, points, sigma, augment_dim).exp()
    return (weight @ points.flatten(1).double()).reshape(x.shape).to(x.dtype)
