"""Any number of ranks, also an empty one, gives the numbers of one process to the last digit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from eval_samples import tensors, tiny_extractor

from diffsteer.eval import EvalSuite
from diffsteer.eval.scores import METRICS

WORKER = """
import json, sys
import torch.distributed as dist
import torch.multiprocessing as mp
from eval_samples import tensors, tiny_extractor
from diffsteer.eval import EvalSuite
from diffsteer.eval.scores import METRICS

def bright(images, prompts):
    return images.float().mean((1, 2, 3))

def rank_main(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{world}",
                            rank=rank, world_size=world)
    suite = EvalSuite([m for m in METRICS if m != "sfid"], extractors=tiny_extractor())
    real, fake = tensors(41, 1), tensors(41, 2)
    share = slice(rank, None, world) if world < 4 else slice(rank * 14, rank * 14 + 14)
    suite.update(real[share], real=True)                 # uneven: 41 is odd
    suite.update(fake[share], labels=[i % 4 for i in range(41)][share])   # rank 3 of 4 has none
    suite.sync()
    first = suite.compute()
    suite.reset(keep_reference=True)                     # as in training: the reference stays
    suite.update(fake[share], labels=[i % 4 for i in range(41)][share])
    suite.sync()
    assert suite.compute(together=True).values == first.values   # the ranks share the neighbours
    bounded = EvalSuite([m for m in METRICS if m != "sfid"], extractors=tiny_extractor(),
                        max_rows=30, scorers={"bright": bright})
    bounded.update(real[share], real=True)
    bounded.update(fake[share], prompts=["p"] * len(fake[share]))
    bounded.sync()
    with open(f"{folder}/{world}-{rank}-bounded.json", "w") as file:
        file.write(bounded.compute(together=True).to_json())
    with open(f"{folder}/{world}-{rank}.json", "w") as file:
        file.write(first.to_json())
    dist.destroy_process_group()

if __name__ == "__main__":
    for world in (2, 4):
        mp.spawn(rank_main, (world, sys.argv[1]), nprocs=world)
"""


@pytest.mark.slow
def test_ranks_change_no_digit(tmp_path):
    suite = EvalSuite([m for m in METRICS if m != "sfid"], extractors=tiny_extractor())
    suite.update(tensors(41, 1), real=True)
    suite.update(tensors(41, 2), labels=[i % 4 for i in range(41)])
    suite.sync()  # without a process group: nothing happens
    expected = json.loads(suite.compute().to_json())
    bounded = EvalSuite(
        [m for m in METRICS if m != "sfid"], extractors=tiny_extractor(), max_rows=30,
        scorers={"bright": lambda images, prompts: images.float().mean((1, 2, 3))},
    )  # fmt: skip
    bounded.update(tensors(41, 1), real=True)
    bounded.update(tensors(41, 2), prompts=["p"] * 41)
    in_bounds = bounded.compute().values
    program = tmp_path / "worker.py"
    program.write_text(WORKER)
    support = Path(__file__).parents[1] / "support"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(support)}
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for world in (2, 4):
        for rank in range(world):
            found = json.loads((tmp_path / f"{world}-{rank}.json").read_text())
            assert found["values"] == expected["values"], (world, rank)
            assert found["stderr"] == expected["stderr"]
            assert found["labels"] == expected["labels"]
            kept = json.loads((tmp_path / f"{world}-{rank}-bounded.json").read_text())["values"]
            assert kept.keys() == in_bounds.keys()
            for name, value in in_bounds.items():
                # Sums over ranks round by their order; everything else is the same to the digit.
                near = pytest.approx(value, rel=1e-12, abs=1e-12)
                assert kept[name] == (near if name.startswith("fd") else value), name


LAUNCHED = """
import sys
from eval_samples import tiny_extractor
import diffsteer.eval.pretrained as pretrained
pretrained.EXTRACTORS["cifar"] = lambda settings, device: tiny_extractor()
from scripts_main import load
sys.exit(load("evaluate").main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_accelerate_launch_changes_no_digit(make_folder, tmp_path):
    """``accelerate launch`` with 1, 2 and 4 processes; with 4, one of them has no real image."""
    fake, real = make_folder("fake", 11, seed=1), make_folder("real", 11, seed=2, labels=False)
    for image in sorted((real / "images").iterdir())[3:]:
        image.unlink()
    program = tmp_path / "launched.py"
    program.write_text(LAUNCHED)
    support = str(Path(__file__).parents[1] / "support")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": support,
                   "XDG_CACHE_HOME": str(tmp_path / "cache")}  # fmt: skip
    found = {}
    for count in (1, 2, 4):
        out = tmp_path / f"{count}.json"
        # Without it accelerate starts one process where there is no GPU.
        several = ["--multi_gpu", "--main_process_port", "0"] if count > 1 else []
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *several,
             "--num_processes", str(count), "--num_machines", "1", "--mixed_precision", "no",
             "--dynamo_backend", "no",
             str(program), str(fake), "--reference", str(real), "--metrics", "all",
             "--json", str(out)],
            env=environment, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found[count] = json.loads(out.read_text())
    assert {"fd-tiny", "kid-tiny", "accuracy"} <= found[1]["values"].keys()
    for count in (2, 4):
        assert found[count]["meta"]["ranks"] == count
        assert found[count]["values"] == found[1]["values"]
        assert found[count]["stderr"] == found[1]["stderr"]
