"""The study of EGGROLL: one command that goes on where it stopped, and its laws in closed form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scripts_main import load, run

TINY = (
    *("--passes", 16, "--population", 4, "--populations", "--ranks", "--images", 2),
    *("--sample-steps", 1, "--watched", 2, "--points", 1, "--judged", 12, "--judged-steps", 1),
    *("--only", "start", "eggroll", "shuffled", "mezo"),
)


def test_runs_are_judged_and_not_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- from here on written by scripts/reproduce_eggroll.py -->\nold\n"
        "<!-- up to here -->\nafter\n"
    )
    flags = (*TINY, "--out", tmp_path / "study", "--page", page, "--plots", tmp_path / "plots")
    assert run("reproduce_eggroll", *flags) == 0
    assert "eggroll:" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert rows == ["run", "---", "start", "eggroll", "shuffled", "mezo"]
    assert (tmp_path / "plots" / "eggroll_curves.png").exists()
    found = json.loads((tmp_path / "study" / "tasks" / "eggroll.json").read_text())
    assert found["curve"][0][0] == 0 and found["curve"][-1][0] == 16
    weights = {
        name: torch.load(tmp_path / "study" / "weights" / f"{name}.pt", weights_only=True)
        for name in ("start", "eggroll", "shuffled")
    }
    moved = {
        name: sum(float((w - weights["start"][key]).float().square().sum())
                  for key, w in weights[name].items() if w.is_floating_point())
        for name in ("eggroll", "shuffled")
    }  # fmt: skip
    assert moved["shuffled"] == pytest.approx(moved["eggroll"], rel=0.2) and moved["eggroll"] > 0
    assert run("reproduce_eggroll", *flags) == 0
    assert "eggroll:" not in capsys.readouterr().out and page.read_text() == text
    assert run("reproduce_eggroll", *flags, "--sigma", 0.1) == 2
    assert "made with other settings" in capsys.readouterr().err


def test_the_law_of_the_rank_is_sampled_within_its_error() -> None:
    rows = load("_eggroll_theory").rank_law(quick=True)
    gaps = [row["dense"] - row["expected"] for row in rows]
    for row in rows:
        assert abs(row["sampled"] - row["expected"]) < 4 * row["error"]
    assert gaps[3] * 16 == pytest.approx(gaps[2] * 4, rel=0.1)  # 1 / r in the limit
    assert gaps == sorted(gaps, reverse=True) and gaps[3] > 0
