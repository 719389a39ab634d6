r"""Fine-tune a pipeline for any reward without gradients, by evolution strategies (EGGROLL).

python scripts/finetune_eggroll.py --out runs/smooth                (embedded model, JPEG size)
python scripts/finetune_eggroll.py --reward class-correct --out runs/clear
accelerate launch --num_processes 2 scripts/finetune_eggroll.py --out runs/smooth     (two cores)
python scripts/finetune_eggroll.py --model my/sd3.5 --prompts prompts.txt --reward pickscore \
    --sigma 0.001 --save-lora-rank 32 --out runs/pick

The same command goes on where a stopped run was. OUT/model is the pipeline with its new weights,
OUT/grid.png shows the same images before and after, OUT/curves.png the rewards.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import _cli
import torch
from _config_options import add_config_options, read_config
from _finetune import REWARDS, add_run_options, prompts_of

from diffsteer.pipelines import load_pipeline, model_digest
from diffsteer.training.eggroll import (
    EggrollConfig,
    EggrollTrainer,
    draw_curves,
    process_state,
    save_result,
)
from diffsteer.training.rewards import load_rewards


def parser() -> argparse.ArgumentParser:
    parser = _cli.new_parser(__doc__, usage="--out OUT [options]")
    add = parser.add_argument
    add("--reward", default=["jpeg"], **REWARDS, help="what to raise (default: jpeg)")
    add_run_options(parser)
    _cli.add_dtype_option(parser)
    add("--threads", type=int, help="CPU threads of each process")
    add_config_options(parser, EggrollConfig)
    return parser


def build(args: argparse.Namespace, config: EggrollConfig, state: Any) -> EggrollTrainer:
    device = args.device if args.device and state.num_processes == 1 else state.device
    dtype = _cli.dtype_for(args.dtype, device)
    pipe = load_pipeline(args.model, dtype=dtype, device=device, revision=args.revision)
    rewards = load_rewards(args.reward, device=device)
    held_out = load_rewards(args.held_out, device=device) if args.held_out else None
    notes = {
        "model": args.model,
        "revision": args.revision,
        "model_digest": model_digest(args.model),
        "reward": args.reward,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return EggrollTrainer(
        config, pipe, rewards, prompts_of(pipe, args), args.out, held_out=held_out,
        call=args.call, notes=notes, allow_change=tuple(args.allow_change),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.save_only and not (args.out / "config.json").exists():
        raise ValueError(f"--save-only: there is no run in {args.out}")
    config = read_config(args, EggrollConfig)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    trainer = build(args, config, process_state(cpu=args.device == "cpu"))
    if not args.save_only and not trainer.run():
        raise KeyboardInterrupt  # stopped by a signal: reported as every script does
    if not trainer.main:
        return
    found = save_result(
        trainer.pipe, trainer.eggroll, args.out, component=trainer.component,
        lora_rank=config.save_lora_rank,
    )  # fmt: skip
    picture = draw_curves(args.out)
    print(
        f"{args.out / 'model'} after {trainer.eggroll.generation} generations; {args.out}/grid.png"
    )
    if picture is not None:
        print(f"curves: {picture}")
    if found is not None:
        print(f"LoRA of rank {config.save_lora_rank}: {found.energy:.1%} of the change")


if __name__ == "__main__":
    raise SystemExit(_cli.run(main))
