"""Parts (b) and (c) of reproduce_targets.py: small models of CIFAR-10 at equal compute."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _targets_plots import plot_curves, plot_robustness, plot_strips, save_strip
from _targets_points import Point, Points, interval, table
from _targets_sampling import STEPS, edm_sampler, quantised
from torch import Tensor

from diffsteer.eval import EvalSuite, write_statistics
from diffsteer.eval.features import extract
from diffsteer.eval.reference import statistics_of
from diffsteer.training import Images, TrainConfig, Trainer, averaged_pipeline, load_images

KS = ("0.0", "0.25", "0.5", "0.75", "0.9", "1.0", "learned", "auto")
DIMS = ("64", "128", "2048", "inf")
ALPHAS, BITS = (0.1, 0.2), (6, 5, 4)
BATCH, GUIDED = 250, 3.0
Generate = Callable[[list[int], Tensor], Tensor]


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
        suite, side = EvalSuite(("fd", "accuracy")), self.config.resolution
        if side != 32:
            extractor = suite.extractors[0]
            path = self.out / f"test-images-{side}px-{extractor.digest[:12]}.npz"
            if not path.is_file():
                test = load_images(self.config.data, split="test", resolution=side)
                pixels = _pixels(test, range(len(test)))
                real = extract((127.5 * (pixels + 1)).round().byte(), suite.extractors)
                write_statistics(path, statistics_of(real, extractor, data="CIFAR-10 test"))
            suite.set_reference(path)
        return suite

    def real(self) -> dict[str, float]:
        """What training images score: the floor of the distance, the ceiling of the accuracy."""
        rows = {c: (self.images.labels == c).nonzero().flatten().tolist() for c in range(10)}
        return self.score(
            lambda seeds, labels: _pixels(self.images, [rows[s % 10][s // 10] for s in seeds])
        )

    def train(self, name: str, **target: Any) -> tuple[Any, dict[str, Any]]:
        """The pipeline of one run, trained now unless it is there, and its curve's last line."""
        out = self.out / "runs" / name
        trainer = Trainer(replace(self.config, **target), self.images, out)
        if not trainer.run():
            raise KeyboardInterrupt
        pipe = averaged_pipeline(out)
        pipe.set_progress_bar_config(disable=True)
        lines = (out / "loss.jsonl").read_text().splitlines()
        return pipe, {"curve": [_line(text) for text in lines], "target": trainer.target()}

    def score(self, generate: Generate) -> dict[str, float]:
        """Scores of images in [-1, 1] made by ``generate(seeds, labels)``."""
        self.suite.reset(keep_reference=True)
        for rows in torch.arange(self.samples).split(BATCH):
            made = generate(rows.tolist(), rows % 10)
            self.suite.update((made / 2 + 0.5).clamp(0, 1), labels=rows % 10)
        return dict(self.suite.compute().values)


def _pixels(images: Images, rows: Sequence[int]) -> Tensor:
    """Images in [-1, 1], none of them mirrored."""
    parts = torch.tensor(rows).split(1000)
    return torch.cat([images.take(r, torch.zeros(len(r), dtype=torch.bool))[0] for r in parts])


def _line(text: str) -> list[float]:
    line = json.loads(text)
    return [line["step"], line["loss"], *([line["k"]] if "k" in line else [])]


def show(generate: Generate, path: Path) -> None:
    """Ten images, one of each class, from seeds 0 to 9, in a row."""
    save_strip(generate(list(range(10)), torch.arange(10)), path)


def kdiff_part(study: Study, points: Points, seeds: int) -> str:
    """Part (b): one network at every k."""

    def make(name: str) -> Point:
        if name == "real":
            return {"scores": study.real()}
        k, seed = name.removeprefix("k-").rsplit("-", 1)
        pipe, made = study.train(name, objective="kdiff", k=k, seed=int(seed))

        def at(scale: float) -> Generate:
            call = {"num_inference_steps": 20, "output_type": "latent", "guidance_scale": scale}
            return lambda seeds, labels: pipe(labels, seeds=seeds, **call).images

        show(at(GUIDED), points.folder / f"{name}.png")
        return {**made, "scores": study.score(at(1.0)), "guided": study.score(at(GUIDED))}

    names = [f"k-{k}-{seed}" for seed in range(seeds) for k in KS]
    found = {p["name"]: p for p in points.fill(["real", *names], make, "k")}
    real, rows = found.pop("real")["scores"], []
    for k in KS:
        runs, beside = ([found[f"k-{at}-{seed}"] for seed in range(seeds)] for at in (k, "0.5"))
        row = [k, interval((r["target"]["k"] for r in runs), 3)]
        for value, digits in ((_loss, 4), (_fd, 1)):
            gaps = [value(r) - value(other) for r, other in zip(runs, beside, strict=True)]
            row += [interval(map(value, runs), digits), interval(gaps, digits)]
        rows.append([*row, _fd_guided(runs), _accuracy(runs)])
    plot_curves(found, points.folder / "curves.png")
    strips = {f"k = {k}" if k[0].isdigit() else k: points.folder / f"k-{k}-0.png" for k in KS}
    plot_strips(strips, points.folder / "samples.png")
    head = ["k", "k at the end", "velocity loss", "minus that of k = 0.5", "fd-cifar ↓",
            "minus that of k = 0.5", "fd, guided", "class accuracy, guided ↑"]  # fmt: skip
    return f"{table(head, rows)}\n\n{_floor(real)}\n\n{_track(found, seeds)}"


