"""The study of guidance: points, verdicts and the page, without making an image."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import pytest
import scripts_main
import torch

from diffsteer.eval import load_classifier
from diffsteer.eval.half_samples import Estimate
from diffsteer.pipelines import SweepPoint

points = scripts_main.load("_science_points")
claims = scripts_main.load("_science_claims")
page = scripts_main.load("_science_page")
coarse = scripts_main.load("_science_coarse")


@pytest.fixture(scope="module")
def tools():
    return points.Tools(load_classifier("guidance"), 0.5)


def test_every_point_has_a_name_of_its_own(tools):
    found = points.cfg_points(tools)
    for part in points.PARTS:
        found += points.points_of(part, tools)
    assert len({point.name for point in found}) == len(found)
    assert all(isinstance(point, SweepPoint) for point in found)


@pytest.mark.parametrize(("iterations", "steps"), [(0, 30), (1, 18), (2, 13), (3, 10)])
def test_equal_evaluations_as_the_authors_count(iterations, steps):
    # sigmas 1, 1 - 1/N, ...: 11 of 18, 8 of 13 and 6 of 10 are above 0.4
    gated = {0: 18, 1: 11, 2: 8, 3: 6}[iterations]
    assert points.budget_steps(iterations) == steps
    assert 2 * steps + 2 * iterations * gated <= 60


def test_each_ablation_takes_one_thing_away(tools):
    rules = {point.name: point.rule for point in points.elucd_points(tools)}
    full = rules[f"elucd-{points.ABLATED_AT:g}"]
    gone = {
        name: [
            f.name for f in fields(full) if getattr(rules[name], f.name) != getattr(full, f.name)
        ]
        for name in rules
        if name.startswith("elucd-") and not name[6:].replace(".", "").isdigit()
    }
    assert gone == {
        "elucd-noisy_input": ["classify_on"],
        "elucd-ReLU": ["classifier"],
        "elucd-equal_temperatures": ["marginal"],
        "elucd-no_sine_term": ["sine"],
    }


def estimate(value: float, stderr: float) -> Estimate:
    return Estimate(value, value + stderr * torch.tensor([-1.0, 1.0]) / 2**0.5)


@pytest.mark.parametrize(
    ("change", "wanted", "word"),
    [(-5.0, -1, "held"), (5.0, -1, "failed"), (-1.5, -1, "not decided"), (5.0, 1, "held")],
)
def test_a_verdict_is_what_the_interval_says(change, wanted, word):
    line = claims.verdict("fd falls", estimate(change, 1.0), wanted)
    assert line == f"- **{word}**: fd falls: {change:+.1f} ± 2.0"


def study(pushes, **scores):
    found = [SimpleNamespace(point=SweepPoint(name, None, 1, "CFG", 1.0)) for name in pushes]
    return SimpleNamespace(
        pushes=pushes, of=lambda family: found if family == "CFG" else [],
        scores={name: {"fd": value} for name, value in scores.items()},
    )  # fmt: skip


def test_scores_at_equal_push_lie_between_those_of_the_neighbours():
    known = study({"a": 1.0, "b": 3.0, "c": 4.0}, a=estimate(10.0, 1.0), b=estimate(20.0, 3.0),
                  c=estimate(0.0, 1.0))  # fmt: skip
    found = claims.at_push(known, 2.5)["fd"]
    assert found.value == pytest.approx(17.5) and found.stderr == pytest.approx(2.5)
    assert claims.at_push(known, 0.5) is None and claims.at_push(known, 4.5) is None


def test_a_page_is_rewritten_between_its_marks_only(tmp_path):
    pages, file = scripts_main.load("_page"), tmp_path / "page.md"
    begin, end = pages.begin("study.py"), pages.END
    file.write_text(f"# Title\n\n{begin}\nold\n{end}\n\nend\n")
    for text in ("new\n", "newer\n"):
        pages.rewrite(file, "study.py", text)
    assert file.read_text() == f"# Title\n\n{begin}\n\nnewer\n\n{end}\n\nend\n"
    for broken in ("# Title\n", f"{begin}\nold\n", f"{end}\n{begin}\n", f"{begin}\n" * 2 + end):
        file.write_text(broken)
        with pytest.raises(ValueError, match="must hold one line"):
            pages.rewrite(file, "study.py", "new")
        assert file.read_text() == broken


def test_bad_input_is_one_line(capsys, tmp_path):
    for arguments, text in (
        (("--samples", 0), "--samples must be larger, got 0"),
        (("--halves", 1), "--halves must be larger, got 1"),
    ):
        assert scripts_main.run("reproduce_guidance", "--out", tmp_path / "x", *arguments) == 2
        assert text in capsys.readouterr().err


def test_coarse_pixels_know_colours_and_not_details():
    checkers = torch.zeros(3, 32, 32, dtype=torch.uint8)
    checkers[:, ::2, ::2] = checkers[:, 1::2, 1::2] = 255
    flat = torch.full((3, 32, 32), 127, dtype=torch.uint8)
    pixels = coarse.coarse_pixels([checkers, flat])
    assert pixels.shape == (2, 3 * 8 * 8)
    torch.testing.assert_close(pixels[0], torch.full((192,), 0.5).double())
    torch.testing.assert_close(pixels[1], torch.full((192,), 127 / 255).double())
