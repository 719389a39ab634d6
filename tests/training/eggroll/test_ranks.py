"""Many ranks: the same bits for any number of them, few bytes, silence, divergence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from eggroll_runs import hash_of, log_lines, run_ranks, small_config, trainer

from diffsteer.training.checkpoint import CheckpointError
from diffsteer.training.eggroll import Hub
from diffsteer.training.eggroll.byte_code import (
    decode_differences,
    encode_differences,
    shape_differences,
    spread_of,
)
from diffsteer.training.eggroll.messages import Messages
from diffsteer.training.eggroll.shaping import shape_fitness
from diffsteer.training.run_folder import check_free

NAN = float("nan")
RANKS = Path(__file__).parents[2] / "support" / "eggroll_ranks.py"


# -- one byte a pair -----------------------------------------------------------------------------


def test_one_byte_holds_a_difference_to_three_percent() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[3], values[7] = 0.0, NAN
    message = encode_differences(values)
    assert len(message) == 4 + 1000
    found = decode_differences(message)
    assert found[3] == 0 and found[7].isnan()
    large = values.abs() > values.nan_to_num().abs().max() / 2600
    error = (found - values)[large].abs() / values[large].abs()
    assert float(error.max()) < torch.e ** (1 / 32) - 1 + 1e-6
    kept = ~values.isnan()
    assert float(torch.cosine_similarity(found[kept], values[kept], dim=0)) > 0.9997


@pytest.mark.parametrize("values", [[NAN, NAN], [0.0, 0.0], [], [1e-30, -1e30], [-3.5]])
def test_bytes_hold_the_ends_of_the_scale(values: list[float]) -> None:
    given = torch.tensor(values, dtype=torch.float64)
    found = decode_differences(encode_differences(given))
    small = given.abs() < given.nan_to_num().abs().max() / 2900 if values else given
    wanted = torch.where(small.bool(), torch.zeros_like(given), given) if values else given
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0, equal_nan=True)


def test_differences_alone_give_the_weights_that_scores_give() -> None:
    """Of pairs without a common part of their own, up to the estimate of the deviation."""
    scores = torch.randn(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = shape_fitness(scores)
    spread = spread_of(scores[:, None])
    values, count, deviation = shape_differences(scores[0::2] - scores[1::2], spread)
    assert count == wanted.count == 4000
    assert deviation == pytest.approx(wanted.deviation, rel=1e-3)
    mine, theirs = values[0::2] - values[1::2], wanted.values[0::2] - wanted.values[1::2]
    torch.testing.assert_close(mine * deviation, theirs * wanted.deviation)
    nothing = shape_differences(torch.tensor([NAN, NAN]), 0.0)
    assert nothing[1] == 0 and nothing[0].tolist() == [0, 0, 0, 0]
    assert shape_differences(torch.zeros(2), 1.0)[0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_one_byte_a_pair_makes_the_step_that_scores_make(ranks: int) -> None:
    """Also where prompts differ in level and members in more than their pair's difference."""
    source = torch.Generator().manual_seed(6)
    scores = torch.randn(64, 3, generator=source) + torch.tensor([0.0, 50.0, -7.0])
    scores += 2 * torch.randn(32, 1, generator=source).repeat_interleave(2, 0)
    scores[5, 1] = NAN
    steps = []
    for wire in ("scores", "byte"):
        messages = Messages(small_config(population_size=64, wire=wire), ranks, 8)
        bodies = [messages.encode(scores[messages.members(rank)]) for rank in range(ranks)]
        values = messages.shaped(bodies, 3)[0].values
        steps.append(values[0::2] - values[1::2])
    assert float(torch.cosine_similarity(*steps, dim=0)) > 0.999
    assert float(steps[1].norm() / steps[0].norm()) == pytest.approx(1, rel=0.05)


# -- who does what -------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("wire", ["scores", "byte"])
def test_every_member_has_one_rank_and_tables_come_out_whole(ranks: int, wire: str) -> None:
    messages = Messages(small_config(population_size=22, wire=wire), ranks, 4)
    members = [messages.members(rank) for rank in range(ranks)]
    assert sorted(m for part in members for m in part) == list(range(22))
    scores = torch.randn(22, 3, generator=torch.Generator().manual_seed(2))
    bodies = [messages.encode(scores[part]) for part in members]
    shaped, means = messages.shaped(bodies, 3)
    if wire == "scores":
        assert shaped.values.equal(shape_fitness(scores).values)
        torch.testing.assert_close(means, scores.mean(1))
    else:
        exact = shape_differences((scores[0::2] - scores[1::2]).double().mean(1), 1.0)[0]
        assert float(torch.cosine_similarity(shaped.values, exact, dim=0)) > 0.999


@pytest.mark.parametrize("wire", ["scores", "byte"])
@pytest.mark.parametrize("body", [b"", b"short"])
def test_a_missing_rank_counts_as_no_score(wire: str, body: bytes) -> None:
    messages = Messages(small_config(wire=wire), 2, 2)
    scores = torch.randn(8, 2, generator=torch.Generator().manual_seed(3))
    bodies = [messages.encode(scores[messages.members(rank)]) for rank in range(2)]
    shaped, _ = messages.shaped([bodies[0], body], 2)
    assert shaped.count == 4
    assert shaped.values[messages.members(1)].tolist() == [0] * 4
    assert bool((shaped.values[messages.members(0)] != 0).all())


