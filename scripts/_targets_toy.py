"""Parts (a) and (d) of reproduce_targets.py: data whose dimension and weights are known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from _targets_plots import plot_learned
from _targets_points import Point, Points, interval, table
from torch import Tensor, nn

from diffsteer.core import seeded_generators
from diffsteer.core.student import student_denoise, student_noise
from diffsteer.samplers import ChurnStep, StudentChurnStep, heun_step, integrate, karras_sigmas
from diffsteer.training import KDiffObjective, LearnedK, suggest_k

GRID = [(16, 1), (16, 4), (16, 16), (64, 1), (64, 4), (64, 16), (64, 64), (768, 16), (768, 256)]
LAWS: dict[str, tuple[float, float] | None] = {  # of the logit of t, t = 1 being data
    "uniform": None,
    "logit-normal(0, 1)": (0.0, 1.0),
    "logit-normal(-0.8, 0.8)": (-0.8, 0.8),
}
AMBIENT, INTRINSIC, HIDDEN = 16, (1, 2, 4, 8, 16), 64
FIXED = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
ATOMS, SHARES = [[1.0, 0.0], [-0.6, 0.8], [-0.4, -0.9]], (0.5, 0.3, 0.2)
DIMS = (1.0, 2.0, 4.0, 16.0, 64.0, 1024.0, math.inf)


def times(law: tuple[float, float] | None) -> Tensor:
    """Quantiles of t."""
    u = (torch.arange(4001, dtype=torch.float64) + 0.5) / 4001
    if law is None:
        return u
    gauss = math.sqrt(2) * torch.erfinv(2 * u - 1)
    return torch.sigmoid(law[0] + law[1] * gauss)


def best_linear_k(dims: int, intrinsic: int, t: Tensor) -> float:
    """Argmin over k of the least squares error of ``u = W z``, one W for all t."""
    k, s = torch.linspace(0, 1, 100_001, dtype=torch.float64), 1 - t
    inside = k**2 + (1 - k) ** 2 - (k * t.mean() - (1 - k) * s.mean()) ** 2 / (t**2 + s**2).mean()
    outside = (1 - k) ** 2 * (1 - s.mean() ** 2 / (s**2).mean())
    return float(k[(intrinsic * inside + (dims - intrinsic) * outside).argmin()])


def linear_part(points: Points) -> str:
    """Part (a), first: where the rule k* = D / (D + d) holds."""

    def make(name: str) -> Point:
        dims, intrinsic = map(int, name.split("-"))
        return {law: best_linear_k(dims, intrinsic, times(p)) for law, p in LAWS.items()}

    rows = []
    for point in points.fill([f"{a}-{b}" for a, b in GRID], make, "linear"):
        dims, intrinsic = map(int, point["name"].split("-"))
        found = [f"{point[law]:.4f}" for law in LAWS]
        rows.append([dims, intrinsic, f"{dims / (dims + intrinsic):.4f}", *found])
    return table(["D", "d", "D / (D + d)", *(f"t {law}" for law in LAWS)], rows)


class Mlp(nn.Module):
    """A small network of (x, timestep)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(AMBIENT + 2, HIDDEN), nn.SiLU(),
            nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, AMBIENT),
        )  # fmt: skip

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        s = (timestep / 1000)[:, None]
        return self.body(torch.cat([x, s, 2 * s - 1], 1))


