"""Schedulers that run PFGM++ models in diffusers pipelines; imported late, it needs diffusers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import EDMEulerScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput

# Loaders of diffusers look for it beside the class of a saved scheduler.
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from torch import Tensor

from ..core.student import check_augment_dim, check_overflow, student_factor, student_noise
from ..core.tensors import per_sample
from .grids import check_sigmas
from .pfgmpp import input_scale


class PFGMPPEulerScheduler(EDMEulerScheduler):
    """Euler steps for EDM-preconditioned networks that were trained with the noise of PFGM++.

    The equation, the grid and the preconditioning are EDM's; what differs is the prior and the
    noise that ``add_noise`` adds. At ``augment_dim=None`` it is the stock EDM scheduler but for the
    prior's standard deviation, which is ``sigma_max`` as in the papers (diffusers:
    ``sqrt(sigma_max^2 + 1)``).

    Args:
        augment_dim: the D the network was trained with; None is infinity, the Gaussian limit (a
            number, because infinity has no place in a JSON configuration).
        sigma_min: last sigma before 0.
        sigma_max: first sigma.
        sigma_data: standard deviation of the data.
        sigma_schedule: ``"karras"`` or ``"exponential"``.
        num_train_timesteps: as in diffusers.
        prediction_type: ``"epsilon"`` (in diffusers' EDM schedulers the raw output F) or
            ``"v_prediction"``.
        rho: exponent of the Karras grid.
        final_sigmas_type: ``"zero"`` or ``"sigma_min"``.

    Raises:
        ValueError: if ``augment_dim`` is not positive.
    """

    @register_to_config
    def __init__(
        self,
        augment_dim: float | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: str = "zero",
    ) -> None:
        """See the class."""
        if augment_dim is not None and math.isinf(check_augment_dim(augment_dim)):
            raise ValueError("write the Gaussian limit as augment_dim=None, not as infinity")
        super().__init__(
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            sigma_data=sigma_data,
            sigma_schedule=sigma_schedule,  # type: ignore[arg-type, unused-ignore]
            num_train_timesteps=num_train_timesteps,
            prediction_type=prediction_type,  # type: ignore[arg-type, unused-ignore]
            rho=rho,
            final_sigmas_type=final_sigmas_type,  # type: ignore[arg-type, unused-ignore]
        )

    @property
    def augment_dim(self) -> float:
        """D, infinite in the Gaussian limit."""
        dim = self.config.augment_dim
        return math.inf if dim is None else float(dim)

    @property
    def init_noise_sigma(self) -> float:
        """What pipelines multiply their ``latents`` with: the first sigma."""
        return float(getattr(self, "_first_sigma", None) or self.config.sigma_max)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Tensor | Sequence[float] | None = None,
    ) -> None:
        """Lay the grid.

        Args:
            num_inference_steps: number of solver steps.
            device: where the timesteps go.
            sigmas: your own levels instead, decreasing, with or without the 0 at the end (diffusers
                takes numbers in [0, 1] here, places on its own grid).

        Raises:
            ValueError: if ``sigmas`` do not decrease (see ``samplers.check_sigmas``).
        """
        self._first_sigma: float | None = None
        if sigmas is None:
            super().set_timesteps(num_inference_steps, device=device)
            return
        given = [float(sigma) for sigma in sigmas]
        levels = check_sigmas([*given, 0.0] if given[-1:] > [0.0] else given)[:-1].float()
        last = 0.0 if self.config.final_sigmas_type == "zero" else float(levels[-1])
        self._first_sigma, self.num_inference_steps = float(levels[0]), len(levels)
        self.timesteps = self.precondition_noise(levels.to(device))
        self.sigmas = torch.cat([levels, levels.new_full((1,), last)])
        self._step_index: Any = None
        self._begin_index: Any = None

    def prior_latents(
        self,
        generators: Sequence[torch.Generator] | torch.Generator | None,
        shape: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Unit prior noise, for the ``latents=`` argument of a pipeline (which scales it itself).

        Args:
            generators: one a sample, or one for the batch, or None.
            shape: of one sample with one generator a sample, else of the batch.
            device: where the result goes.
            dtype: of the result.

        Returns:
            Shape (B, ...). A pipeline that draws its own Gaussian latents starts outside the law
            that a finite-D network has learned; always pass these.

        Raises:
            ValueError: if a sample is empty, or float16 would overflow at the first sigma.
        """
        noise = student_noise(generators, shape, self.augment_dim, device=device, dtype=dtype)
        check_overflow(noise * self.init_noise_sigma, self.augment_dim)
        return noise

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The network's input, ``c_in * sample``; see ``pfgmpp.input_scale`` for D <= 2."""
        if self.step_index is None:
            self._init_step_index(timestep)
        self.is_scale_input_called = True
        sigma = self.sigmas[self.step_index]
        scale = input_scale(sample, sigma, self.config.sigma_data, self.augment_dim)
        return sample * scale.to(sample.dtype) if scale.numel() > 1 else sample * scale.reshape(())

    def add_noise(
        self,
        original_samples: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        generator: torch.Generator | None = None,
        student: bool = False,
    ) -> Tensor:
        """``clean + sigma * noise`` with noise of the PFGM++ law.

        Args:
            original_samples: clean samples, (B, ...).
            noise: Gaussian noise, to which a fresh factor a sample is applied; or noise that
                already is Student-t, with ``student=True``.
            timesteps: shape (B,), of ``scheduler.timesteps``.
            generator: where the factors come from.
            student: whether ``noise`` already carries its factor.

        Returns:
            Shape of ``original_samples``.

        Raises:
            ValueError: if float16 overflows.
        """
        if not student:
            factor = student_factor(noise.shape[0], self.augment_dim, generator)
            noise = noise * per_sample(factor.to(noise), noise)
        noisy: Tensor = super().add_noise(original_samples, noise, timesteps)
        return check_overflow(noisy, self.augment_dim)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> EDMEulerSchedulerOutput | tuple[Tensor, ...]:
        """One step from one evaluation; arguments as in ``EDMEulerScheduler``.

        Raises:
            ValueError: for ``s_churn > 0`` at a finite D, where Gaussian churn is not valid.
        """
        if s_churn > 0 and not math.isinf(self.augment_dim):
            raise ValueError(
                f"s_churn={s_churn} adds Gaussian noise, but this model's noise is Student-t with "
                f"augment_dim={self.augment_dim:g}: the sum of the two has another law and the "
                "samples would be biased. Use s_churn=0, or samplers.StudentChurnStep"
            )
        churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
        previous, denoised = self._solve(
            model_output, timestep, sample, churn=churn, generator=generator, **kwargs
        )
        if not return_dict:
            return (previous, denoised)
        return EDMEulerSchedulerOutput(prev_sample=previous, pred_original_sample=denoised)

    def _solve(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, *,
        churn: dict[str, float], **kwargs: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The next sample and the denoised one."""
        found: tuple[Tensor, ...] = super().step(
            model_output, timestep, sample, return_dict=False, **churn, **kwargs
        )
        return found


class PFGMPPHeunScheduler(PFGMPPEulerScheduler):
    """Heun steps: ``2 * num_inference_steps - 1`` evaluations, the solver of the paper's tables.

    Arguments as ``PFGMPPEulerScheduler``. Like diffusers' other Heun scheduler it lists each inner
    timestep twice: the second entry is the second evaluation of the step before.
    """

    order = 2

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Tensor | Sequence[float] | None = None,
    ) -> None:
        """Lay the grid and list inner timesteps twice; arguments as in the Euler scheduler."""
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas)
        t: Tensor = self.timesteps
        s: Tensor = self.sigmas
        self.timesteps: Tensor = torch.cat([t[:1], t[1:].repeat_interleave(2)])
        self.sigmas: Tensor = torch.cat([s[:1], s[1:-1].repeat_interleave(2), s[-1:]])
        self._trial: tuple[Tensor, Tensor] | None = None

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call is the first evaluation of a step."""
        return getattr(self, "_trial", None) is None

    def _solve(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, *,
        churn: dict[str, float], **kwargs: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The trial Euler step, or its correction.

        Raises:
            ValueError: for ``s_churn > 0``, which this scheduler has at no D.
        """
        if churn["s_churn"] > 0:
            raise ValueError("PFGMPPHeunScheduler is deterministic; use s_churn=0")
        if self.step_index is None:
            self._init_step_index(timestep)
        index = self.step_index
        sigma = self.sigmas[index]
        wide = sample.to(torch.float32)
        denoised = self.precondition_outputs(wide, model_output, sigma)
        d = (wide - denoised) / sigma
        if self._trial is None:
            previous = wide + (self.sigmas[index + 1] - sigma) * d
            if self.sigmas[index + 1] > 0 and index + 1 < len(self.timesteps):
                self._trial = (wide, d)
        else:
            start, d_start = self._trial
            previous = start + (sigma - self.sigmas[index - 1]) * (d_start + d) / 2
            self._trial = None
        self._step_index += 1
        return previous.to(model_output.dtype), denoised
