"""One table that says what a network's output means at a noise level, and the conversions it gives.

Everywhere in diffsteer a noisy sample is ``x = alpha * clean + sigma * noise``. Every
parameterization in use is a linear mix of the same two unknowns, ``a * clean + b * noise``. The
pair (a, b) is the whole difference between them, so one 2x2 system serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .tensors import per_sample, widen

Q_FLOOR = 0.05  # least q = alpha (1 - k) + k sigma that a k-Diff prediction is divided by


@dataclass(frozen=True, eq=False)
class Level:
    """A noise level: ``x = alpha * clean + sigma * noise``.

    Args:
        alpha: shape () or (B,); numbers are turned into float32 tensors.
        sigma: shape () or (B,).
        alpha_rate: d alpha / dt, needed by ``Kind.INTERPOLANT`` alone.
        sigma_rate: d sigma / dt, needed by ``Kind.INTERPOLANT`` alone.
    """

    alpha: Tensor
    sigma: Tensor
    alpha_rate: Tensor | None = None
    sigma_rate: Tensor | None = None

    def __post_init__(self) -> None:
        """Accept plain numbers."""
        for name in ("alpha", "sigma", "alpha_rate", "sigma_rate"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor):
                object.__setattr__(self, name, _number(value))

    @classmethod
    def flow(cls, sigma: Tensor | float) -> Level:
        """Rectified flow: ``x = (1 - sigma) * clean + sigma * noise``."""
        s = _number(sigma)
        return cls(1 - s, s, -torch.ones_like(s), torch.ones_like(s))

    @classmethod
    def ve(cls, sigma: Tensor | float) -> Level:
        """Variance exploding (EDM, k-diffusion): ``x = clean + sigma * noise``."""
        s = _number(sigma)
        return cls(torch.ones_like(s), s)

    @classmethod
    def vp(cls, alpha_cumprod: Tensor | float) -> Level:
        """Variance preserving (DDPM): ``alpha**2`` is ``alpha_cumprod``, ``sigma**2`` the rest."""
        a = _number(alpha_cumprod)
        return cls(a.sqrt(), (1 - a).sqrt())

    @property
    def ratio(self) -> Tensor:
        """The noise-to-signal ratio sigma / alpha: the sigma of EDM and k-diffusion."""
        return self.sigma / self.alpha

    def over(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma as they broadcast over ``like``, on its device, float32 or wider."""
        return _over(self.alpha, like), _over(self.sigma, like)

    def mix(self, clean: Tensor, noise: Tensor) -> Tensor:
        """``alpha * clean + sigma * noise``, shape (B, ...), in the dtype of ``clean``."""
        alpha, sigma = self.over(clean)
        return (alpha * widen(clean) + sigma * widen(noise)).to(clean.dtype)


def _number(value: Tensor | float) -> Tensor:
    # On the CPU also under `with torch.device("cuda")`; float32 before any arithmetic: in bfloat16
    # the alpha = 1 - sigma of a flow would keep two digits.
    return widen(value if isinstance(value, Tensor) else torch.tensor(float(value), device="cpu"))


def _over(value: Tensor, like: Tensor) -> Tensor:
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    # A () tensor stays on the CPU: it mixes with any device as a scalar, with no copy and no sync.
    if value.ndim == 0:
        return value.to(wide)
    return per_sample(value.to(device=like.device, dtype=wide), like)