def test_the_baseline_member_rides_with_rank_zero() -> None:
    messages = Messages(small_config(baseline=True), 2, 2)
    assert messages.members(0) == [0, 1, 4, 5, -1] and messages.members(1) == [2, 3, 6, 7]
    scores, base = torch.randn(8, 2, generator=torch.Generator().manual_seed(4)), torch.ones(1, 2)
    bodies = [messages.encode(torch.cat([scores[[0, 1, 4, 5]], base])),
              messages.encode(scores[[2, 3, 6, 7]])]  # fmt: skip
    wanted = shape_fitness(scores, baseline=base[0])
    assert messages.shaped(bodies, 2)[0].values.equal(wanted.values)


# -- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    out = tmp_path_factory.mktemp("alone")
    run = trainer(out)
    run.run()
    return hash_of(run), [line["fitness"] for line in log_lines(out)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_comes_to_the_same_bits(
    tmp_path: Path, alone: tuple[str, list[Any]], ranks: int
) -> None:
    runs = run_ranks(tmp_path, ranks)
    assert [hash_of(run) for run in runs] == [alone[0]] * ranks
    lines = log_lines(tmp_path)
    assert [line["fitness"] for line in lines] == alone[1]
    # 8 members, 2 prompts, float32, 9 bytes before them; sizes of the parts in the table.
    heard = (ranks - 1) * 9 + 8 * 2 * 4 * (ranks - 1) // ranks
    told = 4 * ranks + ranks * 9 + 8 * 2 * 4
    assert all(line["bytes"] == [told, heard] for line in lines)


def test_a_run_goes_on_with_another_number_of_ranks(
    tmp_path: Path, alone: tuple[str, list[Any]]
) -> None:
    run_ranks(tmp_path, 2, steps=2)
    run = trainer(tmp_path)
    assert run.resumed_from == 2 and run.run() and hash_of(run) == alone[0]


def test_one_byte_a_pair_keeps_ranks_together(tmp_path: Path) -> None:
    runs = run_ranks(tmp_path, 2, wire="byte", prompts_per_step=3, population_size=16)
    assert hash_of(runs[0]) == hash_of(runs[1])
    assert log_lines(tmp_path)[0]["bytes"] == [8 + 2 * (9 + 8 + 4), 9 + 8 + 4]


def test_a_rank_with_other_weights_is_healed(tmp_path: Path) -> None:
    store = dist.HashStore()
    runs: list[Any] = [None, None]

    def work(rank: int) -> None:
        run = runs[rank] = trainer(tmp_path, hub=Hub(store, rank=rank, ranks=2))
        run.step()
        if rank == 1:  # a bit flips
            weights = next(iter(run.eggroll.offsets.parameters.values()))
            with torch.no_grad():
                weights.view(-1)[0] += 1e-3
            run.eggroll.offsets.write_back()
        run.step()
        run.step()
        run.hub.finish(3)

    together(work, 2)
    assert hash_of(runs[0]) == hash_of(runs[1])
    missing = [line.get("missing_ranks") for line in log_lines(tmp_path)]
    assert missing == [None, [1], None]  # what it found with wrong weights did not count
    for mine, theirs in zip(*(run.pipe.transformer.parameters() for run in runs), strict=True):
        assert mine.equal(theirs)


def test_a_rank_that_falls_silent_is_missed_and_catches_up(tmp_path: Path) -> None:
    """It hangs during the second generation; the others make it and the third without it."""
    store, asleep = dist.HashStore(), threading.Event()
    runs: list[Any] = [None, None]

    def work(rank: int) -> None:
        run = runs[rank] = trainer(tmp_path, hub=Hub(store, rank=rank, ranks=2, timeout=20.0))
        run.step()
        if rank == 1:
            assert asleep.wait(60)
        run.hub.timeout = timedelta(seconds=0.3)
        run.step()
        run.step()
        asleep.set()
        run.hub.timeout = timedelta(seconds=20)
        run.hub.silent.clear()
        run.step()
        run.hub.finish(4)

    together(work, 2)
    assert hash_of(runs[0]) == hash_of(runs[1])
    lines = log_lines(tmp_path)
    assert [line.get("missing_ranks") for line in lines] == [None, [1], [1], None]
    assert [line["count"] for line in lines] == [8, 4, 4, 8]


def test_the_hub_does_not_wait_twice_for_the_dead() -> None:
    hub = Hub(dist.HashStore(), rank=0, ranks=3, timeout=0.2)
    assert hub.exchange(0, b"a") == [b"a", b"", b""] and hub.silent == {1, 2}
    hub.store.set("1/2", b"back")
    hub.timeout = timedelta(seconds=30)
    began = time.monotonic()
    assert hub.exchange(1, b"a") == [b"a", b"", b"back"]
    assert time.monotonic() - began < 10 and hub.silent == {1}


def together(work: Any, ranks: int) -> None:
    """Run a function of the rank in threads; raise what it raised."""
    errors: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]


def test_gloo_processes_come_to_the_bits_of_one_process(
    tmp_path: Path, alone: tuple[str, list[Any]]
) -> None:
    """2 and 4 processes with the environment that ``accelerate launch`` gives them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(RANKS), str(tmp_path), "2", "4"],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"2": [alone[0]] * 2, "4": [alone[0]] * 4}


def test_a_run_that_another_rank_has_just_begun_is_nobody_elses(tmp_path: Path) -> None:
    """A rank looks for the settings, does not find them, and then finds files in the folder."""
    (tmp_path / "history.jsonl").write_text("{}")
    with pytest.raises(CheckpointError, match=r"history\.jsonl and no training run"):
        check_free(tmp_path, begun="config.json")
    (tmp_path / "config.json").write_text("{}")
    check_free(tmp_path, begun="config.json")
