"""Parts (b) and (c) of reproduce_targets.py: small models of CIFAR-10 at equal compute."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _targets_plots import plot_curves
from _targets_points import Point, Points, interval, table
from torch import Tensor, nn

from diffsteer.core import Level, seeded_generators, to_denoised
from diffsteer.core.student import student_noise
from diffsteer.eval import EvalSuite
from diffsteer.samplers import heun_step, integrate, karras_sigmas
from diffsteer.samplers.pfgmpp import input_scale
from diffsteer.training import Images, TrainConfig, Trainer, averaged_pipeline, load_images

KS = ("0.0", "0.25", "0.5", "0.75", "0.9", "1.0", "learned", "auto")
DIMS = ("64", "128", "2048", "inf")
ALPHAS, BITS, STEPS = (0.1, 0.2), (6, 5, 4), 18
BATCH = 250


@dataclass(frozen=True)
class Study:
    """What all image models share.

    Args:
        config: of every training run but for its target and seed.
        out: the folder.
        samples: images each model is scored on.
    """

    config: TrainConfig
    out: Path
    samples: int

    @cached_property
    def images(self) -> Images:
        """The training images."""
        c = self.config
        return load_images(c.data, split="train", resolution=c.resolution)

    @cached_property
    def suite(self) -> EvalSuite:
        """Scores against the test images at the models' own resolution."""
        suite = EvalSuite(("fd", "accuracy"))
        if self.config.resolution != 32:
            real = load_images(self.config.data, split="test", resolution=self.config.resolution)
            for rows in torch.arange(len(real)).split(1000):
                pixels, _ = real.take(rows, torch.zeros(len(rows), dtype=torch.bool))
                suite.update((pixels + 1) / 2, real=True)
        return suite

    def train(self, name: str, **target: Any) -> tuple[Any, dict[str, Any]]:
        """The pipeline of one run, trained now unless it is there, and its curve's last line."""
        out = self.out / "runs" / name
        trainer = Trainer(replace(self.config, **target), self.images, out)
        if not trainer.run():
            raise KeyboardInterrupt
        pipe = averaged_pipeline(out)
        pipe.set_progress_bar_config(disable=True)
        lines = (out / "loss.jsonl").read_text().splitlines()
        shutil.rmtree(out / "previews", ignore_errors=True)
        return pipe, {"curve": [_line(text) for text in lines], "target": trainer.target()}

    def score(self, generate: Callable[[list[int], Tensor], Tensor]) -> dict[str, float]:
        """Scores of images in [-1, 1] made by ``generate(seeds, labels)``."""
        self.suite.reset(keep_reference=True)
        for rows in torch.arange(self.samples).split(BATCH):
            made = generate(rows.tolist(), rows % 10)
            self.suite.update((made / 2 + 0.5).clamp(0, 1), labels=rows % 10)
        return dict(self.suite.compute().values)


def _line(text: str) -> list[float]:
    line = json.loads(text)
    return [line["step"], line["loss"], *([line["k"]] if "k" in line else [])]


def kdiff_part(study: Study, points: Points, seeds: int) -> str:
    """Part (b): one network at every k."""

    def make(name: str) -> Point:
        k, seed = name.removeprefix("k-").rsplit("-", 1)
        pipe, made = study.train(name, objective="kdiff", k=k, seed=int(seed))

        def generate(seeds: list[int], labels: Tensor) -> Tensor:
            call = {"num_inference_steps": 20, "output_type": "latent"}
            return pipe(labels, seeds=seeds, **call).images

        return {**made, "scores": study.score(generate)}

    names = [f"k-{k}-{seed}" for seed in range(seeds) for k in KS]
    found = {p["name"]: p for p in points.fill(names, make, "k")}
    rows = []
    for k in KS:
        runs = [found[f"k-{k}-{seed}"] for seed in range(seeds)]
        loss = interval(sum(c[1] for c in r["curve"][-10:]) / len(r["curve"][-10:]) for r in runs)
        scores = [interval(column, d) for column, d in _columns(runs)]
        rows.append([k, interval((r["target"]["k"] for r in runs), 3), loss, *scores])
    plot_curves(found, points.folder / "curves.png")
    head = ["k", "k at the end", "velocity loss", "fd-cifar ↓", "class accuracy ↑"]
    return f"{table(head, rows)}\n\n{_track(found, seeds)}"


