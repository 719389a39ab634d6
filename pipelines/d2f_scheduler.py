"""DiT on the straight path: the scheduler of CFG-MP's released DiT script (arXiv 2601.21892)."""

# No `from __future__ import annotations`: diffusers reads types of signatures at load time.
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

# Where a saved pipeline is loaded, diffusers looks for the base class beside ours.
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from torch import Tensor

from ..core.prediction import Level, to_denoised
from ..core.tensors import widen
from .levels import KINDS


def d2f_timesteps(alphas_cumprod: Tensor, steps: int) -> list[int]:
    """Training timesteps evenly spaced in the time of the straight path.

    A sample ``alpha * clean + sigma * noise`` divided by ``alpha + sigma`` lies on the straight
    path at ``t = alpha / (alpha + sigma)``. For ``t = 0, 1 / steps, 2 / steps, ...`` the nearest
    training timestep is taken, each once.

    Args:
        alphas_cumprod: of the training schedule, (T,).
        steps: how many. Beyond about 100 the last ones coincide, and fewer are returned.

    Returns:
        Timesteps, from noise to data.
    """
    level = Level.vp(alphas_cumprod.double())
    t = level.alpha / (level.alpha + level.sigma)
    wanted = torch.arange(steps, dtype=torch.float64) / steps
    nearest = (t[None] - wanted[:, None]).abs().argmin(1)
    return list(dict.fromkeys(nearest.tolist()))


class D2FScheduler(DDIMScheduler):
    """DDIM (eta 0) on ``d2f_timesteps``, which is Euler's method on the straight path.

    Put it into a pipeline whose model was trained with discrete timesteps:
    ``pipe.scheduler = D2FScheduler.from_config(pipe.scheduler.config)``. The last step leads to the
    clean sample.

    Source: the released DiT script of CFG-MP. Where we differ: its first step takes the sample for
    pure noise, ours takes it at the level of its timestep, t = 0.006.
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Choose the timesteps.

        Raises:
            ValueError: if there are fewer training timesteps than steps.
        """
        if not 1 <= num_inference_steps <= self.config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps must be 1 to {self.config.num_train_timesteps}, got "
                f"{num_inference_steps}"
            )
        self._grid = d2f_timesteps(self.alphas_cumprod.cpu(), num_inference_steps)
        self.num_inference_steps = len(self._grid)
        self.timesteps = torch.tensor(self._grid, device=device)
        self.final_alpha_cumprod = torch.tensor(1.0)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """One step along the straight path; see ``DDIMScheduler.step``.

        Raises:
            ValueError: before ``set_timesteps``, for an unknown timestep, or with ``eta`` above 0.
        """
        grid = getattr(self, "_grid", [])
        time = int(timestep)  # one wait a step, where it lives on an accelerator
        if time not in grid:
            raise ValueError(f"timestep {time} is none of {grid}; call set_timesteps()")
        if eta:
            raise ValueError(f"D2FScheduler is deterministic; eta must be 0, got {eta}")
        after = grid.index(time) + 1
        now = Level.vp(self.alphas_cumprod[time].cpu())
        x, kind = widen(sample), KINDS[self.config.prediction_type]
        clean = to_denoised(widen(model_output), kind, x, now)
        if self.config.thresholding:
            clean = self._threshold_sample(clean)
        elif self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        new = clean
        if after < len(grid):
            then = Level.vp(self.alphas_cumprod[grid[after]].cpu())
            noise = (x - float(now.alpha) * clean) / float(now.sigma)
            new = then.mix(clean, noise)
        new, clean = new.to(sample.dtype), clean.to(sample.dtype)
        return DDIMSchedulerOutput(new, clean) if return_dict else (new, clean)
