"""The training loop: each update a pure function of the state before it and its number."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import save_checkpoint
from .config import TrainConfig
from .data import EpochOrder, Images, derive_seed
from .draws import Batch, Objective, draw_batch
from .ema import ExponentialMovingAverage
from .flow import FlowMatching
from .network import as_network, build_transformer, quick_attention, train_mode, with_dtype
from .preview import preview
from .run_folder import CURVE, append_line, check_run, newest_state, note_part, read_run
from .stopping import StopRequest

__all__ = ["Trainer", "averaged_model", "learning_rate_at", "make_objective"]


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then linear decay that would reach zero one update after the last."""
    rise = (step + 1) / config.warmup if config.warmup else 1.0
    fall = (config.steps - step) / max(1, config.steps - config.warmup)
    return config.learning_rate * min(1.0, rise, fall)


def make_objective(config: TrainConfig) -> FlowMatching:
    """The objective that the config names."""
    return FlowMatching(config.prediction, mean=config.sigma_mean, std=config.sigma_std)


def averaged_model(out: Path) -> nn.Module:
    """The network of the run in ``out`` with the averaged weights of its newest checkpoint.

    Raises:
        FileNotFoundError: there is no run, or it has no checkpoint yet.
        CheckpointError: the checkpoint is damaged.
    """
    config, names = read_run(out)
    state = newest_state(out)
    if state is None:
        raise FileNotFoundError(f"the training run in {out} has no checkpoint yet")
    model = build_transformer(config, len(names))
    model.load_state_dict(state["model"])
    ema = ExponentialMovingAverage(model, config.ema)
    ema.load_state_dict(state["ema"])
    ema.copy_to(model)
    return model.eval()