def train_mlp(intrinsic: int, target: str, seed: int, steps: int) -> Point:
    """One run on a random ``intrinsic``-dimensional Gaussian in 16 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(AMBIENT, intrinsic, generator=generator)).Q.T

    def draw(count: int) -> Tensor:
        return torch.randn(count, intrinsic, generator=generator) @ basis

    auto = suggest_k(draw(4096))
    k = LearnedK() if target == "learned" else auto if target == "auto" else float(target)
    objective = KDiffObjective(k, mean=0.0, std=1.0)
    torch.manual_seed(seed)
    network, labels, curve = Mlp(), torch.zeros(256, dtype=torch.long), []
    groups = [{"params": list(network.parameters())}]
    groups += [k.group(1e-2)] if isinstance(k, LearnedK) else []
    optimizer = torch.optim.AdamW(groups, lr=2e-3, weight_decay=0.0)
    for step in range(steps):
        noise, level = objective.draw((256, AMBIENT), generator)
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        objective(network, draw(256), noise, level, labels).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (49, 199, 499) or step == steps - 1:
            curve.append((step + 1, objective.kind.parameter))
    with torch.no_grad():
        noise, level = objective.draw((20_000, AMBIENT), generator)
        loss = objective(network, draw(20_000), noise, level, labels).mean()
    return {"loss": float(loss), "k": objective.kind.parameter, "curve": curve, "auto": auto}


def learned_part(points: Points, seeds: int, steps: int) -> str:
    """Part (a), second: what a learned k becomes, and what each k costs."""
    kinds = ("learned", "auto", *map(str, FIXED))
    names = [f"{d}-{kind}-{seed}" for d in INTRINSIC for kind in kinds for seed in range(seeds)]

    def make(name: str) -> Point:
        d, kind, seed = name.split("-")
        return train_mlp(int(d), kind, int(seed), steps)

    found = {p["name"]: p for p in points.fill(names, make, "learned k")}

    def group(d: int, kind: str) -> list[Point]:
        return [found[f"{d}-{kind}-{seed}"] for seed in range(seeds)]

    moved = []
    for d in INTRINSIC:
        runs = group(d, "learned")
        marks = [
            interval((dict(r["curve"])[step] for r in runs), 2) for step, _ in runs[0]["curve"]
        ]
        root = math.sqrt(AMBIENT) / (math.sqrt(AMBIENT) + math.sqrt(d))
        moved.append([d, f"{AMBIENT / (AMBIENT + d):.3f}", f"{root:.3f}", *marks])
    paths = {d: [r["curve"] for r in group(d, "learned")] for d in INTRINSIC}
    means = {
        d: [(mark[0][0], sum(k for _, k in mark) / seeds) for mark in zip(*curves, strict=True)]
        for d, curves in paths.items()
    }
    plot_learned(means, AMBIENT, points.folder.parent / "learned.png")
    stamps = [f"k at {step}" for step, _ in group(1, "learned")[0]["curve"]]
    head = ["d", "D / (D + d)", "√D / (√D + √d)", *stamps]
    losses = [
        [d, *(interval((p["loss"] for p in group(d, kind)), 4) for kind in kinds)]
        for d in INTRINSIC
    ]
    names = ["d", "learned", "auto", *(f"k = {k:g}" for k in FIXED)]
    return f"{table(head, moved)}\n\nVelocity loss after training:\n\n{table(names, losses)}"


def weights_of(name: str, samples: int) -> list[float]:
    """Shares of the samples that end at each of the three atoms."""
    kind, dim = name.split("-")
    augment_dim, atoms = float(dim), torch.tensor(ATOMS, dtype=torch.float64)
    points = atoms.repeat_interleave(torch.tensor([round(10 * s) for s in SHARES]), 0)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return student_denoise(x, points, sigma, augment_dim)

    own = math.inf if kind == "gaussprior" else augment_dim
    start = torch.Generator().manual_seed(DIMS.index(augment_dim))  # rows share no noise
    noise = student_noise(start, (samples, 2), own).double()
    draw = torch.Generator().manual_seed(100 + DIMS.index(augment_dim))
    steps = {
        "gausschurn": ChurnStep(lambda x: torch.randn(x.shape, generator=draw), gamma=0.3),
        "churn": None if math.isinf(augment_dim) else StudentChurnStep(
            seeded_generators(range(samples)), augment_dim, gamma=0.3),
    }  # fmt: skip
    grid = karras_sigmas(200 if kind == "fine" else 18)
    out = integrate(denoise, 80 * noise, grid, steps.get(kind) or heun_step)
    near = torch.cdist(out, atoms).argmin(1).bincount(minlength=3)
    return (near / samples).tolist()


def atoms_part(points: Points, samples: int) -> str:
    """Part (d): the weights of three atoms at every D, and what spoils them."""
    kinds: Sequence[tuple[str, str]] = (
        ("own", "Heun, 18 steps"),
        ("fine", "Heun, 200 steps"),
        ("gaussprior", "Gaussian prior"),
        ("gausschurn", "Gaussian churn"),
        ("churn", "Student-t churn (reconstruction)"),
    )
    names = [f"{kind}-{dim:g}" for kind, _ in kinds for dim in DIMS]

    def make(name: str) -> Point:
        """The valid churn has a generator for each sample, hence a fifth of them."""
        return {"weights": weights_of(name, -(-samples // 5) if name[:6] == "churn-" else samples)}

    found = {p["name"]: p["weights"] for p in points.fill(names, make, "atoms")}
    rows = []
    for dim in DIMS:
        cells = [" / ".join(f"{w:.3f}" for w in found[f"{kind}-{dim:g}"]) for kind, _ in kinds]
        rows.append([f"{dim:g}", *cells])
    errors = [1.96 * math.sqrt(0.25 / count) for count in (samples, -(-samples // 5))]
    return (
        f"{table(['D', *(text for _, text in kinds)], rows)}\n\nTrue weights 0.5 / 0.3 / 0.2. "
        f"Sampling alone gives at most ± {errors[0]:.4f} (95 %, {samples} samples), in the last "
        f"column ± {errors[1]:.4f}."
    )
