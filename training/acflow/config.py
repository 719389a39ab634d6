"""What a fine-tuning run is: one flat, frozen dataclass, from which the command line is derived."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..settings import Settings, setting
from .shaping import SHAPINGS
from .warmup import WarmUp
from .weights import FAMILIES, NORMALISATIONS, check_signed

__all__ = ["METHODS", "ACFlowConfig", "method_config"]

POSITIVE_INTEGERS = (
    *("prompts_per_epoch", "images_per_prompt", "updates_per_epoch", "levels_per_sample"),
    *("sample_steps", "sample_batch", "epochs", "accumulate", "inner_epochs", "sync_every"),
    *("critic_width", "critic_memory", "rank", "checkpoint_every", "eval_steps", "reward_workers"),
)
COUNTS = ("critic_steps", "warmup_min", "warmup_max", "ramp", "eval_every", "eval_images")
POSITIVE = ("tau", "advantage_clip", "learning_rate", "critic_rate", "clip", "reward_limit")
NOT_NEGATIVE = ("alpha", "huber", "weight_decay", "w2_budget")
SHARES = ("ema", "reward_momentum")
INFINITE = ("advantage_clip",)
TRAIN_CFG = ("off", "both", "distil")


@dataclass(frozen=True)
class ACFlowConfig(Settings):
    """A run of reward fine-tuning; the defaults are AC-Flow's (reconstructed). Fields carry help.

    Raises:
        ValueError: a value is out of its range, or two contradict; the message names the field.
    """

    prompts_per_epoch: int = setting(10, "prompts drawn an epoch, over all ranks")
    images_per_prompt: int = setting(8, "images of each of them")
    sample_steps: int = setting(10, "solver steps of a training sample")
    sample_batch: int = setting(80, "images sampled at once on each rank", free=True)
    guidance_scale: float = setting(1.0, "guidance while sampling; 1 is none")
    train_cfg: str = setting(
        "off", "what guidance does in training: off, both (in sampling and in the losses), or "
        "distil (sampled with, trained and used without)", choices=TRAIN_CFG,
    )  # fmt: skip
    sampler: str = setting("policy", "whose samples to learn from", choices=("policy", "ema"))
    sync_every: int = setting(1, "epochs between updates of the sampling weights")

    reward_shaping: str = setting("prompt", "how rewards are normalised", choices=SHAPINGS)
    reward_limit: float = setting(5.0, "largest size of a shaped reward")
    reward_momentum: float = setting(0.9, "of the moments of reward_shaping running")
    drop_constant: bool = setting(True, "no reward term for prompts whose images score alike")
    reward_workers: int = setting(1, "threads that score while sampling goes on", free=True)

    critic: bool = setting(True, "subtract the critic's value from the reward")
    critic_width: int = setting(32, "channels of the critic's first layer")
    critic_steps: int = setting(1, "critic updates for each actor update")
    critic_memory: int = setting(1, "the critic learns from the samples of so many last updates")
    critic_rate: float = setting(1e-3, "learning rate of the critic")
    critic_target: str = setting("mean", "what the critic fits", choices=("mean", "soft"))
    huber: float = setting(0.0, "critic errors above this count linearly; 0: none do")
    warmup_min: int = setting(20, "least epochs in which the critic alone learns")
    warmup_max: int = setting(100, "most epochs of that")
    warmup_explained: float = setting(0.1, "explained variance that ends the warm-up")
    ramp: int = setting(10, "epochs over which the actor's learning rate then rises")

    advantage_clip: float = setting(2.0, "largest size of an advantage; inf for none")
    weights: str = setting("exp", "weight as a function of the advantage", choices=FAMILIES)
    tau: float = setting(1.0, "inverse temperature of the weights: the speed")
    normalise: str = setting("batch", "weights average to 1 over this", choices=NORMALISATIONS)
    alpha: float = setting(1.0, "strength of the Wasserstein-2 term: the end point")
    levels_per_sample: int = setting(2, "noise levels drawn for each sample and update")
    levels: str = setting(
        "uniform", "distribution of the actor's levels", choices=("uniform", "logit-normal")
    )
    sigma_mean: float = setting(0.0, "mean of the logit of the level, for logit-normal")
    sigma_std: float = setting(1.0, "standard deviation of the same")

    epochs: int = setting(100, "rounds of sampling and training")
    updates_per_epoch: int = setting(1, "actor updates an epoch, on disjoint samples")
    inner_epochs: int = setting(1, "times that an epoch's samples are gone through")
    accumulate: int = setting(1, "passes of an update on each rank", free=True)
    learning_rate: float = setting(1e-4, "learning rate of the actor")
    weight_decay: float = setting(1e-4, "weight decay of both")
    clip: float = setting(1.0, "largest norm of either gradient")
    ema: float = setting(0.9, "decay of the averaged weights, which are evaluated and saved")
    precision: str = setting("bf16", "arithmetic of the denoiser", choices=("bf16", "fp32"))
    gradient_checkpointing: bool = setting(False, "recompute activations to save memory", free=True)
    w2_budget: float = setting(0.0, "stop when the mean drift |v - v_ref|^2 exceeds this; 0: never")
    seed: int = setting(0, "seed of everything random")

    tune: str = setting("lora", "what is trained", choices=("lora", "full"))
    rank: int = setting(16, "rank of the adapters")
    lora_alpha: float = setting(32.0, "their scale times their rank")
    lora_targets: str = setting("", "ends of layer names, by commas; empty: attention projections")

    checkpoint_every: int = setting(5, "epochs between checkpoints", free=True)
    eval_every: int = setting(20, "epochs between evaluations; 0: only at start and end", free=True)
    eval_images: int = setting(100, "images of an evaluation; 0: none", free=True)
    eval_steps: int = setting(20, "solver steps of an evaluated image", free=True)
    log_with: str = setting("", "tracker of accelerate, such as tensorboard or wandb", free=True)

    def __post_init__(self) -> None:
        """Refuse values out of range and contradictions."""
        self._check_values(INFINITE)
        self._need(POSITIVE_INTEGERS, "at least 1", lambda value: value >= 1)
        self._need(COUNTS, "0 or more", lambda value: value >= 0)
        self._need(POSITIVE, "positive", lambda value: value > 0)
        self._need(NOT_NEGATIVE, "0 or more", lambda value: value >= 0)
        self._need(SHARES, "in [0, 1)", lambda value: 0 <= value < 1)
        self._check_together()

    def _check_together(self) -> None:
        check_signed(self.weights, self.alpha, self.advantage_clip)
        if self.weights == "signed" and self.normalise != "none":
            raise ValueError("signed weights average to zero: they need normalise='none'")
        if self.guidance_scale < 1:
            raise ValueError(f"guidance_scale must be 1 (none) or more, got {self.guidance_scale}")
        if (self.guidance_scale != 1) == (self.train_cfg == "off"):
            raise ValueError(
                f"guidance_scale={self.guidance_scale} with train_cfg={self.train_cfg!r}: say what "
                "guidance is to do. 'off' samples without it (guidance_scale 1); 'both' uses it in "
                "sampling and in the losses; 'distil' samples with it and trains the bare "
                "conditional model, which is then to be used without"
            )
        if self.sampler == "ema" and not self.ema:
            raise ValueError("sampler='ema' needs ema above 0")
        _ = self.warmup

    @property
    def warmup(self) -> WarmUp:
        """The rule of the warm-up; without a critic there is only the ramp."""
        if not self.critic:
            return WarmUp(0, 0, 0.0, self.ramp)
        return WarmUp(self.warmup_min, self.warmup_max, self.warmup_explained, self.ramp)

    @property
    def samples(self) -> int:
        """Samples of an epoch, over all ranks."""
        return self.prompts_per_epoch * self.images_per_prompt

    @property
    def targets(self) -> tuple[str, ...]:
        """The ends of the names of layers that get adapters."""
        return tuple(name.strip() for name in self.lora_targets.split(",") if name.strip())


NO_CRITIC = {"critic": False, "critic_steps": 0, "warmup_min": 0, "warmup_max": 0}
METHODS: dict[str, dict[str, Any]] = {
    "acflow": {},
    # Fan et al. 2025, with shaped rewards and mean-1 weights, without which alpha has no scale.
    "orw": {**NO_CRITIC, "advantage_clip": math.inf},
    "reward-weighted": {**NO_CRITIC, "advantage_clip": math.inf, "alpha": 0.0},
    # Advantages of the prompt alone, signed.
    "advantage-matching": {
        **NO_CRITIC, "reward_shaping": "prompt", "weights": "signed", "normalise": "none",
        "alpha": 2.5,
    },
}  # fmt: skip
"""Named methods as what they change in the defaults: the special cases of AC-Flow."""


def method_config(method: str, **changes: Any) -> ACFlowConfig:
    """The config of a named method.

    Raises:
        ValueError: the method is unknown, or a value is out of range.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return ACFlowConfig(**{**METHODS[method], **changes})