def _loss(point: Point) -> float:
    """Over the last ten lines of the curve."""
    end = [line[1] for line in point["curve"][-10:]]
    return sum(end) / len(end)


def _fd(point: Point) -> float:
    return float(point["scores"]["fd-cifar"])


def _fd_guided(runs: list[Point]) -> str:
    return interval((r["guided"]["fd-cifar"] for r in runs), 1)


def _accuracy(runs: list[Point]) -> str:
    return interval((100 * r["guided"]["accuracy"] for r in runs), 1) + " %"


def _floor(real: dict[str, float]) -> str:
    return (
        f"As many training images, at this resolution: fd {real['fd-cifar']:.1f}, class accuracy "
        f"{100 * real['accuracy']:.1f} %. Chance is 10 %. Guided: classifier-free, scale "
        f"{GUIDED:g}."
    )


def _track(found: dict[str, Point], seeds: int) -> str:
    """How a learned k moved."""
    rows = []
    for seed in range(seeds):
        curve = found[f"k-learned-{seed}"]["curve"]
        marks = [curve[round(share * (len(curve) - 1))] for share in (0, 0.05, 0.1, 0.25, 0.5, 1)]
        rows.append([seed, *(f"{k:.3f} ({step:.0f})" for step, _, k in marks)])
    return "Learned k (at update):\n\n" + table(["seed", "start", *[" "] * 4, "end"], rows)


def pfgmpp_part(study: Study, points: Points, seeds: int) -> str:
    """Part (c): one network at every D, and how it bears noise and coarse weights."""

    def make(name: str) -> Point:
        dim, seed = name.removeprefix("D-").rsplit("-", 1)
        target = {"objective": "pfgmpp", "augment_dim": dim, "seed": int(seed)}
        pipe, made = study.train(name, **target)

        def at(alpha: float = 0, **more: Any) -> Generate:
            return edm_sampler(pipe, float(dim), alpha, **more)

        show(at(scale=GUIDED), points.folder / f"{name}.png")
        show(at(ALPHAS[-1], scale=GUIDED), points.folder / f"{name}-noise.png")
        cases = {f"alpha {a}": study.score(at(a)) for a in (0, *ALPHAS)}
        cases[f"alpha {ALPHAS[-1]}, told"] = study.score(at(ALPHAS[-1], told=True))
        guided = study.score(at(scale=GUIDED))
        kept = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
        for bits in BITS:
            pipe.transformer.load_state_dict(kept)
            quantised(pipe.transformer, bits)
            cases[f"{bits} bits"] = study.score(at())
        return {**made, "scores": cases["alpha 0"], "guided": guided, "cases": cases}

    names = [f"D-{dim}-{seed}" for seed in range(seeds) for dim in DIMS]
    found = {p["name"]: p for p in points.fill(names, make, "D")}
    plot_robustness(found, ALPHAS, BITS, points.folder / "robustness.png")
    strips = {
        f"D = {dim}\n{text}": points.folder / f"D-{dim}-0{tail}.png"
        for dim in DIMS
        for tail, text in (("", "as it is"), ("-noise", f"alpha {ALPHAS[-1]}"))
    }
    plot_strips(strips, points.folder / "samples.png")
    return _robustness(found, seeds, 3 * study.config.resolution**2)


def _robustness(found: dict[str, Point], seeds: int, size: int) -> str:
    """Distances with noise and coarse weights, and how far the noise drifts from training's."""
    cases = ["alpha 0", *(f"alpha {a}" for a in ALPHAS), f"alpha {ALPHAS[-1]}, told",
             *(f"{b} bits" for b in BITS)]  # fmt: skip
    rows, drifts = [], []
    for dim in DIMS:
        runs = [found[f"D-{dim}-{seed}"] for seed in range(seeds)]
        cells = [interval((r["cases"][c]["fd-cifar"] for r in runs), 1) for c in cases]
        rows.append([dim, *cells, _fd_guided(runs), _accuracy(runs)])
        drift = [log_drift(size, float(dim), alpha) for alpha in ALPHAS]
        drifts.append([dim, f"{log_spread(size, float(dim)):.4f}", *(f"{d:.1f}" for d in drift)])
    head = ["D", *(f"fd, {c}" for c in cases), "fd, guided", "class accuracy, guided"]
    says = ["D", "std(log R)", *(f"drift of log R at alpha {a}, in std(log R)" for a in ALPHAS)]
    return f"{table(head, rows)}\n\n{table(says, drifts)}"


def log_spread(size: int, augment_dim: float) -> float:
    """The standard deviation of log R at one sigma: what norms of noise training has seen."""
    half = torch.tensor([size / 2, augment_dim / 2], dtype=torch.float64)
    return float(torch.polygamma(1, half[torch.isfinite(half)]).sum().sqrt() / 2)


def log_drift(size: int, augment_dim: float, alpha: float) -> float:
    """How far noise injected at every step has moved log R in the end, in ``log_spread``."""
    return 0.5 * math.log(1 + STEPS * alpha**2) / log_spread(size, augment_dim)
