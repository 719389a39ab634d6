"""What a training run is: one flat, frozen dataclass, from which the command line is derived."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


def option(default: Any, text: str, *, free: bool = False, choices: tuple[str, ...] = ()) -> Any:
    """A field with its help text; ``free`` ones may change between the parts of a resumed run."""
    return field(default=default, metadata={"help": text, "free": free, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """A training run; the defaults make the embedded CIFAR-10 model."""

    data: str = option("uoft-cs/cifar10", "parquet file or folder, folder of class folders, or hub dataset", free=True)
    split: str = option("train", "split of the data")
    resolution: int = option(32, "side of the square images")
    flip: bool = option(True, "mirror half of the images")

    objective: str = option("flow", "what is learnt", choices=("flow",))
    prediction: str = option("denoised", "what the network predicts", choices=("denoised", "velocity"))
    sigma_mean: float = option(0.4, "mean of the logit of the noise level")
    sigma_std: float = option(0.8, "standard deviation of the logit of the noise level")
    label_dropout: float = option(0.1, "share of labels replaced by the null class")

    patch_size: int = option(4, "side of the transformer's patches")
    layers: int = option(5, "transformer blocks")
    heads: int = option(3, "attention heads")
    head_dim: int = option(64, "channels of a head")

    steps: int = option(7500, "updates; the learning rate decays to zero over them")
    batch_size: int = option(128, "images an update, over all ranks")
    accumulate: int = option(1, "passes an update on each rank", free=True)
    learning_rate: float = option(1.5e-3, "AdamW's learning rate after warm-up")
    beta2: float = option(0.95, "AdamW's second beta")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    warmup: int = option(300, "updates of linear warm-up")
    clip: float = option(1.0, "largest norm of the gradient")
    ema: float = option(0.999, "decay of the averaged weights")
    precision: str = option("bf16", "arithmetic of the network", choices=("bf16", "fp32"))
    compile: bool = option(False, "torch.compile the network", free=True)
    seed: int = option(0, "seed of the weights, the order and all noise")

    weak_at: int = option(0, "keep the averaged weights of this step for autoguidance; 0: none")
    checkpoint_every: int = option(300, "updates between checkpoints", free=True)
    preview_every: int = option(1000, "updates between sample grids; 0: none", free=True)
    log_every: int = option(20, "updates between lines of loss.jsonl", free=True)
    log_with: str = option("", "tracker of accelerate, such as tensorboard or wandb", free=True)

    def __post_init__(self) -> None:
        for name in ("resolution", "patch_size", "layers", "heads", "head_dim", "steps", "batch_size", "accumulate",
                     "checkpoint_every", "log_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("label_dropout", "ema", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("learning_rate", "clip", "sigma_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.resolution % self.patch_size:
            raise ValueError(f"resolution {self.resolution} is no multiple of patch_size {self.patch_size}")
        for item in fields(self):
            choices = item.metadata["choices"]
            if choices and getattr(self, item.name) not in choices:
                raise ValueError(f"{item.name} must be one of {choices}, got {getattr(self, item.name)!r}")

    def changes(self, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Fields that a resumed run may not change and that differ: name to (saved, now)."""
        now = asdict(self)
        bound = [item.name for item in fields(self) if not item.metadata["free"]]
        return {name: (saved.get(name), now[name]) for name in bound if saved.get(name) != now[name]}
