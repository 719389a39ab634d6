"""Eggroll: any torch model, any fitness function, no gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_choices, check_population, check_rank
from .forward import perturbed
from .layers import Layer, Names, check_layers, find_layers
from .noise import NoiseFormat
from .pace import Pace
from .report import Report
from .shaping import Shaped, shape_fitness
from .update import (
    MakeOptimizer,
    Offsets,
    es_gradient,
    make_optimizer,
    norm_of,
    total_norm,
    weights_hash,
)
from .verify import check_rows_apart, first_call

__all__ = ["Eggroll"]


class Eggroll:
    """Maximise a fitness by evolution with low-rank perturbations (arXiv 2511.16652).

    Differs from the authors' code: the noise is a counter-based hash, fitness is centred prompt by
    prompt with one deviation for all, and what an optimizer moves is the difference from the
    weights that the model came with.

    Args:
        model: in evaluation mode; its weights are updated in place. Between steps they are the
            mean of the population.
        sigma: deviation of every weight's perturbation. 1e-3 for a transformer, about 5 % of its
            weights' deviation, is a start.
        lr: with plain SGD the deviation of a step's entries in units of sigma, whatever the
            population (for uninformative fitness; an upper bound with several prompts). With
            Adam, as usual, the step itself.
        population_size: members of a generation.
        rank: of the perturbations, r.
        seed: of the noise.
        antithetic: members come in pairs with opposite noise.
        noise_kind: "gaussian" or "rademacher".
        noise_reuse: generations that share directions.
        fitness_shaping: see ``shape_fitness``.
        optimizer: "sgd", "adam", "adamw", or a callable (parameters, lr) that makes one.
        target_modules: which layers evolve, see ``find_layers``.
        exclude: which do not.
        evolve_bias: let their biases evolve too.
        member_batch_size: members in one batch; None: all.
        sigma_decay: factor on sigma at each step.
        lr_decay: factor on the rate at each step.
        delta_decay: part of the difference from the first weights that each step takes back.
        max_step_norm: cap on the Euclidean norm of one step.
        max_delta_norm: cap on that of the difference from the first weights.
        mode: "lowrank"; "materialize" for models that cannot batch members (one at a time).
        offload: keep the float32 offsets and the first weights in main memory, and bring them to
            the device layer by layer: memory there is that of inference.

    Raises:
        ValueError: an argument is out of range, the rank exceeds a matrix, or the model does not
            suit (``find_layers``, ``check_layers``).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sigma: float,
        lr: float = 1.0,
        population_size: int = 64,
        rank: int = 1,
        seed: int = 0,
        antithetic: bool = True,
        noise_kind: str = "gaussian",
        noise_reuse: int = 1,
        fitness_shaping: str = "zscore",
        optimizer: str | MakeOptimizer = "sgd",
        target_modules: Names = None,
        exclude: Names = (),
        evolve_bias: bool = False,
        member_batch_size: int | None = None,
        sigma_decay: float = 1.0,
        lr_decay: float = 1.0,
        delta_decay: float = 0.0,
        max_step_norm: float | None = None,
        max_delta_norm: float | None = None,
        mode: str = "lowrank",
        offload: bool = False,
    ) -> None:
        self.noise = NoiseFormat(seed, rank, noise_kind, antithetic, noise_reuse)
        decays = (sigma_decay, lr_decay, delta_decay)
        self.pace = Pace(sigma, lr, *decays, max_step_norm, max_delta_norm)
        check_choices(mode, fitness_shaping)
        check_population(population_size, member_batch_size, antithetic)
        self.model, self.mode, self.population_size = model, mode, population_size
        self.fitness_shaping, self.member_batch_size = fitness_shaping, member_batch_size
        self.layers = find_layers(model, target_modules, exclude, biases=evolve_bias)
        check_layers(model, self.layers, lowrank=mode == "lowrank")
        check_rank(rank, self.layers.values())
        self.offsets = Offsets(self.layers, offload=offload)
        self._separable = isinstance(optimizer, str) and max_step_norm is None
        self.optimizer = make_optimizer(optimizer, list(self.offsets.parameters.values()), lr)
        self.generation, self._unverified = 0, mode == "lowrank"

    @property
    def sigma(self) -> float:
        """Deviation of the perturbations of the coming generation."""
        return self.pace.sigma_at(self.generation)

    @property
    def lr(self) -> float:
        """Rate of the coming step."""
        return self.pace.lr_at(self.generation)

    def step(
        self,
        fitness_fn: Callable[[nn.Module, int], Tensor | Sequence[float]],
        *,
        rows_per_member: int | None = None,
    ) -> Report:
        """Evaluate a whole generation and update the model.

        Args:
            fitness_fn: ``fitness_fn(model, count)`` gives the scores of ``count`` members, (count,)
                or (count, prompts), more is better, NaN for a member that failed. It calls the
                model on member-major rows: ``model(x.repeat(count, 1))`` for one input.
            rows_per_member: see ``perturbed``; needed where guidance doubles the batch.

        Raises:
            ValueError: as ``perturbed`` and ``shape_fitness``, or too few scores came back. The
                model then has its weights from before the step.
        """
        found = []
        for members in self.groups():
            with self.perturbed(members, rows_per_member=rows_per_member):
                scores = torch.as_tensor(fitness_fn(self.model, len(members))).detach().cpu()
            if scores.dim() not in (1, 2) or scores.shape[0] != len(members):
                raise ValueError(
                    f"the fitness function gave scores of shape {tuple(scores.shape)} for "
                    f"{len(members)} members; expected ({len(members)},), or ({len(members)}, Q) "
                    "with one column a prompt"
                )
            found.append(scores.double())
        return self.tell(torch.cat(found))

    def groups(self) -> Iterator[list[int]]:
        """The members of a generation, a list for each batch: what to evaluate before ``tell``."""
        size = 1 if self.mode == "materialize" else self.member_batch_size or self.population_size
        for start in range(0, self.population_size, size):
            yield list(range(start, min(start + size, self.population_size)))

    @contextmanager
    def perturbed(
        self, members: Sequence[int], *, rows_per_member: int | None, copies: int | None = None
    ) -> Iterator[None]:
        """``perturbed`` for members of the coming generation.

        The first batch of several members is computed again by two of them alone.

        Raises:
            ValueError: as ``perturbed`` and, at the end of the first batch, ``check_rows_apart``.
        """
        common: dict[str, Any] = {
            "noise": self.noise, "sigma": self.sigma, "rows_per_member": rows_per_member,
            "layers": self.layers,
        }  # fmt: skip
        # Where the copies are stated, hooks do not see the calls.
        check = self._unverified and copies is None and len(set(members)) > 1
        with ExitStack() as stack:
            calls = stack.enter_context(first_call(self.model)) if check else []
            stack.enter_context(
                perturbed(
                    self.model, members, step=self.generation, mode=self.mode, copies=copies,
                    **common,
                )
            )  # fmt: skip
            yield
        if calls:
            check_rows_apart(self.model, calls[0], members, **common)
            self._unverified = False

    def tell(self, scores: Tensor, *, baseline: Tensor | None = None) -> Report:
        """Update the model from the scores of all members, (N,) or (N, Q), in their order.

        Raises:
            ValueError: as ``shape_fitness``, or the number of scores is not the population's.
        """
        shaped = shape_fitness(
            scores,
            method=self.fitness_shaping,
            antithetic=self.noise.antithetic,
            baseline=baseline,
        )
        return self.update(shaped)

    @torch.no_grad()
    def update(self, shaped: Shaped) -> Report:
        """Update the model from weights of the members: what a replay of a run calls.

        Raises:
            ValueError: the number of weights is not the population's, or one is not finite.
        """
        values = shaped.values
        if values.shape != (self.population_size,) or not values.isfinite().all():
            raise ValueError(
                f"expected one finite value for each of {self.population_size} members, got shape "
                f"{tuple(values.shape)}{'' if values.isfinite().all() else ' with NaN or inf'}"
            )
        skipped = not bool(values.any())
        step_norm = 0.0 if skipped else self._move(shaped)
        self.generation += 1
        offset_norm = total_norm(self.offsets.parameters.values())
        return Report(
            self.generation, shaped.count, shaped.deviation, step_norm, offset_norm, skipped
        )

    def weights_hash(self) -> int:
        """64 bits that agree between ranks whose evolved weights agree bit for bit."""
        return weights_hash(self.offsets.parameters.values())

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on, besides the weights that it began with."""
        return {
            "generation": self.generation,
            "noise": asdict(self.noise),
            "offsets": self.offsets.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "base_hash": self.offsets.base_hash(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``; the model must hold the weights that the run began with.

        Raises:
            ValueError: the state is of other weights, other noise or other layers.
        """
        mine = asdict(self.noise)
        if state["noise"] != mine:
            odd = next(name for name in mine if state["noise"].get(name) != mine[name])
            raise ValueError(
                f"the saved run drew its noise with {odd}={state['noise'].get(odd)!r}, this one "
                f"has {mine[odd]!r}; use the saved settings"
            )
        if state["base_hash"] != self.offsets.base_hash():
            raise ValueError(
                "the saved run began with other weights than this model has; load the model that "
                "it began with"
            )
        self.offsets.load_state_dict(state["offsets"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generation = state["generation"]

    def _move(self, shaped: Shaped) -> float:
        """One step of the optimizer and what limits it; the norm of the change."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        layers = list(self.layers.values())
        # Layer by layer only one layer's gradient exists, but not every optimizer can be split so.
        parts = [[layer] for layer in layers] if self._separable else [layers]
        norms = [self._move_layers(part, shaped) for part in parts]
        norm = math.hypot(*map(float, norms))  # read after the last layer: the device never idles
        if self.pace.max_delta_norm is not None:
            self.offsets.limit(self.pace.max_delta_norm)
        self.offsets.write_back()
        return norm

    def _move_layers(self, layers: Sequence[Layer], shaped: Shaped) -> Tensor | float:
        moving = {}
        for layer in layers:
            found = es_gradient(self.noise, layer, self.generation, self.sigma, shaped)
            for name, gradient in found.items():
                moving[name] = self.offsets.parameters[name]
                # torch's optimizers go down
                moving[name].grad = -gradient.to(moving[name].device)
        before = {name: offset.detach().clone() for name, offset in moving.items()}
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.pace.delta_decay:
            self.offsets.decay(self.pace.delta_decay, moving)
        change = norm_of(offset - before[name] for name, offset in moving.items())
        if self.pace.max_step_norm is None or (norm := float(change)) <= self.pace.max_step_norm:
            return change
        for name, offset in moving.items():
            offset.copy_(before[name].lerp(offset, self.pace.max_step_norm / norm))
        return self.pace.max_step_norm