class Trainer:
    """A run in a folder, which goes on from its newest checkpoint.

    The folder holds config, checkpoints, curve, history and previews.

    Args:
        config: the settings.
        images: the data.
        out: the folder of the run.
        objective: what is learnt; None takes the one that ``config`` names.
        accelerator: an ``accelerate.Accelerator``; None makes one. One or many ranks (DDP); the
            batches do not depend on their number.
        allow_change: settings that may differ from those that a resumed run was started with.

    Raises:
        ValueError: ``batch_size`` cannot be split over ranks and passes.
        CheckpointError: ``out`` holds another run, or a damaged checkpoint.
    """

    def __init__(
        self,
        config: TrainConfig,
        images: Images,
        out: Path,
        *,
        objective: Objective | None = None,
        accelerator: Any = None,
        allow_change: tuple[str, ...] = (),
    ) -> None:
        self.config, self.images, self.out = config, images, out
        changed = check_run(out, config, images, allow_change)
        saved = newest_state(out)
        self.accelerator = accelerator or _accelerator(config, out)
        self.device: torch.device = self.accelerator.device
        parts = self.accelerator.num_processes * config.accumulate
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size must be a multiple of {parts} (ranks x accumulate), "
                f"got {config.batch_size}"
            )
        self.order = EpochOrder(len(images), config.seed)
        self.objective = objective or make_objective(config)
        self.step = 0
        self._build()
        if saved is not None:
            self._load(saved)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            note_part(out, config, images, step=self.step, changed=changed)

    def _build(self) -> None:
        config = self.config
        torch.manual_seed(derive_seed(config.seed, "weights"))
        self.model = build_transformer(config, len(self.images.names)).to(self.device)
        train_mode(self.model)
        self.ema = ExponentialMovingAverage(self.model, config.ema)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        # Summed on the device: reading the loss at every update would stall it.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        if config.compile:
            self.model.compile()
        self.runner: nn.Module = self.accelerator.prepare_model(self.model)
        self.network = as_network(self.runner, bf16=config.precision == "bf16")

    def run(self) -> bool:
        """Train to ``config.steps``; False where a signal stopped it before, with a checkpoint.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        from tqdm.auto import tqdm

        total, main = self.config.steps, self.accelerator.is_main_process
        # disable=None: no bar where the output is no terminal
        bar = tqdm(total=total, initial=self.step, unit="step", disable=None if main else True)
        clock = (self.step, time.monotonic())
        with bar, StopRequest() as stop:
            while self.step < total:
                norm = self.update()
                bar.update()
                logged = self._due(self.config.log_every)
                if logged:
                    clock = self._log(norm, clock, bar.set_postfix)
                self._keep()
                # Ranks must agree on when to stop; asking at every step would stall the devices.
                if (logged or self.accelerator.num_processes == 1) and self._agree(stop.asked):
                    if not self._due(self.config.checkpoint_every):
                        self.checkpoint()
                    break
        if self.config.log_with:
            self.accelerator.end_training()
        return self.step >= total

    def update(self) -> Tensor:
        """One update of the weights and of their average; returns the norm of the gradient, ()."""
        config, rank = self.config, self.accelerator.process_index
        batch = draw_batch(
            self.step,
            images=self.images,
            order=self.order,
            objective=self.objective,
            batch_size=config.batch_size,
            seed=config.seed,
            flip=config.flip,
            label_dropout=config.label_dropout,
            device=self.device,
        ).part(rank, self.accelerator.num_processes)
        # What the layers themselves draw (dropout) is a function of the step as well.
        torch.manual_seed(derive_seed(config.seed, "layers", self.step, rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, config)
        for index in range(config.accumulate):
            last = index == config.accumulate - 1
            self.loss_sum += self._backward(batch.part(index, config.accumulate), last)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model, self.step)
        self.step += 1
        return norm

    def checkpoint(self) -> None:
        """Write the whole state; called on every rank."""
        loss_sum = self.accelerator.reduce(self.loss_sum.clone(), "mean")
        if self.accelerator.is_main_process:
            state = {
                "step": self.step,
                "model": self.model.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "loss_sum": loss_sum,
            }
            save_checkpoint(self.out / "checkpoints", self.step, state)
        self.accelerator.wait_for_everyone()

    def average(self) -> nn.Module:
        """A copy of the network with the averaged weights, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            model = build_transformer(self.config, len(self.images.names)).to(self.device)
        model.load_state_dict(self.model.state_dict())
        self.ema.copy_to(model)
        return model.eval()

    def _backward(self, batch: Batch, last: bool) -> Tensor:
        context = nullcontext() if last else self.accelerator.no_sync(self.runner)
        with context, quick_attention(self.device):
            losses = self.objective(
                self.network, batch.clean, batch.noise, batch.level, batch.labels
            )
            loss = losses.mean() / self.config.accumulate
            loss.backward()
        return loss.detach()

    def _load(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.loss_sum.copy_(saved["loss_sum"])
        self.step = saved["step"]

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _agree(self, asked: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return asked
        flag = torch.tensor(float(asked), device=self.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _keep(self) -> None:
        """Whatever is due after this step: weak weights, checkpoint, preview."""
        config, main = self.config, self.accelerator.is_main_process
        if main and self.step == config.weak_at:
            weak = with_dtype(self.average(), config.save_dtype)
            weak.save_pretrained(self.out / "weak")  # type: ignore[operator]
        if self._due(config.checkpoint_every):
            self.checkpoint()
        if main and config.preview_every and self._due(config.preview_every):
            preview(
                as_network(self.average(), bf16=config.precision == "bf16"),
                self.out / "previews" / f"step-{self.step:08d}.png",
                classes=len(self.images.names),
                resolution=config.resolution,
                kind=make_objective(config).kind,
                device=self.device,
            )

    def _log(
        self, norm: Tensor, clock: tuple[int, float], show: Callable[..., None]
    ) -> tuple[int, float]:
        """One line of the curve: the mean loss since the line before."""
        config, now = self.config, time.monotonic()
        window = self.step % config.log_every or config.log_every
        loss = float(self.accelerator.reduce(self.loss_sum, "mean")) / window
        self.loss_sum.zero_()
        if not torch.isfinite(torch.tensor(loss)):
            raise FloatingPointError(
                f"the loss is {loss} after {self.step} updates; go on from the last checkpoint "
                "with a lower rate (--learning-rate, --allow-change learning_rate)"
            )
        line = {
            "step": self.step,
            "loss": loss,
            "gradient_norm": float(norm),
            "learning_rate": learning_rate_at(self.step - 1, config),
            "images_per_second": (self.step - clock[0]) * config.batch_size / (now - clock[1]),
            "unix_time": round(time.time()),
        }
        if self.accelerator.is_main_process:
            append_line(self.out / CURVE, line)
        show(loss=f"{loss:.4f}")
        if config.log_with:
            values = {name: line[name] for name in ("loss", "gradient_norm", "learning_rate")}
            self.accelerator.log(values, step=self.step)
        return self.step, now


def _accelerator(config: TrainConfig, out: Path) -> Any:
    from accelerate import Accelerator

    # Autocast is done in `as_network`, around the network alone, whatever the launcher says.
    accelerator = Accelerator(
        mixed_precision="no", log_with=config.log_with or None, project_dir=str(out)
    )
    if config.log_with:
        accelerator.init_trackers("diffsteer", config=asdict(config))
    return accelerator
