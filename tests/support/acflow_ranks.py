"""Fine-tune in forked gloo processes: acflow_ranks.py RANKS JOB [JOB ...], each JOB as JSON.

The processes are forked from one that has imported everything, and find each other through the
environment variables that ``accelerate launch`` sets.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import sys
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny_flow import tiny_pipeline
from tiny_pipelines import build

from diffsteer.training.acflow import ACFlowConfig, ACFlowTrainer, GRPOConfig, GRPOTrainer
from diffsteer.training.acflow.accelerators import make_accelerator
from diffsteer.training.acflow.sharding import is_sharded, whole
from diffsteer.training.prompts import Prompt, class_prompts
from diffsteer.training.rewards import Brightness, RewardSet

SMALL = {
    "prompts_per_epoch": 2, "images_per_prompt": 4, "sample_steps": 3, "sample_batch": 4,
    "epochs": 4, "warmup_min": 1, "warmup_max": 1, "ramp": 1, "eval_images": 0,
    "checkpoint_every": 2, "precision": "fp32", "tune": "full", "rank": 2, "learning_rate": 1e-3,
    "critic_width": 8,
}  # fmt: skip
PROMPTS = [Prompt("a red fox"), Prompt("two blue birds")]
# What `accelerate launch` sets, with its own defaults: --use_fsdp --fsdp_version 2.
LAUNCHES: dict[str, dict[str, str]] = {"ddp": {}}
LAUNCHES["fsdp"] = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_FORWARD_PREFETCH": "false", "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}  # fmt: skip
LAUNCHES["zero"] = {  # --use_deepspeed --zero_stage 2
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "DS_ACCELERATOR": "cpu",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A run: a tiny class-conditional model, or a tiny SD3 in bfloat16.

    ``again`` names a folder in which a rerun goes on from the checkpoint before the last.
    """

    out: str
    config: dict[str, Any]
    launch: str = "ddp"
    grpo: bool = False
    sd3: bool = False
    again: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def json(self) -> str:
        return json.dumps(asdict(self))

    def pipe(self) -> Any:
        if not self.sd3:
            return tiny_pipeline("denoised")
        pipe = build("sd3", torch.bfloat16).pipe
        pipe.vae.register_to_config(shift_factor=0.1)
        return pipe

    def trainer(self, accelerator: Any = None, out: str = "") -> ACFlowTrainer:
        kind, settings = (GRPOTrainer, GRPOConfig) if self.grpo else (ACFlowTrainer, ACFlowConfig)
        config = settings(**{**SMALL, **self.config})
        pipe, rewards = self.pipe(), RewardSet({"bright": Brightness()})
        prompts = class_prompts(pipe, range(4)) if not self.sd3 else PROMPTS
        call = {"height": 16, "width": 16, "max_sequence_length": 16} if self.sd3 else {}
        return kind(
            config, pipe, prompts, rewards, out or self.out, call=call, accelerator=accelerator
        )


def accelerator_of(job: Job) -> Any:
    """As in a launch on GPUs: accelerate takes FSDP and DeepSpeed on no CPU, so it is lied to.

    That these are GPUs is all that is untrue for FSDP; its plugin and what follows are accelerate's
    own doing. DeepSpeed's plugin is made here, with what accelerate makes of it.
    """
    from accelerate.state import AcceleratorState, DistributedType, PartialState
    from accelerate.utils import DeepSpeedPlugin

    if job.launch == "fsdp":
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = make_accelerator(ACFlowConfig(), Path(job.out))
    if job.launch == "zero":
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.DEEPSPEED
        plugin = DeepSpeedPlugin()
        accelerator.state.deepspeed_plugins = {"default": plugin}
        plugin.set_mixed_precision("no")
        plugin.select(_from_accelerator_state=True)
    names = {"ddp": "MULTI_CPU", "fsdp": "FSDP", "zero": "DEEPSPEED"}
    assert accelerator.distributed_type == names[job.launch]
    assert is_sharded(accelerator) == (job.launch == "fsdp") and accelerator.device.type == "cpu"
    return accelerator


def state_of(run: ACFlowTrainer) -> dict[str, Any]:
    learner = run.learner.state_dict()
    return whole({name: learner[name] for name in ("policy", "ema", "optimizer")})


def check_cut(run: ACFlowTrainer) -> None:
    """Every parameter, average and moment rests as a shard of its own."""
    learner = run.learner
    assert is_sharded(run.accelerator)
    tensors = [p for module in learner.policy.modules for p in module.parameters()]
    tensors += learner.ema.state_dict().values()
    tensors += [v for s in learner.optimizer.state.values() for v in s.values() if v.ndim]
    mine = sum(tensor.to_local().numel() for tensor in tensors)
    everyone = sum(tensor.numel() for tensor in tensors)
    assert mine < 0.6 * everyone
    units = [p for p in run.learner.policy.module.modules() if hasattr(p, "unshard")]
    assert len(units) > 1


def rerun(job: Job, run: ACFlowTrainer) -> None:
    """From the checkpoint before the last one to the same weights, bit for bit."""
    if run.accelerator.is_main_process:
        shutil.copytree(job.out, job.again)
        shutil.rmtree(max((Path(job.again) / "checkpoints").glob("step-*")))
    run.accelerator.wait_for_everyone()
    again = job.trainer(run.accelerator, job.again)
    assert again.progress.epoch == run.progress.epoch - 1
    assert again.run()
    torch.testing.assert_close(state_of(again), state_of(run), rtol=0, atol=0)


def work(rank: int, ranks: int, port: int, job: Job) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        **LAUNCHES[job.launch], **job.environment,
    }  # fmt: skip
    status = 1
    try:
        run = job.trainer(accelerator_of(job))
        assert run.accelerator.num_processes == ranks
        assert run.run()
        if job.launch == "fsdp":
            check_cut(run)
        run.save()
        if job.again:
            rerun(job, run)
        run.accelerator.wait_for_everyone()
        run.accelerator.state.destroy_process_group()
        status = 0
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)  # a fork that ends in the ordinary way waits for threads it does not have


def main(ranks: int, jobs: list[str]) -> int:
    context, worst = multiprocessing.get_context("fork"), 0
    for job in [Job(**json.loads(text)) for text in jobs]:
        with socket.socket() as place:
            place.bind(("localhost", 0))
            port = int(place.getsockname()[1])
        workers = [
            context.Process(target=work, args=(rank, ranks, port, job)) for rank in range(ranks)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(240)
            worst = max(worst, 1 if worker.exitcode is None else abs(worker.exitcode))
            worker.kill()
    return worst


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), sys.argv[2:]))
