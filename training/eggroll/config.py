"""What an EGGROLL run is: one flat, frozen dataclass, from which the command line is derived."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..settings import Settings, setting
from .forward import MODES
from .noise import NOISE_KINDS
from .shaping import SHAPINGS

__all__ = ["EggrollConfig"]

POSITIVE_INTEGERS = (
    *("steps", "population_size", "rank", "noise_reuse", "images_per_prompt", "sample_steps"),
    *("images_per_call", "checkpoint_every", "hash_every", "reward_workers"),
)
COUNTS = ("prompts_per_step", "member_batch_size", "eval_every", "eval_images", "preview_images")
POSITIVE = ("sigma", "lr", "sigma_decay", "lr_decay")
NOT_NEGATIVE = ("max_step_norm", "max_delta_norm", "rank_timeout", "guidance_scale")
WIRES = ("scores", "byte")


@dataclass(frozen=True)
class EggrollConfig(Settings):
    """A run of evolution strategies on a pipeline's denoiser. The fields carry their help.

    The defaults suit the embedded model; for others begin with a sigma of about 5 % of the
    weights' deviation.

    Raises:
        ValueError: a value is out of its range, or two contradict; the message names the field.
    """

    steps: int = setting(100, "generations", free=True)
    population_size: int = setting(64, "members of a generation")
    sigma: float = setting(0.003, "deviation of the perturbation of each weight")
    lr: float = setting(0.2, "sgd: step in units of sigma; adam, adamw: the step itself")
    rank: int = setting(1, "rank of the perturbations")
    antithetic: bool = setting(True, "members come in pairs with opposite noise")
    noise_kind: str = setting("gaussian", "law of the factors", choices=NOISE_KINDS)
    noise_reuse: int = setting(1, "generations that share directions")
    fitness_shaping: str = setting("zscore", "from scores to weights", choices=SHAPINGS)
    optimizer: str = setting("sgd", "what moves the weights", choices=("sgd", "adam", "adamw"))
    sigma_decay: float = setting(1.0, "factor on sigma after each generation")
    lr_decay: float = setting(1.0, "factor on lr after each generation")
    delta_decay: float = setting(0.0, "share of the change of the weights taken back each time")
    max_step_norm: float = setting(0.0, "cap on the norm of one step; 0: none")
    max_delta_norm: float = setting(0.0, "cap on the norm of the whole change; 0: none")
    target_modules: str = setting(
        "", "names or endings of the layers that evolve, with commas, or one regular expression; "
        "empty: every Linear and Conv2d",
    )  # fmt: skip
    exclude: str = setting("", "likewise, layers that do not evolve")
    evolve_bias: bool = setting(False, "let biases evolve too")
    mode: str = setting("lowrank", "materialize: one member at a time", choices=MODES)
    offload: bool = setting(False, "keep float32 offsets and first weights in main memory")

    prompts_per_step: int = setting(2, "prompts that every member is asked for; 0: all")
    images_per_prompt: int = setting(1, "images of each of them")
    common_noise: bool = setting(True, "all members start from the same noise (else all pairs)")
    baseline: bool = setting(False, "centre by the mean parameters, asked for the same images")
    sample_steps: int = setting(5, "solver steps of an image")
    guidance_scale: float = setting(1.0, "the pipeline's own guidance; 1 is none")
    images_per_call: int = setting(80, "images sampled at once on each rank", free=True)
    member_batch_size: int = setting(0, "members sampled at once; 0: what images_per_call allows")

    wire: str = setting("scores", "what ranks exchange; byte: one a pair", choices=WIRES)
    rank_timeout: float = setting(0.0, "seconds before going on without a rank; 0: wait", free=True)
    hash_every: int = setting(10, "generations between comparisons of the weights", free=True)
    reward_workers: int = setting(1, "threads that score while sampling goes on", free=True)

    eval_every: int = setting(20, "generations between evaluations; 0: none", free=True)
    eval_images: int = setting(100, "images of the mean parameters in an evaluation", free=True)
    preview_images: int = setting(10, "columns of the pictures", free=True)
    checkpoint_every: int = setting(20, "generations between checkpoints", free=True)
    save_lora_rank: int = setting(
        0, "also save the change as a LoRA of this rank; 0: no", free=True
    )
    log_with: str = setting("", "tracker of accelerate, such as tensorboard or wandb", free=True)
    seed: int = setting(0, "of the noise, the prompts and the images")

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        self._check_values()
        self._need(POSITIVE_INTEGERS, "at least 1", lambda value: value >= 1)
        self._need((*COUNTS, "save_lora_rank"), "0 or more", lambda value: value >= 0)
        self._need(POSITIVE, "positive", lambda value: value > 0)
        self._need(NOT_NEGATIVE, "0 or more", lambda value: value >= 0)
        self._need(("delta_decay",), "in [0, 1)", lambda value: 0 <= value < 1)
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.baseline and not self.common_noise:
            raise ValueError(
                "baseline compares members with the mean parameters on the same noise; it needs "
                "common_noise=True"
            )
        if not self.antithetic:
            if self.wire == "byte":
                raise ValueError("wire='byte' sends differences of pairs: it needs antithetic=True")
            return
        if self.population_size % 2:
            raise ValueError(
                "with antithetic pairs population_size must be even, got "
                f"{self.population_size}; change it, or set antithetic=False"
            )
        if self.member_batch_size % 2 and self.mode == "lowrank":
            raise ValueError(
                f"member_batch_size {self.member_batch_size} splits a pair; make it even"
            )
        if self.wire == "byte" and (self.fitness_shaping != "zscore" or self.baseline):
            raise ValueError(
                "wire='byte' sends differences of pairs, which know fitness_shaping='zscore' "
                "without a baseline only"
            )

    def layers(self) -> dict[str, Any]:
        """``target_modules`` and ``exclude`` as ``Eggroll`` takes them."""
        return {
            "target_modules": _names(self.target_modules),
            "exclude": _names(self.exclude) or (),
        }


def _names(text: str) -> str | list[str] | None:
    """Names between commas, or one regular expression (whatever no name can hold is in it)."""
    if not text:
        return None
    if all(part.replace("_", "").isalnum() for part in text.replace(",", ".").split(".")):
        return [part.strip() for part in text.split(",")]
    return text
