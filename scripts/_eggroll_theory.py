"""The laws of low-rank noise, in closed form and measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _eggroll_rivals import differentiable_reward, reward_gradient
from torch import Tensor

from diffsteer.core import seeded_noise
from diffsteer.pipelines import files, load_pipeline
from diffsteer.training.data import derive_seed
from diffsteer.training.eggroll import (
    Eggroll,
    EggrollConfig,
    NoiseFormat,
    Shaped,
    es_gradient,
    make_eggroll,
)
from diffsteer.training.eggroll.members import MemberSampler
from diffsteer.training.eggroll.noise import pair_factors
from diffsteer.training.eggroll.questions import Questions, fixed_questions
from diffsteer.training.prompts import class_prompts
from diffsteer.training.rewards import RewardSet, load_reward

RANKS = (1, 2, 4, 16)
POPULATIONS = (16, 64, 256, 1024)
DENSE = "dense"  # beside the ranks
STEPS = 4
SIGMA = 0.003
Points = dict[str, Any]


@dataclass(frozen=True)
class Matrix:
    """What noise is drawn for."""

    name: str = "w"
    rows: int = 3
    columns: int = 4


def theory_points(out: Path, quick: bool = False, *, make: bool = True) -> Points:
    """Everything that ``table`` shows; each part is kept in ``out`` and not made again.

    Args:
        out: the folder.
        quick: few draws and members, for a test.
        make: what is missing; else it is left out.
    """
    parts: dict[str, Callable[[], Any]] = {"ranks": partial(rank_law, quick)}
    for rank in (*RANKS, DENSE):
        parts[f"cosines-{rank}"] = partial(cosines, rank, quick)
    points: Points = {"ranks": [], "cosines": []}
    for name, function in parts.items():
        path = out / f"{name}{'-quick' if quick else ''}.json"
        if make and not path.exists():
            files.write_json(path, function())
        if path.exists():
            points[name.partition("-")[0]] += json.loads(path.read_text())
    return points


def rank_law(quick: bool) -> list[dict[str, float]]:
    """The estimate for a bounded fitness by rank: its limit, and a sample by the library's noise.

    ``f(W) = sin <G, W>`` has the gradient G at 0. Of the estimate's projection on G the expectation
    is known: ``<G, A B^T> / sqrt(r)`` is a sum of r independent terms with the characteristic
    function ``prod_k (1 + s_k^2 t^2 / r)^(-r / 2)``, s_k the singular values of G.
    """
    matrix, sigma, draws = Matrix(), 0.8, 20_000 if quick else 2_000_000
    slope = torch.randn(
        matrix.rows, matrix.columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    slope /= slope.norm()
    values = torch.linalg.svdvals(slope)
    gauss = math.exp(-(sigma**2) / 2)
    found = []
    for rank in RANKS:
        share = values.square() / (1 + values.square() * sigma**2 / rank)
        wave = (1 + values.square() * sigma**2 / rank).pow(-rank / 2).prod()
        samples = _projections(matrix, slope, rank, draws)
        sampled = (sigma * samples).sin() * samples / sigma
        found.append({
            "rank": rank, "expected": float(wave * share.sum()), "dense": gauss,
            "sampled": float(sampled.mean()), "error": float(sampled.std()) / draws**0.5,
        })  # fmt: skip
    return found


def _projections(matrix: Matrix, slope: Tensor, rank: int, draws: int) -> Tensor:
    """``<G, A B^T> / sqrt(r)`` of as many pairs, (draws,)."""
    noise, found = NoiseFormat(seed=1, rank=rank), []
    for start in range(0, draws, 20_000):
        pairs = range(start, min(start + 20_000, draws))
        a, b = pair_factors(noise, matrix, pairs, 0, dtype=torch.float64)
        found.append(((a @ slope) * b).sum((1, 2)) / rank**0.5)
    return torch.cat(found)


def cosines(rank: int | str, quick: bool) -> list[dict[str, float | str]]:
    """The cosine of estimates and the true gradient on the embedded model, by population.

    The reward is the log-probability of the class, with a gradient through all solver steps; all
    in float32, over the same two images. Smaller populations are the first members of the largest.
    """
    pipe = load_pipeline("embedded", dtype=torch.float32)
    asked = fixed_questions(class_prompts(pipe), count=2)
    _, gradient = reward_gradient(pipe, differentiable_reward, asked, STEPS)
    rewards = RewardSet({"it": load_reward("class-probability:classifier=guidance,mode=log")})
    sizes = POPULATIONS[:1] if quick else POPULATIONS
    config = EggrollConfig(
        population_size=sizes[-1], rank=1 if rank == DENSE else int(rank), sigma=SIGMA,
        sample_steps=STEPS, images_per_call=64,
    )  # fmt: skip
    es = make_eggroll(pipe.transformer, config)
    sampler = MemberSampler(pipe, es, rewards, config)
    if rank == DENSE:
        dense = Dense(es.layers)
        scores, estimate = dense_scores(dense, sampler, asked, sizes[-1]), dense.gradient
    else:
        scores = sampler.evaluate(range(sizes[-1]), asked).table.double().mean(1)
        estimate = partial(low_rank_estimate, es)
    pairs = (scores[0::2] - scores[1::2]) / 2
    values = torch.stack([pairs, -pairs], 1).flatten()
    return [
        {
            "rank": rank, "population": size,
            "cosine": cosine(partial(estimate, values=values[:size]), gradient),
            "predicted": predicted_cosine(es.layers, gradient, rank, size),
            "weights": sum(g.numel() for g in gradient.values()),
        }
        for size in sizes
    ]  # fmt: skip


def low_rank_estimate(es: Eggroll, name: str, values: Tensor) -> Tensor:
    """The library's own, for one layer."""
    shaped = Shaped(values, len(values), 1.0)
    return es_gradient(es.noise, es.layers[name], 0, SIGMA, shaped)[f"{name}.weight"]


