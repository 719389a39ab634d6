"""Samplers of part (c) of reproduce_targets.py: injected noise, coarse weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer.core import Level, seeded_generators, to_denoised
from diffsteer.core.student import student_noise
from diffsteer.samplers import heun_step, integrate, karras_sigmas
from diffsteer.samplers.pfgmpp import input_scale

STEPS, SIGMA_MAX, INJECTED = 18, 80.0, 1_000_000


def edm_sampler(
    pipe: Any, augment_dim: float, alpha: float = 0.0, *, scale: float = 1.0, told: bool = False
) -> Callable[[list[int], Tensor], Tensor]:
    """Heun's sampler with noise ``alpha * sigma`` added before each step, as in the paper's test.

    Args:
        pipe: of an EDM network.
        augment_dim: D of the prior.
        alpha: of the injected noise; its energy adds up over the steps.
        scale: of classifier-free guidance.
        told: count every step from the level that the noise has risen to, and tell the network:
            if the drift of the norm is what spoils the samples, this mends them.
    """
    network, shape = pipe.transformer, (3, *[pipe.transformer.config.sample_size] * 2)
    kind, null = pipe.prediction_kind, pipe.num_classes

    @torch.no_grad()
    def generate(seeds: list[int], labels: Tensor) -> Tensor:
        generators = seeded_generators(seeds)
        # Of their own: a finite D draws its factor from the first, and the noise that is injected
        # must be the same at every D, or the distances of the rows differ by that alone.
        injected = seeded_generators([seed + INJECTED for seed in seeds])
        branches = [labels] if scale == 1 else [torch.full_like(labels, null), labels]

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            ready = x * input_scale(x, sigma, kind.parameter or 0.5, augment_dim)
            time = (1000 * sigma.log() / 4).expand(len(x))
            found = [
                network(ready, timestep=time, class_labels=branch, return_dict=False)[0]
                for branch in branches
            ]
            output = found[0] if scale == 1 else found[0] + scale * (found[1] - found[0])
            return to_denoised(output, kind, x, Level.ve(sigma))

        def step(fn: Any, x: Tensor, now: Tensor, then: Tensor, memory: Any = None) -> Tensor:
            memory["steps"] = memory.get("steps", 0) + 1
            risen = (1 + memory["steps"] * alpha**2) ** 0.5 if told else 1.0
            if alpha:
                fresh = torch.stack([torch.randn(shape, generator=g) for g in injected])
                x = x + alpha * now * fresh
            return heun_step(fn, x, risen * now, risen * then)

        prior = SIGMA_MAX * student_noise(generators, shape, augment_dim)
        return integrate(denoise, prior, karras_sigmas(STEPS), step)

    return generate


@torch.no_grad()
def quantised(model: nn.Module, bits: int) -> None:
    """Round every weight matrix to ``bits``, per tensor, asymmetric, zero point on the grid.

    As in the paper's test, but for its list of names: every parameter of two or more dimensions
    outside the embeddings is rounded.
    """
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or "emb" in name:
            continue
        low, high = weight.min(), weight.max()
        scale = (high - low) / (2**bits - 1)
        zero = (-low / scale).trunc()
        weight.copy_(((weight / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale)