def _track(found: dict[str, Point], seeds: int) -> str:
    """How a learned k moved."""
    rows = []
    for seed in range(seeds):
        curve = found[f"k-learned-{seed}"]["curve"]
        marks = [curve[round(share * (len(curve) - 1))] for share in (0, 0.05, 0.1, 0.25, 0.5, 1)]
        rows.append([seed, *(f"{k:.3f} ({step:.0f})" for step, _, k in marks)])
    return "Learned k (at update):\n\n" + table(["seed", "start", *[" "] * 4, "end"], rows)


def _columns(runs: list[Point]) -> list[tuple[list[float], int]]:
    scores = [run["scores"] for run in runs]
    return [([s["fd-cifar"] for s in scores], 1), ([100 * s["accuracy"] for s in scores], 1)]


def edm_sampler(
    pipe: Any, augment_dim: float, alpha: float
) -> Callable[[list[int], Tensor], Tensor]:
    """Heun's sampler with noise ``alpha * sigma`` added before each step, as the paper's test."""
    network, shape = pipe.transformer, (3, *[pipe.transformer.config.sample_size] * 2)
    kind = pipe.prediction_kind

    @torch.no_grad()
    def generate(seeds: list[int], labels: Tensor) -> Tensor:
        generators = seeded_generators(seeds)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            ready = x * input_scale(x, sigma, kind.parameter or 0.5, augment_dim)
            time = (1000 * sigma.log() / 4).expand(len(x))
            output = network(ready, timestep=time, class_labels=labels, return_dict=False)[0]
            return to_denoised(output, kind, x, Level.ve(sigma))

        def step(fn: Any, x: Tensor, now: Tensor, then: Tensor, memory: Any = None) -> Tensor:
            if alpha:
                fresh = torch.stack([torch.randn(shape, generator=g) for g in generators])
                x = x + alpha * now * fresh
            return heun_step(fn, x, now, then)

        prior = 80 * student_noise(generators, shape, augment_dim)
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


def pfgmpp_part(study: Study, points: Points, seeds: int) -> str:
    """Part (c): one network at every D, and how it bears noise and coarse weights."""

    def make(name: str) -> Point:
        dim, seed = name.removeprefix("D-").rsplit("-", 1)
        target = {"objective": "pfgmpp", "augment_dim": dim, "seed": int(seed)}
        pipe, made = study.train(name, **target)
        cases = {f"alpha {a}": study.score(edm_sampler(pipe, float(dim), a)) for a in (0, *ALPHAS)}
        kept = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
        for bits in BITS:
            pipe.transformer.load_state_dict(kept)
            quantised(pipe.transformer, bits)
            cases[f"{bits} bits"] = study.score(edm_sampler(pipe, float(dim), 0))
        return {**made, "scores": cases["alpha 0"], "cases": cases}

    names = [f"D-{dim}-{seed}" for seed in range(seeds) for dim in DIMS]
    found = {p["name"]: p for p in points.fill(names, make, "D")}
    cases = ["alpha 0", *(f"alpha {a}" for a in ALPHAS), *(f"{b} bits" for b in BITS)]
    size, rows = 3 * study.config.resolution**2, []
    for dim in DIMS:
        runs = [found[f"D-{dim}-{seed}"] for seed in range(seeds)]
        cells = [interval((r["cases"][c]["fd-cifar"] for r in runs), 1) for c in cases]
        accuracy = interval((100 * r["scores"]["accuracy"] for r in runs), 1)
        drift = [f"{log_drift(size, float(dim), alpha):.1f}" for alpha in ALPHAS]
        rows.append([dim, accuracy, *cells, *drift])
    drifts = [f"drift at {a} / std(log R)" for a in ALPHAS]
    head = ["D", "class accuracy", *(f"fd, {c}" for c in cases), *drifts]
    return table(head, rows)


def log_drift(size: int, augment_dim: float, alpha: float) -> float:
    """How far injected noise moves log R, in standard deviations of what training has seen."""
    half = torch.tensor([size / 2, augment_dim / 2], dtype=torch.float64)
    seen = torch.polygamma(1, half[torch.isfinite(half)]).sum().sqrt() / 2
    return 0.5 * math.log(1 + STEPS * alpha**2) / float(seen)
