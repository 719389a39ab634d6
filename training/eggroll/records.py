"""What a run writes beside its state: settings, history, curves, evaluations and pictures."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from ...eval.decode import as_uint8
from ...pipelines.files import write_png
from ...pipelines.grid import image_grid
from ..checkpoint import CheckpointError, write_json
from ..prompts import Prompt
from ..rewards import RewardScores, RewardSet
from ..run_folder import append_line, check_free, read_lines
from .config import EggrollConfig
from .members import MemberSampler
from .questions import Questions, fixed_questions

__all__ = ["Records"]

CONFIG, HISTORY, CURVE, EVALUATION = "config.json", "history.jsonl", "curve.jsonl", "eval.jsonl"
START = "start.pt"


class Records:
    """The readable part of a run's folder; rank 0 writes it.

    Args:
        out: the folder.
        config: the settings.
        sampler: for evaluations.
        prompts: what is evaluated, in turn.
        held_out: rewards that are only watched.
        about: what else makes the run what it is, as plain values.
    """

    def __init__(
        self,
        out: Path,
        config: EggrollConfig,
        sampler: MemberSampler,
        prompts: Sequence[Prompt],
        held_out: RewardSet | None,
        about: dict[str, Any],
    ) -> None:
        self.out, self.config, self.sampler = out, config, sampler
        self.held_out, self.about = held_out, json.loads(json.dumps(about, default=str))
        self.questions = fixed_questions(prompts, count=max(config.eval_images, 1))
        shown = min(config.preview_images, len(self.questions))
        self.shown = self.questions.part(slice(0, shown))
        self.changed: dict[str, Any] = {}
        self.tracker: Any = None

    def check(self, allow_change: tuple[str, ...]) -> None:
        """Refuse to go on with another run than the one in the folder.

        Raises:
            CheckpointError: a setting differs and may not; the message names it.
            ValueError: ``allow_change`` names no setting.
        """
        known = {**asdict(self.config), **self.about}
        for name in allow_change:
            if name not in known:
                raise ValueError(
                    f"allow_change names {name!r}; the settings are {', '.join(known)}"
                )
        path = self.out / CONFIG
        if not path.exists():
            check_free(self.out, begun=CONFIG)
            return
        try:
            saved = json.loads(path.read_text())
            before, about = saved["config"], saved["about"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); use another folder") from error
        self.changed = self.config.changes(before)
        for name, now in self.about.items():
            if about.get(name) != now:
                self.changed[name] = (about.get(name), now)
        for name, (old, now) in self.changed.items():
            if name not in allow_change:
                raise CheckpointError(
                    f"the run in {self.out} was started with {name}={_short(old)}, now it is "
                    f"{_short(now)}; use the old value, another folder, or --allow-change {name}"
                )

    def begin(self, generation: int, *, ranks: int) -> None:
        """Note that the run starts or goes on; drop the lines that will be written again."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / CONFIG, {"config": asdict(self.config), "about": self.about})
        part = {
            "from_generation": generation, "ranks": ranks, "unix_time": round(time.time()),
            "torch": torch.__version__, "diffusers": diffusers.__version__,
            "threads": torch.get_num_threads(), "changed": self.changed,
        }  # fmt: skip
        append_line(self.out / HISTORY, part)
        if self.config.log_with:
            from accelerate import Accelerator

            self.tracker = Accelerator(log_with=self.config.log_with, project_dir=str(self.out))
            self.tracker.init_trackers("diffsteer", config=asdict(self.config))
        for name in (CURVE, EVALUATION):
            path = self.out / name
            if path.exists():
                kept = [line for line in read_lines(path) if line["generation"] < generation]
                aside = path.with_name(f".{name}.{os.getpid()}")
                aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
                aside.replace(path)

    def curve(self, line: dict[str, Any], generation: int) -> None:
        """One line for people: the log's without the weights of the members."""
        short = {name: value for name, value in line.items() if name not in ("fitness", "hash")}
        append_line(self.out / CURVE, {**short, "generation": generation})
        if self.tracker is not None:
            numbers = {n: v for n, v in short.items() if isinstance(v, int | float)}
            self.tracker.log(numbers, step=generation)

    def evaluate(
        self, generation: int, *, best: int | None = None, worst: int | None = None
    ) -> dict[str, float]:
        """Score the mean parameters on the fixed images, and draw them beside two members.

        Args:
            generation: updates made so far.
            best: the member of the highest score of the coming update.
            worst: of the lowest.

        Returns:
            Scores by name: ``reward/...`` and ``held_out/...``.
        """
        scores: list[RewardScores] = []
        watched: list[RewardScores] = []
        first: list[Tensor] = []
        size = self.config.images_per_call
        for start in range(0, len(self.questions), size):
            part = self.questions.part(slice(start, start + size))
            images = self.sampler.sample(None, part)
            first.append(as_uint8(images[: max(0, len(self.shown) - start)]).cpu())
            texts, notes = [p.text for p in part.prompts], [p.metadata for p in part.prompts]
            scores.append(self.sampler.rewards.score(images, texts, notes))
            if self.held_out is not None:
                watched.append(self.held_out.score(images, texts, notes))
        results = RewardScores.cat(scores).summary()
        if watched:
            more = RewardScores.cat(watched).summary()
            results |= {
                name.replace("reward/", "held_out/", 1): value
                for name, value in more.items()
                if not name.startswith("reward/total")  # nobody weighted these
            }
        append_line(self.out / EVALUATION, {"generation": generation, **results})
        if self.tracker is not None:
            self.tracker.log({f"eval/{n}": v for n, v in results.items()}, step=generation)
        self._picture(generation, torch.cat(first), best, worst)
        return results

    def _picture(self, generation: int, now: Tensor, best: int | None, worst: int | None) -> None:
        if not len(self.shown):
            return
        start = self.out / "previews" / START
        if generation == 0:
            start.parent.mkdir(parents=True, exist_ok=True)
            torch.save(now, start)
        rows = {}
        if generation and start.exists():
            rows["start"] = torch.load(start, weights_only=True)
        rows[f"step {generation}"] = now
        finished = best is None
        for name, member in (("best member", best), ("worst member", worst)):
            if member is not None:
                rows[name] = as_uint8(self.sampler.sample([member], self.shown)).cpu()
        sheet = _grid(rows, self.shown)
        name = "grid.png" if finished else f"previews/step-{generation:06d}.png"
        write_png(self.out / name, sheet)


def _grid(rows: dict[str, Tensor], shown: Questions) -> Image.Image:
    images = [
        Image.fromarray(image.permute(1, 2, 0).numpy()) for row in rows.values() for image in row
    ]
    heads = [prompt.text[:12] for prompt in shown.prompts]
    return image_grid(images, len(shown), heads=heads, rows=list(rows))


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 120 else text[:117] + "..."
