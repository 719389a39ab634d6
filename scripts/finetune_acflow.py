r"""Fine-tune a flow model so that its images score higher: AC-Flow, its special cases, or GRPO.

    python scripts/finetune_acflow.py --out runs/bright --reward brightness
    python scripts/finetune_acflow.py --out runs/jpeg --reward jpeg --method orw --alpha 0.5
    accelerate launch scripts/finetune_acflow.py --out runs/sd3 --reward pickscore \
        --model stabilityai/stable-diffusion-3.5-medium --prompts prompts.txt \
        --call '{"height": 512, "width": 512}' --config sd3.yaml

The same command goes on where a stopped run was. OUT/lora is a LoRA for pipe.load_lora_weights;
OUT/model a pipeline folder where the pipeline has none. OUT/before_after.png shows the same
seeds before and after, OUT/curves.png and OUT/metrics.json the numbers.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _cli
import _config_options as options
from _finetune import REWARDS, add_run_options, prompts_of
from PIL import Image

from diffsteer.eval import EvalSuite
from diffsteer.pipelines import files, load_pipeline
from diffsteer.training.acflow import (
    METHODS,
    ACFlowConfig,
    ACFlowTrainer,
    GRPOConfig,
    GRPOTrainer,
)
from diffsteer.training.acflow.curves import draw_curves
from diffsteer.training.acflow.export import before_and_after
from diffsteer.training.acflow.run_files import read_log
from diffsteer.training.prompts import read_prompts
from diffsteer.training.rewards import load_rewards

# What suits the small model inside the package on two cores; the fields' defaults are for others.
EMBEDDED = {
    "tune": "full", "learning_rate": 1e-4, "epochs": 30, "prompts_per_epoch": 10,
    "images_per_prompt": 16, "sample_batch": 80, "sample_steps": 20, "updates_per_epoch": 2,
    "warmup_min": 3, "warmup_max": 5, "ramp": 2, "eval_every": 15, "eval_images": 200,
    "critic_width": 16,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    parser = _cli.new_parser(__doc__, usage="--out OUT --reward REWARD [options]")
    add = parser.add_argument
    add("--reward", required=True, **REWARDS, help="what to raise; also package.module:function")
    add_run_options(parser)
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the base weights")
    add("--method", default="acflow", choices=[*METHODS, "grpo"], help="sets other defaults")
    add("--eval-prompts", type=Path, help="prompts of evaluations (default: those of training)")
    add("--metrics", nargs="*", help="of evaluated images, such as fd diversity (needs the "
        "embedded model's reference); default: diversity for the embedded model")  # fmt: skip
    add("--overwrite", action="store_true", help="remove the run in --out and begin anew")
    options.add_config_options(parser, ACFlowConfig, GRPOConfig)
    return parser


def make_trainer(args: argparse.Namespace) -> ACFlowTrainer:
    """The run that the command line asks for."""
    grpo = args.method == "grpo"
    embedded = args.model == "embedded"
    settings = GRPOConfig if grpo else ACFlowConfig
    defaults = {**(EMBEDDED if embedded else {}), **({} if grpo else METHODS[args.method])}
    config = options.read_config(args, settings, defaults)
    device = args.device or _cli.default_device()
    rewards = load_rewards(args.reward, device=device)
    held_out = load_rewards(args.held_out, device=device) if args.held_out else None
    dtype = _cli.dtype_for(args.dtype, device)
    pipe = load_pipeline(args.model, dtype=dtype, device=device, revision=args.revision)
    metrics = (["diversity"] if embedded else []) if args.metrics is None else args.metrics
    trainer = GRPOTrainer if grpo else ACFlowTrainer
    return trainer(
        config,
        pipe,
        prompts_of(pipe, args),
        rewards,
        args.out,
        held_out=held_out,
        suite=EvalSuite(metrics) if metrics else None,
        eval_prompts=read_prompts(args.eval_prompts) if args.eval_prompts else None,
        call=args.call,
        accelerator=None,
        allow_change=args.allow_change,
    )


@contextmanager
def begun_anew(out: Path, overwrite: bool) -> Iterator[None]:
    """Inside, the run in ``out`` is set aside; it is removed at the end, or back after an error."""
    note, aside = out / "inputs.json", out.with_name(f".{out.name}.before")
    if not overwrite or not note.exists():
        yield
        return
    if os.environ.get("RANK", "0") != "0":  # rank 0 writes the new note once all ranks are inside
        while note.exists():
            time.sleep(0.1)
        yield
        return
    shutil.rmtree(aside, ignore_errors=True)
    out.rename(aside)
    try:
        yield
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        aside.rename(out)
        raise
    shutil.rmtree(aside)


def write_results(trainer: ACFlowTrainer) -> None:
    """The model, the pictures and the numbers."""
    folder = trainer.save()
    if folder is None:  # not the main rank
        return
    out, lines = trainer.out, read_log(trainer.out)
    judged = [
        line["evaluation"] | {"epoch": line["epoch"]} for line in lines if "evaluation" in line
    ]
    summary = {
        "result": folder.name,
        "epochs": trainer.progress.epoch,
        "evaluations": trainer.progress.evaluations,
        "seconds": round(sum(line.get("seconds", 0) for line in lines), 1),
        "judged": judged,
    }
    files.write_json(out / "metrics.json", summary)
    draw_curves(lines, out / "curves.png")
    before, after = (_pictures(out / "samples" / name) for name in ("before", "after"))
    if before and after:
        prompts = trainer.evaluation.prompts
        heads = [prompts[i % len(prompts)].text for i in range(len(before))]
        before_and_after(out / "before_after.png", before, after, heads)
    report(out, folder, judged)


def report(out: Path, folder: Path, judged: list[dict[str, Any]]) -> None:
    """Before and after, as a few lines."""
    if len(judged) > 1:
        first, last = judged[0], judged[-1]
        names = [n for n in first if n in last and n != "epoch" and not n.endswith("_se")]
        width = max(map(len, names))
        for name in names:
            print(f"{name:{width}}  {first[name]:10.4f} -> {last[name]:10.4f}")
    print(f"{folder} is the result; see also {out / 'before_after.png'}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.save_only and not (args.out / "inputs.json").exists():
        raise ValueError(f"--save-only: there is no run in {args.out}")
    with begun_anew(args.out, args.overwrite):
        trainer = make_trainer(args)
    if not args.save_only and not trainer.run():
        raise KeyboardInterrupt  # stopped by a signal: reported as every script does
    write_results(trainer)


def _pictures(folder: Path) -> list[Image.Image]:
    found = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found.append(image.copy())
    return found


if __name__ == "__main__":
    raise SystemExit(_cli.run(main))
