"""The fitness log: a few kilobytes a generation from which a run can be made again, bit for bit."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import CheckpointError
from .optimizer import Eggroll
from .shaping import Shaped

__all__ = ["FitnessLog", "as_float32", "replay"]

logger = logging.getLogger(__name__)
FORMAT = "diffsteer-fitness-1"


def as_float32(values: Tensor) -> tuple[Tensor, list[float]]:
    """Numbers rounded to float32: as the update uses them (float64), and as the log writes them.

    The written ones are the shortest decimals that float32 reads back to the same bits.
    """
    import numpy as np

    rounded = values.to(torch.float32)
    shortest = [float(np.format_float_scientific(value)) for value in rounded.numpy()]
    return rounded.double(), shortest


class FitnessLog:
    """A JSONL file: a header, then one line a generation, each written before its update.

    The header holds what the noise and the update need; a line holds the weights of the members
    (``fitness``), how many had a score, and the hash of the weights before the update.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def begin(self, header: dict[str, Any], generation: int) -> None:
        """Write the header of a new log; of one that is there, drop what a resumed run redoes.

        A line that a kill cut short goes as well.

        Args:
            header: of this run.
            generation: the run goes on from here.

        Raises:
            CheckpointError: the log is of a run with other noise or other weights.
        """
        header = {"format": FORMAT, **header}
        kept: list[dict[str, Any]] = []
        if self.path.exists():
            before = self.header()
            odd = [name for name in header if before.get(name) != header[name]]
            if odd:
                raise CheckpointError(
                    f"{self.path} is of another run: its {odd[0]} is {before.get(odd[0])}, now it "
                    f"is {header[odd[0]]}; use another folder"
                )
            kept = [line for line in self.lines() if line["generation"] < generation]
            ends = kept[-1]["generation"] + 1 if kept else 0
            if ends < generation:
                logger.warning(
                    "%s lacks generations %d to %d: who joins late must load a checkpoint",
                    self.path, ends, generation - 1,
                )  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in [header, *kept])
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text)
        os.replace(aside, self.path)

    def append(self, line: dict[str, Any]) -> None:
        """Add one generation, on the disk when this returns."""
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def header(self) -> dict[str, Any]:
        """The first line.

        Raises:
            CheckpointError: the file is no fitness log.
        """
        try:
            with open(self.path) as file:
                header = json.loads(file.readline())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} cannot be read ({error})") from error
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise CheckpointError(f"{self.path} is no fitness log of the format {FORMAT}")
        return header

    def lines(self) -> Iterator[dict[str, Any]]:
        """The generations in order, without a last line that was cut short.

        Raises:
            CheckpointError: a line in the middle is damaged.
        """
        texts = self.path.read_text().splitlines(keepends=True)[1:]
        for number, text in enumerate(texts, 2):
            try:
                line = json.loads(text)
            except ValueError as error:
                if number == len(texts) + 1:
                    return  # a kill in the middle of a line: the generation is made again
                raise CheckpointError(f"line {number} of {self.path} is damaged") from error
            yield line


def replay(eggroll: Eggroll, path: str | Path, *, until: int | None = None) -> int:
    """Make the updates of a fitness log again, from where ``eggroll`` stands.

    Nothing is sampled: this is how a worker that joins late, or a run without checkpoints, gets its
    weights. On the kind of machine that wrote the log they are the same bit for bit.

    Args:
        eggroll: with the settings of the run, on the weights that it began with (or restored from
            one of its checkpoints).
        path: of the log.
        until: stop before this generation; None replays all.

    Returns:
        The number of updates.

    Raises:
        CheckpointError: the log is of another run, a generation is missing, or the weights come
            out different (another kind of machine): copy a checkpoint then.
    """
    log, made = FitnessLog(path), 0
    check_header(eggroll, log)
    for line in log.lines():
        generation = line["generation"]
        if generation < eggroll.generation:
            continue
        if until is not None and generation >= until:
            break
        if generation > eggroll.generation:
            raise CheckpointError(
                f"{path} has no generation {eggroll.generation}, only {generation}: it was begun "
                "from a checkpoint; load that first"
            )
        if line.get("hash") not in (None, f"{eggroll.weights_hash():016x}"):
            raise CheckpointError(
                f"the weights before generation {generation} are not those of the run in {path}: "
                "they were computed on another kind of machine, or with other settings; copy a "
                "checkpoint of the run instead"
            )
        for name, mine in (("sigma", eggroll.sigma), ("lr", eggroll.lr)):
            if line.get(name) not in (None, mine):
                raise CheckpointError(
                    f"generation {generation} of {path} had {name}={line[name]}, here it is "
                    f"{mine}; use the settings of that run"
                )
        values, count = torch.tensor(line["fitness"], dtype=torch.float32).double(), line["count"]
        eggroll.update(Shaped(values, count, line["deviation"]))
        made += 1
    return made


def check_header(eggroll: Eggroll, log: FitnessLog) -> None:
    """Refuse the log of another run.

    Raises:
        CheckpointError: its noise, its population or the weights that it began with differ.
    """
    theirs, mine = log.header(), log_header(eggroll)
    odd = [name for name in mine if theirs.get(name) != mine[name]]
    if odd:
        raise CheckpointError(
            f"{log.path} is of another run: its {odd[0]} is {theirs.get(odd[0])}, here it is "
            f"{mine[odd[0]]}"
        )


def log_header(eggroll: Eggroll) -> dict[str, Any]:
    """What makes two runs' updates comparable."""
    return {
        "noise": {**vars(eggroll.noise)},
        "population_size": eggroll.population_size,
        "base_hash": f"{eggroll.offsets.base_hash():016x}",
    }
