"""The training loop: each update a pure function of the state before it and its number."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.prediction import Kind
from .checkpoint import save_checkpoint
from .config import TrainConfig
from .data import EpochOrder, Images, derive_seed
from .draws import Batch, Objective, draw_batch
from .ema import ExponentialMovingAverage
from .evaluation import evaluation_during
from .launch import agree, make_accelerator
from .learned_k import KTraining
from .network import as_network, build_transformer, quick_attention, train_mode, with_dtype
from .objectives import make_objective, starting_k
from .preview import preview
from .result import describe_target, make_pipeline, save_weak
from .run_folder import CURVE, SCORES, append_line, check_run, newest_state, note_part
from .stopping import StopRequest
from .warm_start import warm_start

__all__ = ["Trainer", "learning_rate_at"]


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then linear decay that would reach zero one update after the last."""
    rise = (step + 1) / config.warmup if config.warmup else 1.0
    fall = (config.steps - step) / max(1, config.steps - config.warmup)
    return config.learning_rate * min(1.0, rise, fall)


class Trainer:
    """A run in a folder, which goes on from its newest checkpoint.

    The folder holds config, checkpoints, curve, history, previews and scores.

    Args:
        config: the settings.
        images: the data.
        out: the folder of the run.
        objective: what is learnt; None takes the one that ``config`` names.
        accelerator: an ``accelerate.Accelerator``; None makes one. One or many ranks (DDP); the
            batches do not depend on their number.
        allow_change: settings that may differ from those that a resumed run was started with.

    Raises:
        ValueError: ``batch_size`` cannot be split over ranks and passes, or the weights to start
            from do not fit.
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
        self.accelerator = accelerator or make_accelerator(config, out)
        self.device: torch.device = self.accelerator.device
        parts = self.accelerator.num_processes * config.accumulate
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size must be a multiple of {parts} (ranks x accumulate), "
                f"got {config.batch_size}"
            )
        self.order = EpochOrder(len(images), config.seed)
        if objective is None:
            objective = make_objective(config, starting_k(config, images, saved))
        self.objective = objective
        self.step = 0
        self._build()
        if saved is not None:
            self._load(saved)
        elif config.init:
            warm_start(self.model, config.init, self.kind())
            self.ema = ExponentialMovingAverage(self.model, config.ema)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            note_part(out, config, images, step=self.step, changed=changed)

    def _build(self) -> None:
        config = self.config
        torch.manual_seed(derive_seed(config.seed, "weights"))
        self.model = build_transformer(config, len(self.images.names)).to(self.device)
        train_mode(self.model)
        self.ema = ExponentialMovingAverage(self.model, config.ema)
        learned = getattr(self.objective, "learned", None)
        self.k = KTraining(learned if learned is None else learned.to(self.device), config)
        self.optimizer = torch.optim.AdamW(
            [{"params": list(self.model.parameters())}, *self.k.groups()],
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
        self.evaluate = evaluation_during(config, self.images, self.pipeline)

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
                self._score(bar.set_description)
                # Ranks must agree on when to stop; asking at every step would stall the devices.
                asks = logged or self.accelerator.num_processes == 1
                if asks and agree(self.accelerator, stop.asked):
                    if not self._due(self.config.checkpoint_every):
                        self.checkpoint()
                    break
        if self.config.log_with:
            self.accelerator.end_training()
        return self.step >= total

    def update(self) -> Tensor:
        """One update of the weights and of their average; returns the norm of the gradient, ()."""
        config, rank = self.config, self.accelerator.process_index
        if self.k.begin_update(self.step):
            self.ema = ExponentialMovingAverage(self.model, config.ema)
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
        self.optimizer.param_groups[0]["lr"] = learning_rate_at(self.step, config)
        for index in range(config.accumulate):
            last = index == config.accumulate - 1
            self.loss_sum += self._backward(batch.part(index, config.accumulate), last)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.k.share_gradient(self.accelerator)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model, self.step - self.k.average_from(self.step))
        self.k.end_update(self.step)
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
                "target": self.target(),
                "learned_k": self.k.state_dict(),
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

    def kind(self) -> Kind:
        """What the averaged network predicts; with a learned k, at its average."""
        k = self.k.average()
        if k is not None:
            return Kind.kdiff(k)
        kind: Kind = getattr(self.objective, "kind", Kind(self.config.prediction))
        return kind

    def target(self) -> dict[str, Any]:
        """What the averaged network predicts and on which noise, as a pipeline is told."""
        return describe_target(self.kind(), getattr(self.objective, "augment_dim", math.inf))

    def pipeline(self) -> Any:
        """A pipeline of a copy of the averaged weights, in the precision of the training."""
        name = "bfloat16" if self.config.precision == "bf16" else "float32"
        model = with_dtype(self.average(), name)
        pipe = make_pipeline(model, self.target(), self.images.names)
        pipe.set_progress_bar_config(disable=True)
        return pipe

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
        self.k.load_state_dict(saved.get("learned_k") or {})
        self.step = saved["step"]

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _keep(self) -> None:
        """Whatever is due after this step: weak weights, checkpoint, preview."""
        config, main = self.config, self.accelerator.is_main_process
        if main and self.step == config.weak_at:
            weak = with_dtype(self.average(), config.save_dtype)
            save_weak(weak, self.out / "weak", self.target())
        if self._due(config.checkpoint_every):
            self.checkpoint()
        if main and config.preview_every and self._due(config.preview_every):
            preview(self.pipeline(), self.out / "previews" / f"step-{self.step:08d}.png")

    def _score(self, say: Callable[[str], None]) -> None:
        """Whatever evaluation is due after this step: a line of the scores."""
        values = self.evaluate(self.step)
        if values and self.accelerator.is_main_process:
            append_line(self.out / SCORES, {"step": self.step, **values})
            shown = ", ".join(f"{k.removeprefix('eval/')} {v:.4g}" for k, v in values.items())
            say(shown)
        if values and self.config.log_with:
            self.accelerator.log(values, step=self.step)

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
            **self.k.line(),
        }
        if self.accelerator.is_main_process:
            append_line(self.out / CURVE, line)
        show(loss=f"{loss:.4f}", **{name: f"{k:.4f}" for name, k in self.k.line().items()})
        if config.log_with:
            logged = ("loss", "gradient_norm", "learning_rate", "k")
            values = {name: line[name] for name in logged if name in line}
            self.accelerator.log(values, step=self.step)
        return self.step, now
