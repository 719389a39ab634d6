"""Flow-GRPO in the same loop, for comparisons: stochastic sampling, clipped ratios, KL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.noise import noise_like_seeds, seeded_generators
from ...core.tensors import send
from ..data import derive_seed
from ..settings import setting
from .config import ACFlowConfig
from .grpo import gaussian_kl, grpo_loss, sde_step, step_log_density
from .learner import Learner
from .observer import Replace
from .sampling import Rollouts
from .targets import Targets
from .trainer import ACFlowTrainer

__all__ = ["GRPOConfig", "GRPOLearner", "GRPOTrainer"]


@dataclass(frozen=True)
class GRPOConfig(ACFlowConfig):
    """A run of Flow-GRPO; ``alpha`` is the strength of its KL term, ``levels_per_sample`` counts
    the steps of a trajectory that an update learns from.

    Raises:
        ValueError: a value is out of its range.
    """  # noqa: D205

    critic: bool = setting(False, "there is none here")
    advantage_clip: float = setting(5.0, "largest size of an advantage")
    alpha: float = setting(0.04, "strength of the KL term")
    noise_level: float = setting(0.7, "size of the noise of stochastic sampling")
    ratio_clip: float = setting(1e-3, "how far a ratio of densities may leave 1")

    def _check_together(self) -> None:
        super()._check_together()
        self._need(("noise_level", "ratio_clip"), "positive", lambda value: value > 0)
        if self.critic:
            raise ValueError("critic: GRPO has none; leave it out")
        if self.train_cfg == "distil":
            raise ValueError("train_cfg='distil': GRPO trains the steps as they were sampled")
        if self.levels_per_sample > self.sample_steps - 1:
            raise ValueError(
                f"levels_per_sample must be at most {self.sample_steps - 1}, the stochastic steps "
                f"of sample_steps={self.sample_steps}, got {self.levels_per_sample}"
            )


class GRPOLearner(Learner):
    """Reinforces the steps of stochastic trajectories. The last step, to noise 0, has no noise."""

    config: GRPOConfig

    def replace(self, seeds: Sequence[int]) -> Replace:
        """The stochastic step; its noise belongs to the seed of each sample."""
        generators = seeded_generators([derive_seed(seed, "steps") for seed in seeds])
        densities: list[Tensor] = []
        self.runs = [*getattr(self, "runs", []), densities]

        def step(sample: Tensor, velocity: Tensor, sigma: float, following: float) -> Tensor:
            if following <= 0:
                return sample.float() - sigma * velocity.float()
            now, then = (sample.new_full((len(sample),), s).float() for s in (sigma, following))
            level = self.config.noise_level
            mean, std = sde_step(sample, velocity, now, then, noise_level=level)
            noise = noise_like_seeds(generators, sample.shape[1:], device=sample.device)
            after = mean + std.reshape(-1, *[1] * (mean.ndim - 1)) * noise
            # The solver's state may be narrower: the density is that of what is kept of the step.
            after = after.to(sample.dtype)
            densities.append(step_log_density(after, mean, std))
            return after

        return step

    def learn(self, data: Rollouts, targets: Targets, *, epoch: int, rate: float) -> None:
        """All updates of an epoch."""
        self.before = torch.cat([torch.stack(run, 1) for run in self.runs])
        self.runs = []
        super().learn(data, targets, epoch=epoch, rate=rate)

    def update(
        self, data: Rollouts, targets: Targets, *, epoch: int, inner: int, number: int, rate: float
    ) -> None:
        """One update on some steps of each trajectory, drawn evenly over time."""
        config, place = self.config, self.place(number)
        seed = derive_seed(config.seed, "actor", epoch, inner, number)
        torch.manual_seed(derive_seed(seed, "layers", self.accelerator.process_index))
        weighed = targets.weighed[place.everyone].clamp(
            -config.advantage_clip, config.advantage_clip
        )
        start = place.offset
        advantages = weighed[start : start + len(place.local)].nan_to_num()
        index = self._steps(len(weighed), seed)[start : start + len(place.local)]

        def losses(rows: range, cut: slice) -> Tensor:
            here = slice(rows.start - place.local.start, rows.stop - place.local.start)
            return self._step_losses(data, advantages[here], index[here], rows)

        self._step(losses, place, rate)

    def _steps(self, samples: int, seed: int) -> Tensor:
        """Numbers of the steps to learn from, (samples, m), all different for a sample."""
        repeats, steps = self.config.levels_per_sample, self.config.sample_steps - 1
        generator = torch.Generator(self.device).manual_seed(seed)
        keys = torch.rand(samples, steps, generator=generator, device=self.device)
        return keys.argsort(1)[:, :repeats]

    def _step_losses(
        self, data: Rollouts, advantages: Tensor, index: Tensor, rows: range
    ) -> Tensor:
        config, repeats = self.config, self.config.levels_per_sample
        if data.states is None:
            raise RuntimeError("GRPO needs the states of the trajectories")
        row = torch.arange(rows.start, rows.stop, device=self.device).repeat_interleave(repeats)
        place = index.flatten()
        x, after = data.states[row, place], data.states[row, place + 1]
        levels = send(torch.tensor(data.sigmas, dtype=torch.float32), self.device)
        sigma, following = levels[place], levels[place + 1]
        cond, uncond = data.condition(rows, repeats)
        velocity = self.velocity(self.policy.runner, x, sigma, cond, uncond)
        mean, std = sde_step(x, velocity, sigma, following, noise_level=config.noise_level)
        density = step_log_density(after, mean, std)
        loss = grpo_loss(
            density,
            self.before[row, place],
            advantages.repeat_interleave(repeats),
            clip=config.ratio_clip,
        )
        total = loss.total
        if config.alpha > 0:
            with self.policy.reference() as network:
                reference = self.velocity(network, x, sigma, cond, uncond)
            other, _ = sde_step(x, reference, sigma, following, noise_level=config.noise_level)
            total = total + config.alpha * gaussian_kl(mean, other, std)
            self.measures.mean("drift", (velocity - reference).square())
        self.count_passes(len(x), uncond is not None, config.alpha > 0)
        self.measures.mean("ratio_clipped", loss.clipped)
        return total


class GRPOTrainer(ACFlowTrainer):
    """`ACFlowTrainer` with the learner of Flow-GRPO; takes a `GRPOConfig`."""

    learner_class = GRPOLearner
