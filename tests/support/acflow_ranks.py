"""Fine-tune in forked gloo processes: acflow_ranks.py RANKS OUT CONFIG [OUT CONFIG ...].

The processes are forked from one that has imported everything, and find each other through the
environment variables that ``accelerate launch`` sets.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from tiny_flow import tiny_pipeline

from diffsteer.training.acflow import ACFlowConfig, ACFlowTrainer
from diffsteer.training.prompts import class_prompts
from diffsteer.training.rewards import Brightness, RewardSet


def work(rank: int, ranks: int, port: int, out: str, config: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
    }  # fmt: skip
    pipe, status = tiny_pipeline("denoised"), 1
    try:
        rewards = RewardSet({"bright": Brightness()})
        settings = ACFlowConfig(**json.loads(config))
        run = ACFlowTrainer(settings, pipe, class_prompts(pipe, range(4)), rewards, out)
        assert run.accelerator.num_processes == ranks
        assert run.run()
        run.accelerator.wait_for_everyone()
        run.accelerator.state.destroy_process_group()
        status = 0
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)  # a fork that ends in the ordinary way waits for threads it does not have


def main(ranks: int, pairs: list[str]) -> int:
    context, worst = multiprocessing.get_context("fork"), 0
    for out, config in zip(pairs[::2], pairs[1::2], strict=True):
        with socket.socket() as place:
            place.bind(("localhost", 0))
            port = int(place.getsockname()[1])
        workers = [
            context.Process(target=work, args=(rank, ranks, port, out, config))
            for rank in range(ranks)
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
