"""Named protocols: what a published number fixed, and what every result therefore records."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Choices that change a score; written into every result.

    Args:
        protocol: the name under which they are known.
        fid_resize: the rule that brings images to Inception's 299 px (see ``resize``).
        dino_resize: the rule that brings images to DINOv2's 224 px.
        quantise: how float images become uint8 (see ``decode.as_uint8``).
        k: the neighbour of precision, recall, density and coverage.
        strict: whether balls exclude their surface (see ``prdc``).
        neighbours_real: reference samples that precision and recall use; None takes all.
        neighbours_fake: generated samples that they use; None takes all.
        splits: of the Inception Score.
        split_size: samples a split of the Inception Score, instead of ``splits``.
        kid_subsets: random subsets of 1,000 of which the mean is reported besides the all-sample
            kernel distance; 0 for none.
        samples: the number of generated samples that published values use.
        seed: of everything random.
        distances: "exact", or "adm-float16" for precision and recall as ADM's script rounds them.
        kid_convention: whose subsets (see ``kernel.kernel_distance_subsets``).
    """

    protocol: str = "default"
    fid_resize: str = "tf1-bilinear"
    dino_resize: str = "torch-bicubic-aa"
    quantise: str = "round"
    k: int = 3
    strict: bool = False
    neighbours_real: int | None = None
    neighbours_fake: int | None = None
    splits: int = 10
    split_size: int | None = None
    kid_subsets: int = 0
    samples: int | None = None
    seed: int = 2020
    distances: str = "exact"
    kid_convention: str = "torch-fidelity"

    def __post_init__(self) -> None:
        for name in ("k", "splits", "neighbours_real", "neighbours_fake", "split_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.kid_subsets < 0 or self.seed < 0:
            raise ValueError("kid_subsets and seed must not be negative")
        if self.distances not in ("exact", "adm-float16"):
            raise ValueError(f"distances must be 'exact' or 'adm-float16', got {self.distances!r}")


# Which program each row repeats is said in docs/evaluation.md.
PROTOCOLS = {
    "default": Settings(),
    "adm": Settings("adm", split_size=5000, neighbours_real=10_000, samples=50_000),
    "adm-float16": Settings(
        "adm-float16", split_size=5000, neighbours_real=10_000, samples=50_000,
        distances="adm-float16",
    ),
    "edm2": Settings("edm2", quantise="edm", samples=50_000),
    "dgm": Settings(
        "dgm", fid_resize="pil-bicubic", dino_resize="pil-bicubic", k=5, strict=True,
        neighbours_real=10_000, neighbours_fake=10_000, kid_subsets=100, samples=50_000, seed=0,
        kid_convention="clean-fid",
    ),
    "clean": Settings(
        "clean", fid_resize="pil-bicubic-float", kid_subsets=100, seed=0,
        kid_convention="clean-fid",
    ),
    "torchmetrics": Settings(
        "torchmetrics", fid_resize="torch-bilinear-aa", quantise="truncate", kid_subsets=100,
        seed=0, kid_convention="torchmetrics",
    ),
}  # fmt: skip


def protocol(name: str) -> Settings:
    """The settings of a named protocol.

    Raises:
        ValueError: if there is no protocol of that name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    return PROTOCOLS[name]
