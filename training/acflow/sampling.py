"""Draw samples from the pipeline under training, with what its denoiser was conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...core.noise import seeded_generators
from ..pipeline_calls import check_call, guidance_arguments, pipeline_images
from ..prompts import Prompt, call_inputs
from .conditioning import Conditioning
from .features import condition_features
from .flow_model import FlowModel
from .observer import Observed, Observer, Replace, check_flow_pipeline, find_denoiser

__all__ = ["Rollouts", "Sampler", "known_features"]

PROBE_STEPS = 4


@dataclass
class Sampler:
    """Calls a pipeline for prompts and seeds; every sample depends on its own seed alone.

    Args:
        pipe: a flow-matching diffusers pipeline.
        guidance_scale: of the pipeline's own guidance; 1 is none.
        call: further arguments of its call, such as height, width or max_sequence_length.
        inputs: from prompts to the arguments that say what to show, where ``prompt`` and
            ``class_labels`` will not do (embeddings computed before).
        model: what `learn` found out.

    Raises:
        ValueError: the pipeline does not sample by flow matching, or takes no such argument.
    """

    pipe: Any
    guidance_scale: float = 1.0
    call: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[Sequence[Prompt]], dict[str, Any]] | None = None
    model: FlowModel | None = None

    def __post_init__(self) -> None:
        check_flow_pipeline(self.pipe)
        self.denoiser = find_denoiser(self.pipe)
        self.call = dict(self.call)
        check_call(self.pipe, self.call)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance_scale: float | None = None,
        replace: Replace | None = None,
    ) -> tuple[Tensor, Observed]:
        """Images (B, 3, H, W) in [0, 1], and what was observed.

        Args:
            prompts: one a sample.
            seeds: one a sample.
            steps: solver steps.
            guidance_scale: instead of the sampler's own.
            replace: see `Observer`; the states are then kept.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        arguments: dict[str, Any] = {
            **guidance_arguments(self.pipe, scale, len(prompts), negative=self.inputs is None),
            **(self.inputs(prompts) if self.inputs else call_inputs(self.pipe, prompts)),
            "generator": seeded_generators(seeds),
            "num_inference_steps": steps,
            "output_type": "pt",
            **self.call,
        }
        seen = Observer(self.pipe, model=self.model, replace=replace, keep_states=bool(replace))
        with seen:
            output = self.pipe(**arguments)
        if self.model is None:
            self.model = seen.learnt()
        return pipeline_images(output, len(prompts)), seen.observed

    def learn(self, prompts: Sequence[Prompt]) -> tuple[FlowModel, Tensor, Observed]:
        """Find out how the denoiser is called, by a short run of a few samples.

        Raises:
            NotImplementedError: it is called in a way that cannot be repeated.
        """
        some = [prompts[i % len(prompts)] for i in range(2)]
        self.model = None
        images, observed = self(some, [0, 1], steps=PROBE_STEPS)
        if self.model is None:
            raise RuntimeError("the pipeline took no step")
        return self.model, images, observed


def known_features(cond: Conditioning, timestep: str) -> dict[str, Tensor]:
    """`condition_features` of a recorded call."""
    known = {name: value for name, value in cond.condition.items() if name != timestep}
    return condition_features(known)


@dataclass
class Rollouts:
    """The samples of one rank in an epoch, in the order in which they are trained on.

    Attributes:
        clean: the samples in the scheduler's layout, (n, ...).
        conds: their conditions, by sampling batch.
        unconds: those of the unconditional prediction, or None for each batch.
        features: what a critic knows of the conditions, by name, (n, ...).
        evaluations: network passes of a sample.
        states: (n, T + 1, ...), every state from noise to sample, or None if they were not kept.
        sigmas: the levels of those states but the last, T of them.
    """

    clean: Tensor
    conds: list[Conditioning]
    unconds: list[Conditioning | None]
    features: dict[str, Tensor]
    evaluations: int
    states: Tensor | None = None
    sigmas: tuple[float, ...] = ()

    @classmethod
    def of(cls, runs: Sequence[Observed], timestep: str) -> Rollouts:
        """Put the runs of an epoch together; conditions wait in the main memory.

        Args:
            runs: of the sampling batches.
            timestep: the argument of the denoiser that is no part of the condition.
        """
        found = [known_features(run.cond, timestep) for run in runs]
        features = {name: torch.cat([each[name] for each in found]) for name in found[0]}
        states = None
        if runs[0].states:
            states = torch.cat([torch.stack([*run.states, run.clean], 1) for run in runs])
        return cls(
            torch.cat([run.clean for run in runs]),
            [run.cond.to("cpu") for run in runs],
            [None if run.uncond is None else run.uncond.to("cpu") for run in runs],
            features,
            runs[0].evaluations,
            states,
            tuple(runs[0].sigmas),
        )

    def condition(self, rows: range, repeats: int) -> tuple[Conditioning, Conditioning | None]:
        """The conditions of some samples, each ``repeats`` times in a row, on their device."""
        device = self.clean.device
        conds, unconds, start = [], [], 0
        for cond, uncond in zip(self.conds, self.unconds, strict=True):
            index = [r - start for r in rows if start <= r < start + cond.count]
            index = [i for i in index for _ in range(repeats)]
            start += cond.count
            if index:
                conds.append(cond.take(index).to(device))
                unconds.append(None if uncond is None else uncond.take(index).to(device))
        other = [uncond for uncond in unconds if uncond is not None]
        return Conditioning.join(conds), Conditioning.join(other) if other else None
