"""What a training run is: one flat, frozen dataclass, from which the command line is derived."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..core.student import check_augment_dim
from .settings import Settings, setting

__all__ = ["TrainConfig"]

POSITIVE_INTEGERS = (
    *("resolution", "patch_size", "layers", "heads", "head_dim"),
    *("steps", "batch_size", "accumulate", "checkpoint_every", "log_every", "eval_images"),
)
COUNTS = ("warmup", "weak_at", "preview_every", "eval_every", "k_freeze")
SHARES = ("label_dropout", "ema", "beta2")
POSITIVE = ("learning_rate", "clip", "sigma_std", "log_sigma_std", "sigma_data", "k_rate")
K_WORDS = ("learned", "auto")


@dataclass(frozen=True)
class TrainConfig(Settings):
    """A training run; the defaults make the embedded CIFAR-10 model. The fields carry their help.

    Raises:
        ValueError: a value is out of its range; the message names the field.
    """

    data: str = setting(
        "uoft-cs/cifar10", "parquet file or folder, folder of class folders, or hub name", free=True
    )
    split: str = setting("train", "split of the data")
    resolution: int = setting(32, "side of the square images")
    flip: bool = setting(True, "mirror half of the images")

    objective: str = setting("flow", "what is learnt", choices=("flow", "kdiff", "pfgmpp"))
    prediction: str = setting(
        "denoised", "what a flow network predicts", choices=("denoised", "velocity")
    )
    k: str = setting("learned", "k of kdiff: learned, auto (from the data), or a number in [0, 1]")
    k_start: float = setting(0.5, "where a learned k starts")
    k_rate: float = setting(0.01, "learning rate of a learned k")
    k_freeze: int = setting(
        0, "updates at the end with a learned k fixed; 0: ten half-lives of ema, or half the run"
    )
    augment_dim: str = setting("inf", "D of PFGM++: a number, or inf for Gaussian noise")
    stable_targets: bool = setting(False, "learn the mean over the batch (STF), not single images")
    sigma_mean: float = setting(0.4, "mean of the logit of the noise level (flow, kdiff)")
    sigma_std: float = setting(0.8, "standard deviation of it")
    log_sigma_mean: float = setting(-1.2, "mean of the logarithm of the noise level (pfgmpp)")
    log_sigma_std: float = setting(1.2, "standard deviation of it")
    sigma_data: float = setting(0.5, "standard deviation of the images (pfgmpp)")
    label_dropout: float = setting(0.1, "share of the labels replaced by the null class")

    patch_size: int = setting(4, "side of the transformer's patches")
    layers: int = setting(5, "transformer blocks")
    heads: int = setting(3, "attention heads")
    head_dim: int = setting(64, "channels of an attention head")

    steps: int = setting(5000, "updates; the learning rate decays to zero over them")
    batch_size: int = setting(128, "images of an update, over all ranks")
    accumulate: int = setting(1, "passes of an update on each rank", free=True)
    learning_rate: float = setting(1.5e-3, "learning rate of AdamW after the warm-up")
    beta2: float = setting(0.95, "second beta of AdamW")
    weight_decay: float = setting(0.01, "weight decay of AdamW")
    warmup: int = setting(300, "updates of linear warm-up")
    clip: float = setting(1.0, "largest norm of the gradient")
    ema: float = setting(0.999, "decay of the averaged weights")
    precision: str = setting("bf16", "arithmetic of the network", choices=("bf16", "fp32"))
    compile: bool = setting(False, "torch.compile the network", free=True)
    seed: int = setting(0, "seed of the weights, the order and all noise")
    init: str = setting("", "pipeline folder, or embedded, to start the weights from", free=True)

    weak_at: int = setting(1000, "keep the averaged weights of this step for autoguidance; 0: none")
    save_dtype: str = setting(
        "float16", "precision of the saved weights", free=True, choices=("float16", "float32")
    )
    checkpoint_every: int = setting(200, "updates between checkpoints", free=True)
    preview_every: int = setting(1000, "updates between sample grids; 0: none", free=True)
    eval_every: int = setting(0, "updates between evaluations; 0: none", free=True)
    eval_images: int = setting(500, "images of an evaluation", free=True)
    log_every: int = setting(20, "updates between lines of loss.jsonl", free=True)
    log_with: str = setting("", "tracker of accelerate, such as tensorboard or wandb", free=True)

    def __post_init__(self) -> None:
        """Refuse values out of range; write numbers one way, so that 64 and 64.0 are one run."""
        object.__setattr__(self, "augment_dim", repr(_augment_dim(self.augment_dim)))
        object.__setattr__(self, "k", _k(self.k))
        self._check_values()
        self._need(POSITIVE_INTEGERS, "at least 1", lambda value: value >= 1)
        self._need(COUNTS, "0 or more", lambda value: value >= 0)
        self._need(SHARES, "in [0, 1)", lambda value: 0 <= value < 1)
        self._need(POSITIVE, "positive", lambda value: value > 0)
        if self.resolution % self.patch_size:
            raise ValueError(
                f"resolution must be a multiple of patch_size {self.patch_size}, "
                f"got {self.resolution}"
            )

        if not 0 < self.k_start < 1:
            raise ValueError(f"k_start must be strictly between 0 and 1, got {self.k_start}")
        if self.k_freeze > self.steps:
            raise ValueError(f"k_freeze must be at most steps {self.steps}, got {self.k_freeze}")

    @property
    def dimension(self) -> float:
        """``augment_dim`` as a number."""
        return float(self.augment_dim)


def _augment_dim(value: Any) -> float:
    try:
        return check_augment_dim(float(value))
    except (TypeError, ValueError):
        raise ValueError(
            f"augment_dim must be a positive number, or inf for Gaussian noise, got {value!r}"
        ) from None


def _k(value: Any) -> str:
    if value in K_WORDS:
        return str(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 1:
        raise ValueError(f"k must be {', '.join(K_WORDS)} or a number in [0, 1], got {value!r}")
    return repr(number)
