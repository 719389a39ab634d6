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
    assert suite.compute().values == first.values
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
