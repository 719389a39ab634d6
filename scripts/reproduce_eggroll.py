"""The study of EGGROLL on the embedded model, at equal numbers of passes of the network.

    python scripts/reproduce_eggroll.py --out out/eggroll                     (as on the page)
    python scripts/reproduce_eggroll.py --out out/eggroll-large --passes 1000000 --seeds 3 \
        --judged 5000 --device cuda

Every method sees the same prompts and the same noise at the same number of passes, takes steps
whose random walk would reach equally far, and is judged on the same images. The same command goes
on where it stopped; docs/science/eggroll.md gets the tables with --page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _cli
import _eggroll_page as page
import _eggroll_theory as theory
import torch
from _eggroll_judge import Judge
from _eggroll_runs import Runs, moved, tasks_of

from diffsteer.pipelines import files


def parser() -> argparse.ArgumentParser:
    parser = _cli.new_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/eggroll"), help="folder (default: out/eggroll)")
    add("--passes", type=int, default=16384, help="rows through the network in a run (16384)")
    add("--seeds", type=int, default=1, help="runs of each kind (default: 1)")
    add("--population", type=int, default=64, help="where nothing else is said (64)")
    add("--populations", type=int, nargs="*", default=[16, 256, 1024], help="16 256 1024")
    add("--ranks", type=int, nargs="*", default=[2, 4, 16], help="beside 1 (2 4 16)")
    add("--images", type=int, default=2, help="images of a member in a generation (2)")
    add("--sample-steps", type=int, default=4, help="solver steps while training (4)")
    add("--sigma", type=float, default=0.003, help="deviation of the perturbations (0.003)")
    add("--lr", type=float, default=0.2, help="step in units of sigma (0.2)")
    add("--rate", type=float, default=1e-5, help="learning rate of the gradient's Adam (1e-5)")
    add("--acflow-rate", type=float, default=3e-4, help="learning rate of AC-Flow (3e-4)")
    add("--watched", type=int, default=100, help="images that a curve is drawn from (100)")
    add("--points", type=int, default=8, help="points of a curve (8)")
    add("--judged", type=int, default=400, help="images that a result is judged on (400)")
    add("--judged-steps", type=int, default=10, help="their solver steps (10)")
    add("--device", type=_cli.device_name, default="cpu", help="default: cpu")
    add("--only", nargs="+", metavar="TASK", help="run only these tasks (and those that were run)")
    add("--no-judge", action="store_true", help="train only")
    add("--list", action="store_true", help="print the names of the tasks")
    add("--theory", action="store_true", help="also the laws of the noise, and memory")
    add("--quick", action="store_true", help="fewer draws in the theory")
    add("--page", type=Path, help="put the tables into this page, between its marks")
    add("--plots", type=Path, help="put the pictures into this folder")
    add("--threads", type=int, help="CPU threads")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    tasks = tasks_of(args)
    if args.list:
        print("\n".join(task.name for task in tasks))
        return
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    unknown = sorted(set(args.only or ()) - {task.name for task in tasks})
    if unknown:
        raise ValueError(f"--only {unknown[0]} is no task; --list prints them")
    runs, judge, found = Runs(args), Judge(args), {}
    for task in tasks:
        path = args.out / "tasks" / f"{task.name}.json"
        result = json.loads(path.read_text()) if path.exists() else None
        if result is None:
            if args.only and task.name not in args.only:
                continue
            result = {**runs(task), "settings": _settings(args, task.method)}
            print(f"{task.name}: {result['seconds']:.0f} s", flush=True)
            files.write_json(path, result)
        if result["settings"] != _settings(args, task.method):
            raise ValueError(
                f"{path} was made with other settings ({result['settings']}); use another --out"
            )
        if not args.no_judge and result.get("judge") != judge.who:
            result |= judge(task.name, runs)
            files.write_json(path, result)
        found[task.name] = {**result, "moved": moved(args.out, task.name)}
    points = theory.theory_points(args.out / "theory", args.quick, make=args.theory)
    if not args.no_judge:
        page.write(args.out, found, theory.table(points), page=args.page, plots=args.plots)


def _settings(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """What decides the result of a task."""
    own = {
        "nothing": (),
        "climb": ("passes", "rate"),
        "weight": ("passes", "acflow_rate"),
    }.get(method, ("passes", "population", "images", "sigma", "lr"))
    names = (*own, "sample_steps", "watched", "judged", "judged_steps")
    return {name: getattr(args, name) for name in names}


if __name__ == "__main__":
    raise SystemExit(_cli.run(main))
