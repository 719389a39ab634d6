"""Fine-tune a pipeline by evolution strategies: any reward, no gradients, scalars between ranks."""

from __future__ import annotations

import io
import logging
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from ..prompts import Prompt
from ..rewards import RewardError, RewardSet
from ..stopping import StopRequest
from .config import EggrollConfig
from .hub import Hub, process_state
from .log import FitnessLog, as_float32, log_header, replay
from .members import MemberSampler, Scored
from .messages import Messages
from .optimizer import Eggroll
from .questions import Questions, draw_questions
from .records import Records
from .report import Report
from .shaping import Shaped

__all__ = ["EggrollTrainer", "make_eggroll"]

logger = logging.getLogger(__name__)
LOG = "fitness_log.jsonl"
HEAD = "<Q?"  # of a message: the hash of the weights, and whether the rank was asked to stop
HEAD_SIZE = struct.calcsize(HEAD)


def make_eggroll(model: nn.Module, config: EggrollConfig) -> Eggroll:
    """The optimizer that a config describes, on a model that is put into evaluation mode."""
    return Eggroll(
        model.eval(),
        **{
            name: getattr(config, name)
            for name in (
                *("sigma", "lr", "population_size", "rank", "seed", "antithetic", "noise_kind"),
                *("noise_reuse", "fitness_shaping", "optimizer", "evolve_bias", "sigma_decay"),
                *("lr_decay", "delta_decay", "mode", "offload"),
            )
        },
        max_step_norm=config.max_step_norm or None,
        max_delta_norm=config.max_delta_norm or None,
        **config.layers(),
    )


