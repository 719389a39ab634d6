"""The updates of actor and critic on the samples of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import derive_seed
from ..ema import ExponentialMovingAverage
from ..network import quick_attention
from .conditioning import Conditioning, autocasting
from .config import ACFlowConfig
from .critic_learner import CriticLearner
from .flow_model import FlowModel
from .levels import Draw, draw_update
from .losses import actor_loss, forward_noised
from .measures import Measures
from .observer import Observed, Replace
from .policy import Policy
from .sampling import Rollouts, known_features
from .sharding import placed
from .targets import Targets
from .weights import advantage, normalised_weights
from .zero import make_stepper

__all__ = ["Learner"]


@dataclass(frozen=True)
class Place:
    """Where an update lies.

    Attributes:
        everyone: its samples among those of the epoch on all ranks.
        offset: where this rank's part of it starts.
        local: that part among the samples of this rank.
    """

    everyone: slice
    offset: int
    local: range


class Learner:
    """Holds everything that learns, and updates it.

    Args:
        config: the settings.
        model: how the denoiser is called.
        policy: the denoiser.
        observed: a short run, for the shapes of samples and conditions.
        images: the pictures of that run, for the aspect ratio of tokens.
        accelerator: accelerate's.

    Attributes:
        measures: of the epoch so far.
    """

    def __init__(
        self,
        config: ACFlowConfig,
        model: FlowModel,
        policy: Policy,
        observed: Observed,
        images: Tensor,
        accelerator: Any,
    ) -> None:
        self.config, self.model, self.policy, self.accelerator = config, model, policy, accelerator
        self.device: torch.device = accelerator.device
        self.measures = Measures()
        self.critic: CriticLearner | None = None
        if config.critic:
            features = known_features(observed.cond, model.timestep)
            self.critic = CriticLearner(config, observed.clean, features, images, accelerator)
        self.stepper = make_stepper(config, policy, accelerator)
        self.optimizer = self.stepper.optimizer
        self.ema = ExponentialMovingAverage(policy.module, config.ema) if config.ema else None
        self.steps, self._passes = 0, 0

    def learn(self, data: Rollouts, targets: Targets, *, epoch: int, rate: float) -> None:
        """All updates of an epoch; ``rate`` is the factor on the actor's learning rate."""
        for inner in range(self.config.inner_epochs):
            for number in range(self.config.updates_per_epoch):
                self.update(data, targets, epoch=epoch, inner=inner, number=number, rate=rate)

    def update(
        self, data: Rollouts, targets: Targets, *, epoch: int, inner: int, number: int, rate: float
    ) -> None:
        """One update of the actor (not where ``rate`` is 0), then those of the critic.

        The advantages come from the critic as it was before it saw these rewards: one that has just
        been fitted to them would explain them away.
        """
        config, place = self.config, self.place(number)
        seed = derive_seed(config.seed, "actor", epoch, inner, number)
        draw = self._draw(data, seed)
        mine = draw.part(place.offset, place.offset + len(place.local))
        advantages = self._advantages(data, targets, place, mine)
        if rate > 0:
            torch.manual_seed(derive_seed(seed, "layers", self.accelerator.process_index))
            weights = self._weights(targets, advantages, place, draw)
            self._step(lambda rows, cut: self._losses(data, mine, weights, rows, cut), place, rate)
        if self.critic is not None and config.critic_steps:
            shaped = targets.shaped[place.everyone]
            self.critic.memory.add(data, place.local, shaped, self.accelerator)
        for step in range(config.critic_steps if self.critic is not None else 0):
            self._fit_critic(data, place, derive_seed(seed, "critic", step))

    def place(self, number: int) -> Place:
        """Where update ``number`` of an epoch lies."""
        size = self.config.samples // self.config.updates_per_epoch
        share = size // self.accelerator.num_processes
        local = range(number * share, (number + 1) * share)
        everyone = slice(number * size, (number + 1) * size)
        return Place(everyone, self.accelerator.process_index * share, local)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """The arithmetic of the denoiser inside the block."""
        dtype = torch.bfloat16 if self.config.precision == "bf16" else None
        with ExitStack() as stack:
            for module in self.policy.modules:
                stack.enter_context(autocasting(module, dtype))
            yield

    def velocity(
        self, network: Any, x: Tensor, sigma: Tensor, cond: Conditioning, other: Conditioning | None
    ) -> Tensor:
        """The velocity that training compares: guided where ``train_cfg`` is "both"."""
        guided = other if self.config.train_cfg == "both" else None
        return self.model.guided(network, x, sigma, cond, guided, self.config.guidance_scale)

    def count_passes(self, states: int, guided: bool, reference: bool) -> None:
        """Note network passes: of the policy, and of the reference where it was asked."""
        both = guided and self.config.train_cfg == "both"
        self._passes += states * (2 if both else 1) * (2 if reference else 1)

    def pop_evaluations(self) -> int:
        """Network passes of one state each, on all ranks, since it was last asked."""
        passes, self._passes = self._passes, 0
        return passes * self.accelerator.num_processes

    def replace(self, seeds: Sequence[int]) -> Replace | None:
        """How the samples of these seeds are drawn where not by the pipeline's own solver."""
        return None

    def average(self) -> dict[str, Tensor] | None:
        """The averaged weights by name; None where none are kept."""
        return None if self.ema is None else self.ema.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Everything that learns."""
        state: dict[str, Any] = {
            "policy": self.policy.state_dict(),
            "optimizer": self.stepper.state_dict(),
            "updates": self.steps,
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        if self.critic is not None:
            state |= self.critic.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.policy.load_state_dict(placed(state["policy"], self.policy.state_dict()))
        self.stepper.load_state_dict(state["optimizer"])
        self.steps = state["updates"]
        if self.ema is not None:
            self.ema.load_state_dict(placed(state["ema"], self.ema.state_dict()))
        if self.critic is not None:
            self.critic.load_state_dict(state)

    def _draw(self, data: Rollouts, seed: int, levels: str | None = None) -> Draw:
        config = self.config
        return draw_update(
            (config.samples // config.updates_per_epoch, *data.clean.shape[1:]),
            config.levels_per_sample,
            seed=seed,
            device=self.device,
            levels=levels or config.levels,
            mean=config.sigma_mean,
            std=config.sigma_std,
        )

    def _states(self, clean: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Noisy states of clean samples, and these, each as often as it has levels."""
        clean = clean.float().repeat_interleave(self.config.levels_per_sample, 0)
        return forward_noised(clean, draw.noise, draw.sigma), clean

    @torch.no_grad()
    def _advantages(self, data: Rollouts, targets: Targets, place: Place, draw: Draw) -> Tensor:
        """Advantages of all ranks at their states, (rows,), in the order of the plan."""
        repeats = self.config.levels_per_sample
        value = torch.zeros_like(draw.sigma)
        if self.critic is not None:
            rows = slice(place.local.start, place.local.stop)
            x, _ = self._states(data.clean[rows], draw)
            features = {name: found[rows] for name, found in data.features.items()}
            value = self.critic.values(x, draw.sigma, features)
        value, sigma = self.accelerator.gather(torch.stack([value, draw.sigma], 1)).unbind(1)
        shaped = targets.shaped[place.everyone].repeat_interleave(repeats)
        weighed = targets.weighed[place.everyone].repeat_interleave(repeats)
        if self.critic is not None:
            self.measures.critic(shaped, value, sigma)
        return advantage(weighed, value, clip=self.config.advantage_clip)

    def _weights(self, targets: Targets, advantages: Tensor, place: Place, draw: Draw) -> Tensor:
        """The weights of this rank's states, normalised over those of all ranks and passes."""
        config, repeats = self.config, self.config.levels_per_sample
        weights = normalised_weights(
            advantages,
            targets.groups[place.everyone].repeat_interleave(repeats),
            family=config.weights,
            tau=config.tau,
            normalise=config.normalise,
        )
        self.measures.weights(weights, advantages, draw.sigma.flatten())
        start = place.offset * repeats
        return weights[start : start + len(place.local) * repeats]

    def _losses(
        self, data: Rollouts, draw: Draw, weights: Tensor, rows: range, cut: slice
    ) -> Tensor:
        """The actor's loss at some of this rank's states, (rows,)."""
        config = self.config
        part = Draw(draw.sigma[cut], draw.noise[cut])
        x, clean = self._states(data.clean[rows.start : rows.stop], part)
        cond, uncond = data.condition(rows, config.levels_per_sample)
        reference = None
        if config.alpha > 0:
            with self.policy.reference() as network:
                reference = self.velocity(network, x, part.sigma, cond, uncond)
        policy = self.velocity(self.policy.runner, x, part.sigma, cond, uncond)
        self.count_passes(len(x), uncond is not None, reference is not None)
        loss = actor_loss(
            policy,
            part.noise - clean,
            weights[cut],
            reference=reference,
            alpha=config.alpha,
            level_weight=self.model.level_weight(part.sigma),
        )
        self.measures.mean("flow_loss", loss.flow)
        self.measures.mean("drift", loss.drift)
        return loss.total

    def _step(self, losses: Callable[[range, slice], Tensor], place: Place, rate: float) -> None:
        """One step of the actor's optimizer on the mean of ``losses`` over all ranks."""
        config, count = self.config, len(place.local)
        per, repeats = count // config.accumulate, config.levels_per_sample
        for index in range(config.accumulate):
            rows = place.local[index * per : (index + 1) * per]
            cut = slice(index * per * repeats, (index + 1) * per * repeats)
            last = index == config.accumulate - 1
            with self.stepper.passing(last), quick_attention(self.device):
                self.stepper.backward(losses(rows, cut).sum() / (count * repeats))
        self.measures.mean("gradient_norm", self.stepper.step(rate))
        if self.ema is not None:
            self.ema.update(self.policy.module, self.steps)
        self.steps += 1

    def _fit_critic(self, data: Rollouts, place: Place, seed: int) -> None:
        """One step of the critic, on as many remembered samples as an update has."""
        if self.critic is None:
            return
        draw = self._draw(data, seed, "uniform")
        chosen = self.critic.memory.draw(len(draw.sigma), seed)
        count = (~chosen.shaped.isnan()).sum() * self.config.levels_per_sample
        mine = torch.arange(place.offset, place.offset + len(place.local))
        part, own = draw.part(place.offset, place.offset + len(place.local)), chosen.take(mine)
        x, _ = self._states(own.clean, part)
        shaped = own.shaped.repeat_interleave(self.config.levels_per_sample)
        loss = self.critic.step(x, part.sigma, own.features, shaped, count)
        self.measures.mean("critic_loss", loss)
