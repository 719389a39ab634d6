"""Gaussian mixtures with classes, whose perfect denoiser is known: ground truth for tests."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .prediction import Level

Labels = Tensor | int | None


class GaussianMixture:
    """A mixture of K Gaussians with diagonal covariances, each component belonging to a class.

    Everything a perfectly trained, perfectly conditioned diffusion model would answer is given in
    closed form, at any noise level ``x = alpha * clean + sigma * noise``. Computed in the wider of
    the dtypes of the input and of the parameters, returned in the dtype of the input.

    Args:
        means: shape (K, D).
        std: shape (K,) for isotropic components or (K, D), positive.
        weights: shape (K,), positive; normalized to sum to one. None for equal weights.
        classes: shape (K,), the class of each component, covering 0 ... C - 1. None for one class
            a component.
        shape: of one sample, D elements in all; (D,) by default. Images are ``(3, H, W)``.

    Wherever ``labels`` is asked for: None is the whole mixture (the unconditional model), an
    integer is one class for the whole batch, and a tensor of shape (B,) is one class a sample.

    Raises:
        ValueError: if shapes do not agree, a deviation or weight is not positive, or a class has no
            component.
    """

    def __init__(
        self,
        means: Tensor,
        std: Tensor,
        weights: Tensor | None = None,
        classes: Tensor | None = None,
        *,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        if means.ndim != 2:
            raise ValueError(f"means must have shape (K, D), got {tuple(means.shape)}")
        count, dim = means.shape
        weights = torch.ones_like(means[:, 0]) if weights is None else weights
        classes = torch.arange(count, device=means.device) if classes is None else classes
        shape = (dim,) if shape is None else tuple(shape)
        if std.shape not in ((count,), (count, dim)) or not bool((std > 0).all()):
            raise ValueError(f"std must be positive, ({count},) or ({count}, {dim}), got {std}")
        if weights.shape != (count,) or not bool((weights > 0).all()):
            raise ValueError(f"weights must be positive, shape ({count},), got {weights}")
        found = sorted(set(classes.tolist()))
        if classes.shape != (count,) or found != list(range(len(found))):
            raise ValueError(f"classes must cover 0 ... C - 1, shape ({count},), got {classes}")
        if math.prod(shape) != dim:
            raise ValueError(f"shape must have {dim} elements, got {shape}")
        self.means, self.classes, self.shape = means, classes, shape
        self.std = std if std.ndim == 2 else std[:, None].expand(count, dim)
        self.weights = weights / weights.sum()
        self.num_classes = len(found)

    @classmethod
    def ring(
        cls, classes: int = 4, *, per_class: int = 2, radius: float = 1.0, std: float = 0.15
    ) -> GaussianMixture:
        """Components on a circle, neighbours in one class: the toy of plots, float64, D = 2."""
        count = classes * per_class
        angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
        means = radius * torch.stack([angle.cos(), angle.sin()], 1)
        deviations = torch.full((count,), std, dtype=torch.float64)
        return cls(means, deviations, classes=torch.arange(count) // per_class)

    @classmethod
    def random(
        cls,
        classes: int = 3,
        *,
        per_class: int = 2,
        shape: tuple[int, ...] = (5,),
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> GaussianMixture:
        """A mixture with unequal weights and anisotropic components, as the generator wills."""
        count, dim = classes * per_class, math.prod(shape)
        means = torch.randn(count, dim, generator=generator, dtype=dtype)
        std = 0.2 + 0.6 * torch.rand(count, dim, generator=generator, dtype=dtype)
        weights = 0.2 + torch.rand(count, generator=generator, dtype=dtype)
        return cls(means, std, weights, torch.arange(count) % classes, shape=shape)

    def to(self, device: torch.device | str) -> GaussianMixture:
        """The same mixture with its parameters on another device."""
        return GaussianMixture(
            self.means.to(device),
            self.std.to(device),
            self.weights.to(device),
            self.classes.to(device),
            shape=self.shape,
        )

    def log_density(self, x: Tensor, level: Level, labels: Labels = None) -> Tensor:
        """Log density of the noisy sample ``x``, (B, ...), at ``level``, given its class; (B,)."""
        return self._log_joint(x, level, labels).logsumexp(1).to(x.dtype)

    def score(self, x: Tensor, level: Level, labels: Labels = None) -> Tensor:
        """Gradient of ``log_density`` with respect to ``x``, same shape."""
        flat, alpha, sigma = self._flat(x, level)
        variance = (alpha * self.std) ** 2 + sigma**2  # (B or 1, K, D)
        share = self._log_joint(x, level, labels).softmax(1)[:, :, None]
        score = (share * (alpha * self.means - flat[:, None]) / variance).sum(1)
        return score.reshape(x.shape).to(x.dtype)

    def denoise(self, x: Tensor, level: Level, labels: Labels = None) -> Tensor:
        """The perfect denoised prediction, E[clean | x, class]; same shape as ``x``.

        Args:
            x: noisy samples, (B, *shape) or (B, D).
            level: their noise level.
            labels: see the class.

        Raises:
            ValueError: if ``x`` has another shape or a label is out of range.
        """
        flat, alpha, sigma = self._flat(x, level)
        data, noise = self.std**2, sigma**2
        posterior = (alpha * data * flat[:, None] + noise * self.means) / (alpha**2 * data + noise)
        share = self._log_joint(x, level, labels).softmax(1)[:, :, None]
        return (share * posterior).sum(1).reshape(x.shape).to(x.dtype)

    def denoiser(
        self, labels: Labels = None, *, level: Callable[[Tensor], Level] = Level.ve
    ) -> Callable[..., Tensor]:
        """The same as a ``denoise(x, sigma)`` for samplers and ``GuidedDenoiser``.

        Args:
            labels: see the class. A call may give others: ``denoise(x, sigma, labels=...)``, which
                is what ``Step.predict(labels=...)`` does.
            level: what sigma means; ``Level.ve`` or ``Level.flow``.
        """

        def denoise(x: Tensor, sigma: Tensor, labels: Labels = labels) -> Tensor:
            return self.denoise(x, level(sigma), labels)

        return denoise

    def log_class_posterior(self, x: Tensor, level: Level) -> Tensor:
        """Log probability of each class given the noisy sample; (B, C)."""
        joint = self._log_joint(x, level, None)
        members = self.classes[None] == torch.arange(self.num_classes, device=x.device)[:, None]
        by_class = joint[:, None].masked_fill(~members, -math.inf).logsumexp(2)
        return by_class.log_softmax(1).to(x.dtype)

    def class_posterior(self, x: Tensor, level: Level) -> Tensor:
        """Probability of each class given the noisy sample; (B, C)."""
        return self.log_class_posterior(x, level).exp()

    def sample(
        self, count: int, labels: Labels = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw clean samples, (count, *shape), and their classes, (count,).

        Args:
            count: how many.
            labels: see the class.
            generator: of the device of the parameters.
        """
        share = self._log_weights(labels).exp().expand(count, -1)
        component = torch.multinomial(share, 1, generator=generator)[:, 0]
        noise = torch.randn(
            (count, self.means.shape[1]),
            generator=generator,
            dtype=self.means.dtype,
            device=self.means.device,
        )
        clean = self.means[component] + self.std[component] * noise
        return clean.reshape(count, *self.shape), self.classes[component]

    def moments(self, labels: Labels = None) -> tuple[Tensor, Tensor]:
        """Exact mean (D,) and covariance (D, D) of clean samples, of all or of one class."""
        share = self._log_weights(labels)[0].exp()[:, None]  # (K, 1)
        mean = (share * self.means).sum(0)
        centred = self.means - mean
        return mean, (share * self.std**2).sum(0).diag() + centred.T @ (share * centred)

    def _log_weights(self, labels: Labels) -> Tensor:
        """Normalized log weights given the class, (B or 1, K); -inf for other classes."""
        if labels is None:
            return self.weights.log()[None]
        wanted = torch.as_tensor(labels)
        # Where labels live on an accelerator, asking for their values would stop it.
        known = wanted.device.type != "cpu" or ((wanted >= 0) & (wanted < self.num_classes)).all()
        if not known:
            raise ValueError(f"labels must be in [0, {self.num_classes - 1}], got {labels}")
        # One class for all stays on the CPU: a () tensor mixes with any device.
        wanted = wanted.to(self.classes.device)[:, None] if wanted.ndim else wanted
        other = self.classes[None] != wanted
        return self.weights.log()[None].masked_fill(other, -math.inf).log_softmax(1)

    def _flat(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        if tuple(x.shape[1:]) not in (self.shape, (self.means.shape[1],)):
            raise ValueError(f"x must have shape (B, {self.shape}), got {tuple(x.shape)}")
        flat = x.flatten(1).to(torch.promote_types(x.dtype, self.means.dtype))
        alpha, sigma = level.over(flat[:, None])
        return flat, alpha, sigma

    def _log_joint(self, x: Tensor, level: Level, labels: Labels) -> Tensor:
        """Log of weight times density of each component, (B, K)."""
        flat, alpha, sigma = self._flat(x, level)
        variance = (alpha * self.std) ** 2 + sigma**2
        square = (flat[:, None] - alpha * self.means) ** 2 / variance
        density = -0.5 * (square + variance.log() + math.log(2 * math.pi)).sum(2)
        return density + self._log_weights(labels)
