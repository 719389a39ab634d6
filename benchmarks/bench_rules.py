"""What each rule adds to a step: its own arithmetic, memory, host reads; without any network.

    python benchmarks/bench_guidance.py --rules [--threads 1]

The network, the weak model and the classifier answer at once with tensors made before, so that only
the rule's own work is left. It is set against one call of a denoiser of SD3-medium's shape at 1024
pixels: one and two of its 24 blocks are timed, and the difference is taken 23 times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from _probes import HostReads, PeakMemory
from diffusers import SD3Transformer2DModel
from torch import Tensor

from diffsteer.core import Guidance, Level, Step
from diffsteer.guidance import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    CalibratedClassifierGuidance,
    ClassifierFreeGuidance,
    GradientFreeClassifierGuidance,
    GuidanceInterval,
    ManifoldProjectedGuidance,
)

SHAPE = (1, 16, 128, 128)
BLOCKS, TEXT = 24, 333
CLASSES = 1000


class Inputs:
    """Predictions of a step, and a step whose networks cost nothing."""

    def __init__(self, device: str) -> None:
        draw = torch.Generator(device).manual_seed(0)

        def noise() -> Tensor:
            return torch.randn(SHAPE, generator=draw, device=device)

        self.x, self.cond = noise(), noise()
        self.uncond, self.weak, self.moved = (self.cond + 0.1 * noise() for _ in range(3))
        self.logits = torch.randn(1, CLASSES, generator=draw, device=device)
        self.labels = torch.tensor([7], device=device)
        self.memory: dict[Any, Any] = {}

    def step(self, index: int) -> Step:
        """The step of that index, its noise level falling."""
        sigma = 0.9 - 0.1 * index
        return Step(
            x=self.x, level=Level.flow(sigma), index=index, count=8, timestep=1000 * sigma,
            cond=self.cond, uncond=self.uncond, memory=self.memory,
            evaluate=lambda x, branch="cond", **_: self.moved if branch == "cond" else self.uncond,
            evaluate_weak=lambda model, branch="cond", **_: self.weak,
            recorded=lambda name, branch: self.labels, next_level=Level.flow(sigma - 0.1),
        )  # fmt: skip

    def tensors(self) -> list[Tensor]:
        """Everything that was there before the rule."""
        return [v for v in vars(self).values() if isinstance(v, Tensor)]

    def classifier(self, images: Tensor) -> Tensor:
        """Logits that depend on the images in the cheapest way that has a gradient."""
        return self.logits + images[:, 0, 0, :1]


def rules(inputs: Inputs) -> dict[str, Guidance]:
    cfg = ClassifierFreeGuidance(4.0)
    gfcg = GradientFreeClassifierGuidance(inputs.classifier, 2.0, combine="cfg", cfg_scale=4.0)
    return {
        "classifier-free": cfg,
        "APG": AdaptiveProjectedGuidance(8.0),
        "interval of APG": GuidanceInterval(AdaptiveProjectedGuidance(8.0), 0.1),
        "autoguidance": AutoGuidance(2.0),
        "GFCG, mixing": gfcg,
        "GFCG, autoguidance": replace(gfcg, combine="autoguidance"),
        "EluCD, score": CalibratedClassifierGuidance(inputs.classifier, rule=cfg),
        "EluCD, direction": CalibratedClassifierGuidance(
            inputs.classifier, 0.004, rule=cfg, form="direction"
        ),
        "CFG-MP, K = 2": ManifoldProjectedGuidance(cfg, iterations=2, anderson=0),
        "CFG-MP+, K = 2": ManifoldProjectedGuidance(cfg, iterations=2, anderson=1),
    }


def denoiser_seconds(device: str, dtype: torch.dtype) -> float:
    """One call of SD3-medium's transformer on one conditional batch, from one and two blocks."""
    seconds = []
    for layers in (1, 2):
        model = SD3Transformer2DModel(
            sample_size=128, num_layers=layers, num_attention_heads=24, caption_projection_dim=1536,
            pos_embed_max_size=192,
        ).to(device, dtype)  # fmt: skip
        inputs = {
            "hidden_states": torch.randn(SHAPE, device=device, dtype=dtype),
            "encoder_hidden_states": torch.randn(1, TEXT, 4096, device=device, dtype=dtype),
            "pooled_projections": torch.randn(1, 2048, device=device, dtype=dtype),
            "timestep": torch.tensor([500.0], device=device),
        }
        with torch.inference_mode():
            seconds.append(timed(lambda m=model, i=inputs: m(**i), device, 5, 1))
        del model
    return seconds[0] + (BLOCKS - 1) * (seconds[1] - seconds[0])


def timed(call: Callable[[], Any], device: str, repeats: int, warm: int = 3) -> float:
    times = []
    for repeat in range(repeats + warm):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        if repeat >= warm:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def rule_seconds(rule: Guidance, inputs: Inputs, device: str, repeats: int) -> float:
    """The second step of a trajectory: memories are filled, first-step checks are done."""
    inputs.memory = {}
    rule(inputs.step(0))
    kept = dict(inputs.memory)

    def call() -> Tensor:
        inputs.memory = dict(kept)
        return rule(inputs.step(1))

    return timed(call, device, repeats)


def measured(rule: Guidance, inputs: Inputs) -> tuple[float, list[int]]:
    """Peak memory of the second step in float32 latents, and host reads of the first two."""
    inputs.memory, reads = {}, []
    for index in (0, 1):
        with PeakMemory() as memory, HostReads(*inputs.tensors()) as host:
            memory.ignore(*inputs.tensors())
            rule(inputs.step(index))
        reads.append(host.count)
    return memory.peak / (4 * inputs.x.numel()), reads


def table(device: str, repeats: int) -> list[str]:
    dtype = torch.bfloat16
    whole, inputs = denoiser_seconds(device, dtype), Inputs(device)
    lines = [
        f"One denoiser call (24 blocks, {str(dtype).removeprefix('torch.')}): {whole:.2f} s.", "",
        "| rule | own arithmetic, ms | share of a call | memory, latents | host reads, later |",
        "|---" * 5 + "|",
    ]  # fmt: skip
    for name, rule in rules(inputs).items():
        with torch.no_grad():
            seconds = rule_seconds(rule, inputs, device, repeats)
            memory, reads = measured(rule, inputs)
        lines.append(
            f"| {name} | {1000 * seconds:.2f} | {100 * seconds / whole:.4f} % | {memory:.1f} "
            f"| {reads[0]}, {reads[1]} |"
        )
    return lines
