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
from pathlib import Path
from typing import Any

import _cli
import torch
from _config_options import add_config_options, read_config

from diffsteer.pipelines import load_pipeline, model_digest, takes_classes
from diffsteer.training.eggroll import (
    EggrollConfig,
    EggrollTrainer,
    draw_curves,
    process_state,
    save_result,
)
from diffsteer.training.prompts import Prompt, class_prompts, read_prompts
from diffsteer.training.rewards import load_rewards


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --out OUT [options]   (--help lists them)",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the run; an unfinished run goes on")
    add("--model", default="embedded", help="embedded (default), a pipeline folder, or a hub id")
    add("--revision", help="branch, tag or commit of a hub id")
    more: dict[str, Any] = {"nargs": "+", "metavar": "REWARD[:OPTION=VALUE][@WEIGHT]"}
    add("--reward", default=["jpeg"], **more, help="what to raise (default: jpeg); docs/rewards.md")
    add("--held-out", **more, help="what to watch without training on it")
    add("--prompts", type=Path, help="text file, or JSONL of {prompt, metadata}")
    add("--classes", help="class names or numbers by commas, for models that take classes")
    add(
        "--call",
        type=_cli.json_mapping,
        default={},
        help="JSON of further arguments of the pipeline",
    )
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", default="auto", choices=dtypes, help="auto: bfloat16, but float32 on the CPU")
    add(
        "--device",
        type=_cli.device_name,
        help="cpu, cuda, ... (default: the accelerator if there is one)",
    )
    add("--threads", type=int, help="CPU threads of each process")
    named: dict[str, Any] = {"nargs": "+", "default": [], "metavar": "SETTING"}
    add("--allow-change", **named, help="what may differ on resuming")
    add("--save-only", action="store_true", help="save what the run has reached, train nothing")
    add("--traceback", action="store_true", help="show where an error comes from")
    add_config_options(parser, EggrollConfig)
    return parser


def prompts_from(args: argparse.Namespace, pipe: Any) -> list[Prompt]:
    if takes_classes(pipe) and not args.prompts:
        names = args.classes.split(",") if args.classes else None
        classes = [int(n) if n.strip().isdigit() else n.strip() for n in names] if names else None
        return class_prompts(pipe, classes)
    if takes_classes(pipe) or args.classes or not args.prompts:
        wanted = (
            "classes: give --classes" if takes_classes(pipe) else "prompts: give --prompts FILE"
        )
        raise ValueError(f"{type(pipe).__name__} takes {wanted}")
    return read_prompts(args.prompts)


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
        config, pipe, rewards, prompts_from(args, pipe), args.out, held_out=held_out,
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