@dataclass(frozen=True)
class Kind:
    """What a network's output means: ``output = a * clean + b * noise`` with (a, b) from ``mix``.

    The kinds, by their field names:
        ``DENOISED``: the clean sample.
        ``NOISE``: the noise ("epsilon").
        ``V``: ``alpha * noise - sigma * clean`` (Salimans and Ho 2022); for variance-preserving
            levels, and for any other levels exactly that expression.
        ``V_VE``: the same v, read by a k-diffusion scheduler at ``x = clean + sigma * noise``:
            ``(noise - sigma * clean) / sqrt(1 + sigma^2)``.
        ``VELOCITY``: ``noise - clean``, the flow convention of diffusers, SD3 and Flux.
        ``VELOCITY_TO_DATA``: ``clean - noise``, for code whose time runs from noise to data.
        ``INTERPOLANT``: ``alpha' * clean + sigma' * noise``, the velocity of any interpolant (SiT).
        ``Kind.edm(sigma_data)``: the raw output of an EDM-preconditioned network.
        ``Kind.kdiff(k)``: ``k * clean - (1 - k) * noise``, the generalized target of k-Diff. Below
            k = 0.05 it is read with the method's clamp where hardly any signal is left.

    A ``Kind`` is two plain values (``name``, ``parameter``), so it can be compared, stored and
    printed.
    """

    name: str
    parameter: float | None = None

    DENOISED: ClassVar[Kind]
    NOISE: ClassVar[Kind]
    V: ClassVar[Kind]
    V_VE: ClassVar[Kind]
    VELOCITY: ClassVar[Kind]
    VELOCITY_TO_DATA: ClassVar[Kind]
    INTERPOLANT: ClassVar[Kind]

    def __post_init__(self) -> None:
        """Refuse unknown names and parameters out of range."""
        if self.name not in _MIX:
            raise ValueError(
                f"unknown prediction kind {self.name!r}; the kinds are {', '.join(_MIX)}"
            )
        if (self.parameter is not None) != (self.name in _RANGE):
            raise ValueError(
                f"kind {self.name!r} takes {'one' if self.name in _RANGE else 'no'} parameter"
            )
        if self.parameter is not None:
            low, high = _RANGE[self.name]
            if not low <= self.parameter <= high:
                raise ValueError(
                    f"the parameter of kind {self.name!r} must be in [{low}, {high}], "
                    f"got {self.parameter}"
                )

    @classmethod
    def edm(cls, sigma_data: float = 0.5) -> Kind:
        """The raw output F of an EDM network: ``denoised = c_skip * x + c_out * F``.

        Karras et al. 2022, eq. 7 and table 1. At alpha other than 1 it is what the network would
        put out at ``x / alpha`` and ``sigma / alpha``.
        """
        return cls("edm", float(sigma_data))

    @classmethod
    def kdiff(cls, k: float) -> Kind:
        """The target ``k * clean - (1 - k) * noise``, k in [0, 1] (k-Diff, arXiv 2601.21419)."""
        return cls("kdiff", float(k))

    def mix(self, level: Level, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The pair (a, b) of ``output = a * clean + b * noise``: numbers, or broadcast to ``like``.

        Raises:
            ValueError: for ``Kind.INTERPOLANT`` at a level without rates.
        """
        alpha, sigma = level.over(like)
        if self.name == "interpolant":
            if level.alpha_rate is None or level.sigma_rate is None:
                raise ValueError(
                    "Kind.INTERPOLANT needs a Level with alpha_rate and sigma_rate, the time "
                    "derivatives of alpha and sigma; Level.flow sets them"
                )
            return _over(level.alpha_rate, like), _over(level.sigma_rate, like)
        return _MIX[self.name](alpha, sigma, self.parameter or 0.0)


def _edm_mix(alpha: Tensor, sigma: Tensor, data: float) -> tuple[Tensor, Tensor]:
    # F = (clean - c_skip * x) / c_out, with c_skip = d^2/(s^2+d^2) and c_out = s*d/sqrt(s^2+d^2) at
    # s = sigma / alpha; multiplied out, so that alpha = 0 is no division by zero.
    norm = (sigma**2 + (alpha * data) ** 2).sqrt()
    return sigma / (data * norm), -data * alpha / norm


Mix = Callable[[Tensor, Tensor, float], tuple[Tensor | float, Tensor | float]]
_MIX: dict[str, Mix] = {
    "denoised": lambda alpha, sigma, _: (1.0, 0.0),
    "noise": lambda alpha, sigma, _: (0.0, 1.0),
    "v": lambda alpha, sigma, _: (-sigma, alpha),
    "v_ve": lambda alpha, sigma, _: (
        -sigma * torch.rsqrt(alpha**2 + sigma**2),
        alpha * torch.rsqrt(alpha**2 + sigma**2),
    ),
    "velocity": lambda alpha, sigma, _: (-1.0, 1.0),
    "velocity_to_data": lambda alpha, sigma, _: (1.0, -1.0),
    "interpolant": lambda alpha, sigma, _: (alpha, sigma),  # replaced by the rates, see Kind.mix
    "edm": _edm_mix,
    "kdiff": lambda alpha, sigma, k: (k, k - 1),
}
_RANGE = {"edm": (1e-8, math.inf), "kdiff": (0.0, 1.0)}

Kind.DENOISED = Kind("denoised")
Kind.NOISE = Kind("noise")
Kind.V = Kind("v")
Kind.V_VE = Kind("v_ve")
Kind.VELOCITY = Kind("velocity")
Kind.VELOCITY_TO_DATA = Kind("velocity_to_data")
Kind.INTERPOLANT = Kind("interpolant")


def _is_clean(kind: Kind) -> bool:
    return kind in (Kind.DENOISED, Kind("kdiff", 1.0))


def denoised_affine(kind: Kind, level: Level, like: Tensor) -> tuple[Tensor, Tensor]:
    """The pair (A, B) of ``denoised = A * x + B * output``, broadcast over ``like``.

    A difference of denoised predictions is B times the difference of outputs: rules that change a
    prediction by a small amount divide by B and never form ``(x - denoised) / sigma``, which loses
    all digits near sigma = 0.

    Args:
        kind: the meaning of the output.
        level: the noise level of ``x``.
        like: the sample, shape (B, ...); only its shape, dtype and device are used.

    Returns:
        A and B, float32 or wider, () or (B, 1, ...). Where the output carries no information on the
        clean sample (the noise at alpha = 0) they are infinite.
    """
    alpha, sigma = level.over(like)
    if _is_clean(kind):  # also at sigma = 0, where the system below is singular
        return torch.zeros_like(alpha), torch.ones_like(sigma)
    a, b = kind.mix(level, like)
    det = alpha * b - sigma * a
    if kind.name == "kdiff" and (kind.parameter or 0.0) < Q_FLOOR:
        return _floored_kdiff(alpha, sigma, a, b, -det)
    return b / det, -sigma / det


def _floored_kdiff(
    alpha: Tensor, sigma: Tensor, k: Tensor | float, minus_rest: Tensor | float, q: Tensor
) -> tuple[Tensor, Tensor]:
    """The pair (A, B) of a k-Diff output at small k, whose q vanishes where all is noise.

    As ``denoised = (x + sigma * v) / (alpha + sigma)``, with the velocity v towards the data over
    ``max(q, Q_FLOOR)``: below the floor finite, above it the same numbers as without.
    """
    floored, total = q.clamp_min(Q_FLOOR), alpha + sigma
    return (1 - sigma * (k + minus_rest) / floored) / total, sigma / floored


def to_denoised(output: Tensor, kind: Kind, x: Tensor, level: Level) -> Tensor:
    """The clean sample that ``output`` implies at ``x``.

    Args:
        output: the network's output, shape (B, ...).
        kind: what it means.
        x: the noisy sample, same shape.
        level: the noise level of ``x``.

    Returns:
        The denoised sample, same shape, computed in float32 or wider and cast back once to the
        dtype of ``output``.
    """
    if _is_clean(kind):
        return output
    scale_x, scale_output = denoised_affine(kind, level, x)
    return (scale_x * widen(x) + scale_output * widen(output)).to(output.dtype)


def from_denoised(denoised: Tensor, kind: Kind, x: Tensor, level: Level) -> Tensor:
    """The output of the given kind that implies ``denoised``: the inverse of ``to_denoised``.

    Args:
        denoised: shape (B, ...).
        kind: the kind wanted.
        x: the noisy sample, same shape.
        level: the noise level of ``x``; sigma must not be 0 unless the kind is ``DENOISED``, since
            a noise-free sample says nothing about its noise.

    Returns:
        Same shape and dtype as ``denoised``; computed in float32 or wider.
    """
    if _is_clean(kind):
        return denoised
    alpha, sigma = level.over(x)
    a, b = kind.mix(level, x)
    wide = widen(denoised)
    noise = (widen(x) - alpha * wide) / sigma
    return (a * wide + b * noise).to(denoised.dtype)
