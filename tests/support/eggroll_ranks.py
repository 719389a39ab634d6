"""Run the EGGROLL trainer in forked gloo processes: eggroll_ranks.py OUT 2 4 prints the hashes.

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
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from eggroll_runs import hash_of, trainer


def work(rank: int, ranks: int, port: int, out: Path, results: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        run = trainer(out, hub=None)
        assert run.hub.ranks == ranks and run.hub.store is not None
        assert run.run()
        results.put((rank, hash_of(run)))
    except Exception:
        results.put((rank, traceback.format_exc()))


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return int(place.getsockname()[1])


def main(out: Path, counts: list[int]) -> None:
    context = multiprocessing.get_context("fork")
    found: dict[int, list[str]] = {}
    for ranks in counts:
        results, port = context.Queue(), free_port()
        workers = [
            context.Process(target=work, args=(rank, ranks, port, out / str(ranks), results))
            for rank in range(ranks)
        ]
        for worker in workers:
            worker.start()
        hashes = dict(results.get(timeout=60) for _ in workers)
        for worker in workers:
            worker.join(60)
        found[ranks] = [hashes[rank] for rank in range(ranks)]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(count) for count in sys.argv[2:]])