class EggrollTrainer:
    """A run in a folder: goes on from its newest checkpoint and its fitness log.

    The pipeline's denoiser is updated in place; between steps it holds the mean of the population.
    Every rank holds the model, takes its share of the members, and makes the same update.

    Args:
        config: the settings.
        pipe: any diffusers pipeline that denoises in a loop; on this rank's device.
        rewards: what to maximise.
        prompts: what members are asked for.
        out: the folder of the run, the same for all ranks.
        held_out: rewards that are only watched.
        call: further arguments of the pipeline's call, such as height or max_sequence_length.
        component: the part that evolves; None takes "transformer" or "unet".
        notes: what else makes the run what it is (the model's name or digest ...); plain values.
        hub: how ranks exchange; None asks ``accelerate``.
        allow_change: settings that may differ from those that a resumed run was started with.
        watch: called as ``watch(trainer, results)`` after each evaluation on rank 0.

    Raises:
        ValueError: the config does not fit the model or the pipeline.
        CheckpointError: ``out`` holds another run, or a damaged checkpoint or log.
    """

    def __init__(
        self,
        config: EggrollConfig,
        pipe: Any,
        rewards: RewardSet,
        prompts: Sequence[Prompt],
        out: str | Path,
        *,
        held_out: RewardSet | None = None,
        call: Mapping[str, Any] | None = None,
        component: str | None = None,
        notes: Mapping[str, Any] | None = None,
        hub: Hub | None = None,
        allow_change: tuple[str, ...] = (),
        watch: Callable[[EggrollTrainer, dict[str, float]], None] | None = None,
    ) -> None:
        if not prompts:
            raise ValueError("prompts: give at least one")
        self.config, self.pipe, self.prompts = config, pipe, list(prompts)
        self.rewards, self.watch, self.out = rewards, watch, Path(out)
        self.component = component or find_component(pipe)
        self.hub = hub if hub is not None else _connect(config)
        self.main = self.hub.rank == 0
        self.eggroll = make_eggroll(getattr(pipe, self.component), config)
        self.sampler = MemberSampler(pipe, self.eggroll, rewards, config, call or {})
        self.messages = Messages(config, self.hub.ranks, self._group())
        about = {"prompts": [asdict(p) for p in self.prompts], "rewards": rewards.weights,
                 "call": dict(call or {}), **(notes or {})}  # fmt: skip
        self.records = Records(self.out, config, self.sampler, self.prompts, held_out, about)
        self.records.check(allow_change)
        self.log = FitnessLog(self.out / LOG)
        self.resumed_from = self._restore()
        if self.main:
            self.records.begin(self.eggroll.generation, ranks=self.hub.ranks)
            self.log.begin(log_header(self.eggroll), self.eggroll.generation)
        self.stop: StopRequest | None = None
        self.stopping = False  # a rank was asked to stop, and all know it

    def run(self) -> bool:
        """Make all generations; False where a signal stopped the run before, with a checkpoint.

        Raises:
            RewardError: no member of a generation got a score.
        """
        from tqdm.auto import tqdm

        done, total = self.eggroll.generation, self.config.steps
        bar = tqdm(total=total, initial=done, unit="step", disable=None if self.main else True)
        with bar, StopRequest() as stop:
            self.stop = stop
            while self.eggroll.generation < total and not self.stopping:
                _, line = self.step()
                bar.update()
                bar.set_postfix(reward=f"{line.get('reward', float('nan')):.4g}")
                if self.main and self._due(self.config.checkpoint_every):
                    self.checkpoint()
            finished = self.eggroll.generation >= total
            if self.main and finished:
                self._evaluate({})
            elif self.main:
                self.checkpoint()
        self.hub.finish(self.eggroll.generation)
        return finished

    def step(self) -> tuple[Report, dict[str, Any]]:
        """One generation: sample, score, exchange, log, update; what happened.

        Raises:
            RewardError: no member got a score.
        """
        generation, began = self.eggroll.generation, time.monotonic()
        sent, received = self.hub.sent, self.hub.received
        scored: Scored | None = None
        messages = self.hub.published(generation)
        if messages is None:
            asked = self._questions(generation)
            scored = self.sampler.evaluate(self.messages.members(self.hub.rank), asked)
            messages = self._exchange(generation, scored.table)
        else:
            logger.warning("generation %d went on without rank %d", generation, self.hub.rank)
        line = self._shape(generation, messages, scored)
        if self.main:
            line["bytes"] = [self.hub.sent - sent, self.hub.received - received]
            line["seconds"] = round(time.monotonic() - began, 3)
            if self.config.eval_every and generation % self.config.eval_every == 0:
                self._evaluate(line)
            self.log.append(line)
        values = torch.tensor(line["fitness"], dtype=torch.float32).double()
        report = self.eggroll.update(Shaped(values, line["count"], line["deviation"]))
        if self.main:
            self.records.curve({**line, **asdict(report)}, generation)
        return report, line

    def checkpoint(self) -> None:
        """Write the whole state; on rank 0."""
        state = {"step": self.eggroll.generation, "eggroll": self.eggroll.state_dict()}
        save_checkpoint(self.out / "checkpoints", self.eggroll.generation, state)

    def _restore(self) -> int:
        """Load the newest checkpoint and make the logged updates after it; where that leads."""
        found = list_checkpoints(self.out / "checkpoints")
        if found:
            self.eggroll.load_state_dict(load_checkpoint(found[-1])["eggroll"])
        if (self.out / LOG).exists():
            replay(self.eggroll, self.out / LOG, until=self.config.steps)
        return self.eggroll.generation

    def _group(self) -> int:
        """Members at once: fewer than would fit, if some rank would have none else."""
        questions = self._questions(0)
        size = self.sampler.group_size(len(questions))
        unit = 2 if self.config.antithetic and self.config.mode == "lowrank" else 1
        share = -(-self.config.population_size // (self.hub.ranks * unit)) * unit
        if self.config.member_batch_size == 0 and share < size:
            self.sampler.limit = size = share
        return size if unit == 1 and not self.config.antithetic else max(2, size)

    def _questions(self, generation: int) -> Questions:
        config = self.config
        return draw_questions(
            generation, self.prompts, count=config.prompts_per_step,
            repeats=config.images_per_prompt, seed=config.seed,
        )  # fmt: skip

    def _exchange(self, generation: int, table: Tensor) -> list[bytes]:
        """Send this rank's scores and the hash of its weights; heal it if they differ."""
        due = generation % self.config.hash_every == 0 and self.hub.ranks > 1
        own = self.eggroll.weights_hash() if due else 0
        asked = self.stop is not None and self.stop.asked
        head = struct.pack(HEAD, own, asked)
        messages = self.hub.exchange(generation, head + self.messages.encode(table))
        heads = [struct.unpack(HEAD, m[:HEAD_SIZE])[0] if m else 0 for m in messages]
        if self.main:
            wrong = [r for r, head in enumerate(heads) if due and messages[r] and head != own]
            if wrong:
                logger.warning("ranks %s have other weights at generation %d", wrong, generation)
                buffer = io.BytesIO()
                torch.save(self.eggroll.state_dict(), buffer)
                self.hub.put_state(generation, buffer.getvalue())
            messages = [b"" if r in wrong else m for r, m in enumerate(messages)]
            self.hub.publish(generation, messages)
        elif due and own and heads[0] != own:
            self._heal(generation)
        return messages

    def _heal(self, generation: int) -> None:
        state = self.hub.get_state(generation)
        if state is None:
            return  # rank 0 has not seen it yet: the next comparison will
        logger.warning("rank %d takes the weights of rank 0", self.hub.rank)
        self.eggroll.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))

    def _shape(
        self, generation: int, messages: list[bytes], scored: Scored | None
    ) -> dict[str, Any]:
        """The line of the log: what the update needs, and what people want to know."""
        bodies = [message[HEAD_SIZE:] for message in messages]
        self.stopping = any(m and struct.unpack(HEAD, m[:HEAD_SIZE])[1] for m in messages)
        shaped, means = self.messages.shaped(bodies, self._questions(generation).columns)
        if not shaped.count:
            why = scored.scores.require_some if scored is not None and scored.scores else None
            if why is not None:
                why()
            raise RewardError(f"no member of generation {generation} got a score on any rank")
        _, numbers = as_float32(shaped.values)
        line: dict[str, Any] = {
            "generation": generation, "count": shaped.count, "deviation": shaped.deviation,
            "fitness": numbers, "sigma": self.eggroll.sigma, "lr": self.eggroll.lr,
        }  # fmt: skip
        if generation % self.config.hash_every == 0:
            line["hash"] = f"{self.eggroll.weights_hash():016x}"
        missing = [rank for rank, body in enumerate(bodies) if not body]
        if missing:
            line["missing_ranks"] = missing
        known = ~means.isnan()
        if bool(known.any()):
            best, worst = means.nan_to_num(-torch.inf), means.nan_to_num(torch.inf)
            line |= {"reward": float(means[known].mean()), "best": int(best.argmax()),
                     "worst": int(worst.argmin())}  # fmt: skip
        if scored is not None and scored.scores is not None:
            line |= {f"{k}": v for k, v in scored.scores.summary().items() if "_failed" in k}
        return line

    def _evaluate(self, line: dict[str, Any]) -> None:
        results = self.records.evaluate(
            self.eggroll.generation, best=line.get("best"), worst=line.get("worst")
        )
        if self.watch is not None:
            self.watch(self, results)

    def _due(self, every: int) -> bool:
        return self.eggroll.generation == self.config.steps or self.eggroll.generation % every == 0


def find_component(pipe: Any) -> str:
    """The name of the pipeline's denoiser.

    Raises:
        TypeError: it has none of the usual names.
    """
    for name in ("transformer", "unet"):
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise TypeError(
        f"{type(pipe).__name__} has no transformer and no unet; name the part that evolves: "
        "component='...'"
    )


def _connect(config: EggrollConfig) -> Hub:
    return Hub.connect(process_state(), timeout=config.rank_timeout)