def cosine(estimate: Callable[[str], Tensor], gradient: Mapping[str, Tensor]) -> float:
    """Over all layers."""
    dot = ours = theirs = 0.0
    for name, true in gradient.items():
        found = estimate(name).double()
        dot += float((found * true).sum())
        ours, theirs = ours + float(found.square().sum()), theirs + float(true.square().sum())
    return dot / (ours * theirs) ** 0.5


def predicted_cosine(
    layers: Mapping[str, Any], gradient: Mapping[str, Tensor], rank: int | str, size: int
) -> float:
    """Of a linear fitness: ``1 / sqrt(1 + MSE)``, over all layers, for ``size / 2`` directions."""
    total = sum(float(g.square().sum()) for g in gradient.values())
    error = 0.0
    for name, layer in layers.items():
        m, n = layer.rows, layer.columns
        own, lone = float(gradient[name].square().sum()), float((m + 2) * (n + 2))
        inner = m * n + 1.0 if rank == DENSE else (
            (1 - 1 / int(rank)) * (m * n + 2) + lone / int(rank) - 1)  # fmt: skip
        error += own * inner + (total - own) * m * n
    return 1 / math.sqrt(1 + error / total / (size / 2))


class Dense:
    """Full Gaussian noise for each layer, written into the weights."""

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self.weights = {name: layer.module.weight for name, layer in layers.items()}
        self.base = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def noise(self, name: str, pair: int) -> Tensor:
        """Of a pair."""
        return seeded_noise([derive_seed(name, pair)], tuple(self.base[name].shape))[0]

    def put(self, member: int | None) -> None:
        """Be a member; None: the mean again."""
        for name, weight in self.weights.items():
            weight.data.copy_(self.base[name])
            if member is not None:
                sign = 1.0 - 2.0 * (member % 2)
                weight.data.add_(self.noise(name, member // 2), alpha=sign * SIGMA)

    def gradient(self, name: str, values: Tensor) -> Tensor:
        """The estimate, up to a factor."""
        pairs = (values[0::2] - values[1::2]).float().tolist()
        total = torch.zeros_like(self.base[name])
        for pair, weight in enumerate(pairs):
            total.add_(self.noise(name, pair), alpha=weight)
        return total


def dense_scores(dense: Dense, sampler: MemberSampler, asked: Questions, size: int) -> Tensor:
    """The mean reward of each member, (N,)."""
    texts, notes = [p.text for p in asked.prompts], [p.metadata for p in asked.prompts]
    found = []
    for member in range(size):
        dense.put(member)
        images = sampler.sample(None, asked)
        found.append(float(sampler.rewards.score(images, texts, notes).total.double().mean()))
    dense.put(None)
    return torch.tensor(found, dtype=torch.float64)


def table(points: Mapping[str, Any]) -> str:
    """The points as Markdown; empty without points."""
    shown = {"ranks": _rank_table, "cosines": _cosine_table}
    return "\n\n".join(make(points[name]) for name, make in shown.items() if points[name])


def _rank_table(rows: Sequence[Mapping[str, float]]) -> str:
    lines = [
        "### Bias of low-rank noise, by rank\n",
        "| rank | expected | sampled | less than full rank | times the rank |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        gap = row["dense"] - row["expected"]
        lines.append(
            f"| {row['rank']} | {row['expected']:.4f} | {row['sampled']:.4f} ± {row['error']:.4f} "
            f"| {gap:.4f} | {gap * row['rank']:.3f} |"
        )
    return "\n".join([*lines, f"| full | {rows[0]['dense']:.4f} | | 0 | |"])


def _cosine_table(rows: Sequence[Mapping[str, Any]]) -> str:
    sizes = sorted({row["population"] for row in rows})
    lines = [
        f"### Cosine of the estimate and the gradient of {rows[0]['weights'] / 1e6:.2f} million "
        "weights, measured (predicted)\n",
        "| rank | " + " | ".join(f"N = {size}" for size in sizes) + " |",
        "|" + "---|" * (1 + len(sizes)),
    ]
    for rank in dict.fromkeys(row["rank"] for row in rows):
        mine = {row["population"]: row for row in rows if row["rank"] == rank}
        cells = [f"{mine[n]['cosine']:.4f} ({mine[n]['predicted']:.4f})" for n in sizes]
        lines.append(f"| {'full' if rank == DENSE else rank} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
