"""The training loop: sample, score, shape, update; an epoch is a function of the state before."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...eval.suite import EvalSuite
from ...pipelines.files import write_png
from ..checkpoint import save_checkpoint
from ..data import derive_seed
from ..prompts import Prompt
from ..rewards import RewardPool, RewardSet
from ..run_folder import append_line, newest_state
from ..stopping import StopRequest
from .accelerators import check_distribution, check_same_weights, make_accelerator
from .collect import Collected, collect, everyones_scores
from .config import ACFlowConfig
from .evaluation import Evaluation
from .export import save_result
from .learner import Learner
from .measures import check_finite, shown
from .plan import Plan, check_split, epoch_plan
from .policy import Policy, weights_digest
from .progress import Progress
from .run_files import LOG, check_same_run, note_start, prompts_digest
from .sampling import Sampler
from .sampling_weights import SamplingWeights
from .shaping import RewardShaper
from .sharding import is_sharded, whole
from .targets import make_targets

__all__ = ["ACFlowTrainer"]


class ACFlowTrainer:
    """A run of reward fine-tuning in a folder, which goes on from its newest checkpoint.

    Args:
        config: the settings.
        pipe: a flow-matching diffusers pipeline; its denoiser is trained in place.
        prompts: what to sample, see ``read_prompts`` and ``class_prompts``.
        rewards: what to raise.
        out: the folder of the run.
        held_out: rewards that are watched but not trained on.
        suite: metrics of evaluated images, such as ``EvalSuite(["fd", "diversity"])``.
        eval_prompts: what to evaluate on; ``prompts`` by default.
        call: further arguments of the pipeline's call, such as height and width.
        inputs: see `Sampler`.
        accelerator: an ``accelerate.Accelerator``; None makes one.
        allow_change: settings that may differ from those that a resumed run was started with.

    Attributes:
        progress: how far it has come.
        learner: what learns.

    Raises:
        ValueError: settings and number of ranks do not fit, the pipeline is not of flow matching,
            or the LoRA targets match nothing.
        NotImplementedError: the pipeline calls its denoiser in a way that cannot be repeated, or
            the launch cuts weights in a way that is not supported.
        CheckpointError: ``out`` holds another run, or a damaged checkpoint.
    """

    learner_class: type[Learner] = Learner

    def __init__(
        self,
        config: ACFlowConfig,
        pipe: Any,
        prompts: Sequence[Prompt],
        rewards: RewardSet,
        out: str | Path,
        *,
        held_out: RewardSet | None = None,
        suite: EvalSuite | None = None,
        eval_prompts: Sequence[Prompt] | None = None,
        call: Mapping[str, Any] | None = None,
        inputs: Callable[[Sequence[Prompt]], dict[str, Any]] | None = None,
        accelerator: Any = None,
        allow_change: Sequence[str] = (),
    ) -> None:
        self.config, self.pipe, self.prompts = config, pipe, list(prompts)
        self.rewards, self.out = rewards, Path(out)
        if not self.prompts:
            raise ValueError("prompts: give at least one")
        self.accelerator = accelerator or make_accelerator(config, self.out)
        check_distribution(self.accelerator)
        check_split(config, self.accelerator.num_processes)
        self.sampler = Sampler(pipe, config.guidance_scale, call or {}, inputs)
        check_same_weights(self.accelerator, pipe)
        base = self._inputs(call or {})
        changed = check_same_run(self.out, config, base, allow_change)
        self.progress = Progress(config)
        self.shaper = RewardShaper(
            config.reward_shaping, config.reward_limit, config.reward_momentum
        )
        self._build()
        self.evaluation = self._evaluation(list(eval_prompts or self.prompts), held_out, suite)
        saved = newest_state(self.out)
        if saved is not None:
            self._load(saved)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            note_start(self.out, config, base, epoch=self.progress.epoch, changed=changed)

    def _inputs(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """What beside the settings makes it the same run."""
        return {
            "base": weights_digest(self.sampler.denoiser),
            "prompts": prompts_digest(self.prompts),
            "rewards": dict(self.rewards.weights),
            "call": dict(call),
        }

    def _evaluation(
        self, prompts: list[Prompt], held_out: RewardSet | None, suite: EvalSuite | None
    ) -> Evaluation:
        config = self.config
        scale = 1.0 if config.train_cfg == "distil" else config.guidance_scale
        return Evaluation(
            self.sampler, prompts, config.eval_images, config.eval_steps, config.sample_batch,
            scale, self.rewards, held_out, suite, self.accelerator,
        )  # fmt: skip

    def _build(self) -> None:
        config, module = self.config, self.sampler.denoiser
        self.pipe.to(self.accelerator.device)
        self.pipe.set_progress_bar_config(disable=True)
        model, images, observed = self.sampler.learn(self.prompts)
        if is_sharded(self.accelerator):
            module.to("cpu")  # from where it goes to its device layer by layer, as shards
        policy = Policy(
            module,
            tune=config.tune,
            rank=config.rank,
            lora_alpha=config.lora_alpha,
            targets=config.targets,
            with_reference=config.alpha > 0,
            seed=derive_seed(config.seed, "adapters"),
        )
        if config.gradient_checkpointing:
            module.enable_gradient_checkpointing()  # type: ignore[operator]
        self.learner = self.learner_class(config, model, policy, observed, images, self.accelerator)
        self.weights = SamplingWeights(config, self.learner)

    def run(self) -> bool:
        """Train to ``config.epochs``; False where a signal stopped it before, with a checkpoint.

        Raises:
            FloatingPointError: a loss is no longer finite; the last checkpoint is untouched.
            RewardError: no image of an epoch got a score.
        """
        from tqdm.auto import tqdm

        config, progress = self.config, self.progress
        if progress.epoch == 0 and config.eval_images:
            self._log({"epoch": 0, "evaluation": self.judge("before")})
        # None: no bar where the output is no terminal
        hidden = None if self.accelerator.is_main_process else True
        bar = tqdm(total=config.epochs, initial=progress.epoch, unit="epoch", disable=hidden)
        pool = RewardPool(self.rewards, workers=config.reward_workers)
        with bar, StopRequest() as stop, pool:
            while not progress.over:
                line = self.run_epoch(pool)
                self._log(line)
                stopping = self._agree(stop.asked)
                if stopping or progress.due(config.checkpoint_every):
                    self.checkpoint()
                bar.update()
                bar.set_postfix(shown(line))
                if stopping:
                    break
        return progress.over

    def run_epoch(self, pool: RewardPool) -> dict[str, Any]:
        """Sample, score, shape and update; the line of the log. Ranks call it together."""
        config, progress, learner = self.config, self.progress, self.learner
        plan, rate, began = self.plan(progress.epoch), progress.rate, time.monotonic()
        with learner.precision():
            found = self._collect(plan, pool)
            sampled = time.monotonic()
            scores = everyones_scores(
                found.scores,
                plan,
                updates=config.updates_per_epoch,
                accelerator=self.accelerator,
            )
            targets = make_targets(
                scores,
                torch.tensor(plan.prompts),
                self.shaper,
                drop_constant=config.drop_constant,
                device=self.accelerator.device,
            )
            learner.learn(found.data, targets, epoch=progress.epoch, rate=rate)
        measured = learner.measures.read(self.accelerator, clip=config.advantage_clip)
        check_finite(measured, progress.epoch)
        passes = config.samples * found.data.evaluations + learner.pop_evaluations()
        progress.advance(measured, passes)
        line = {
            "epoch": progress.epoch,
            **scores.summary(),
            **measured,
            "rate": rate,
            "evaluations": progress.evaluations,
            "seconds": round(time.monotonic() - began, 3),
            "seconds_sampling": round(sampled - began, 3),
        }
        if config.eval_images and progress.due(config.eval_every):
            name = "after" if progress.over else f"epoch-{progress.epoch:05d}"
            line["evaluation"] = self.judge(name)
        return line

    def plan(self, epoch: int) -> Plan:
        """The prompts and seeds of an epoch."""
        config = self.config
        return epoch_plan(
            epoch,
            prompts=len(self.prompts),
            per_epoch=config.prompts_per_epoch,
            repeats=config.images_per_prompt,
            seed=config.seed,
        )

    @torch.no_grad()
    def judge(self, name: str) -> dict[str, float]:
        """Evaluate the averaged weights; the pictures go into the folder ``name`` of the run."""
        learner = self.learner
        with learner.policy.holding(learner.average()), learner.precision():
            judged = self.evaluation()
        if self.accelerator.is_main_process:
            for index, image in enumerate(judged.images):
                write_png(self.out / "samples" / name / f"{index:03d}.png", image)
        return judged.scores

    def checkpoint(self) -> None:
        """Write the whole state; called on every rank."""
        epoch, main = self.progress.epoch, self.accelerator.is_main_process
        state = {
            "step": epoch,
            "progress": self.progress.state_dict(),
            "learner": self.learner.state_dict(),
            "moments": self.shaper.state_dict(),
            "copy": self.weights.copy,
        }
        state = whole(state, keep=main)
        if main:
            save_checkpoint(self.out / "checkpoints", epoch, state)
        self.accelerator.wait_for_everyone()

    def save(self) -> Path | None:
        """Write the averaged weights as a LoRA or a pipeline; the folder, on the main rank."""
        learner = self.learner
        main = self.accelerator.is_main_process
        with learner.policy.holding(learner.average()):
            return save_result(self.pipe, learner.policy, self.out, write=main)

    def _collect(self, plan: Plan, pool: RewardPool) -> Collected:
        config, accelerator = self.config, self.accelerator
        mine = plan.mine(
            accelerator.process_index, accelerator.num_processes, config.updates_per_epoch
        )
        with self.learner.policy.holding(self.weights.at(self.progress.epoch)):
            return collect(
                self.sampler,
                pool,
                self.prompts,
                plan,
                mine,
                steps=config.sample_steps,
                batch=config.sample_batch,
                replace=self.learner.replace,
            )

    def _load(self, saved: dict[str, Any]) -> None:
        self.learner.load_state_dict(saved["learner"])
        self.shaper.load_state_dict(saved["moments"])
        self.weights.load(saved["copy"])
        self.progress.load_state_dict(saved["progress"])

    def _agree(self, asked: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return asked
        flag = torch.tensor(float(asked), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _log(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            append_line(self.out / LOG, line)
        if self.config.log_with:
            flat = line | {f"eval/{k}": v for k, v in line.get("evaluation", {}).items()}
            values = {k: v for k, v in flat.items() if isinstance(v, int | float)}
            self.accelerator.log(values, step=line["epoch"])
