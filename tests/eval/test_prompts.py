"""Scores under prompts in one pass with the rest: from Python, from run.json and from files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from eval_samples import tensors, tiny_extractor

from diffsteer.eval import EvalSuite, Generated, PeriodicEvaluation, Reading, evaluate
from diffsteer.eval.cache import FeatureCache
from diffsteer.eval.images import open_images
from diffsteer.eval.prompts import find_prompts


class Brightness:
    """Mean grey level times the length of the prompt; counts its calls."""

    id = "brightness@1"
    higher_is_better = False

    def __init__(self):
        self.calls = 0

    def __call__(self, images, prompts):
        self.calls += 1
        means = torch.stack([image.float().mean() for image in images])
        return means * torch.tensor([len(prompt) for prompt in prompts])


PROMPTS = ["a cat" if i % 3 else "a dog" * (1 + i % 2) for i in range(24)]


def expected_score(images):
    values = images.float().mean((1, 2, 3)) * torch.tensor([len(p) for p in PROMPTS])
    return values.double()


def test_a_callable_is_a_metric_with_an_error_and_a_count():
    images, scorer = tensors(24, 2), Brightness()
    suite = EvalSuite(("colour",), extractors=tiny_extractor(), scorers={"bright": scorer})
    suite.update(tensors(24, 1), real=True)  # real images have no prompts
    for start in range(0, 24, 7):
        suite.update(images[start : start + 7], prompts=PROMPTS[start : start + 7])
    score = suite.compute().scores["bright"]
    values = expected_score(images)
    assert score.value == pytest.approx(float(values.mean()), rel=1e-6)
    assert score.stderr == pytest.approx(float(values.std() / 24**0.5), rel=1e-6)
    assert (score.count, score.higher_is_better) == (24, False)
    assert suite.compute().meta["scorers"] == {"bright": "brightness@1"}


def test_order_changes_no_digit_and_prompts_are_the_groups_of_diversity():
    images, order = tensors(24, 2), torch.randperm(24)
    results = []
    for rows in (torch.arange(24), order):
        suite = EvalSuite(
            ("diversity",), extractors=tiny_extractor(), scorers={"bright": Brightness()}
        )
        suite.update(images[rows], prompts=[PROMPTS[int(i)] for i in rows])
        results.append(suite.compute().values)
    assert results[0] == results[1]
    grouped = EvalSuite(("diversity",), extractors=tiny_extractor())
    names = sorted(set(PROMPTS))
    grouped.update(images, labels=[names.index(p) for p in PROMPTS])
    assert grouped.compute().values["diversity"] == pytest.approx(results[0]["diversity"])
    together = EvalSuite(("diversity",), extractors=tiny_extractor())
    together.update(images)
    assert together.compute().values["diversity"] != pytest.approx(results[0]["diversity"])


def test_values_that_are_missing_are_left_out_and_said():
    def picky(images, prompts):
        return torch.tensor([math.nan if p == "a cat" else 2.0 for p in prompts])

    suite = EvalSuite(("colour",), extractors=tiny_extractor(), scorers={"picky": picky})
    suite.update(tensors(24), prompts=PROMPTS)
    result = suite.compute()
    assert result.scores["picky"].value == 2 and result.scores["picky"].count == 8
    assert any("picky: no value for 16" in warning for warning in result.warnings)
    suite.reset()
    suite.update(tensors(24))
    assert "needs the prompt" in suite.compute().skipped["picky"]


def test_what_does_not_fit_is_named():
    suite = EvalSuite(("colour",), extractors=tiny_extractor(), scorers={"b": Brightness()})
    with pytest.raises(ValueError, match="one an image, 4, got 1"):
        suite.update(tensors(4), prompts=["a"])
    wrong = EvalSuite(
        ("colour",), extractors=tiny_extractor(), scorers={"wrong": lambda i, p: torch.zeros(2)}
    )
    with pytest.raises(ValueError, match=r"'wrong'.*\(4,\)"):
        wrong.update(tensors(4), prompts=["a"] * 4)
    with pytest.raises(ValueError, match="both called 'tiny'"):
        EvalSuite(("colour",), extractors=tiny_extractor(), scorers={"tiny": Brightness()})


@pytest.fixture
def folder(make_folder):
    made = make_folder("prompted", 24, seed=2, labels=False)
    images = [{"file": f"images/{i:06d}.png", "prompt": p} for i, p in enumerate(PROMPTS)]
    (made / "run.json").write_text(json.dumps({"images": images}))
    return made


def test_prompts_come_from_run_json_or_a_file(folder, tmp_path):
    source = open_images(folder)
    assert find_prompts(source) == PROMPTS
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n".join(PROMPTS) + "\n")
    rows = tmp_path / "prompts.jsonl"
    rows.write_text(
        "\n".join(json.dumps({"file": f"{i:06d}.png", "prompt": p}) for i, p in enumerate(PROMPTS))
    )
    assert find_prompts(source, str(lines)) == find_prompts(source, str(rows)) == PROMPTS
    lines.write_text("one\ntwo\n")
    rows.write_text('{"file": "000000.png", "prompt": "a"}')
    for path, words in ((lines, "2 prompts for 24 images"), (rows, "no prompt for .*000001")):
        with pytest.raises(ValueError, match=words):
            find_prompts(source, str(path))
    rows.write_text('{"prompt": "a"}')
    with pytest.raises(ValueError, match="file and prompt"):
        find_prompts(source, str(rows))
    with pytest.raises(ValueError, match="nowhere"):
        find_prompts(source, str(tmp_path / "nowhere.txt"))


def test_scores_are_cached_under_scorer_and_prompts(folder, tmp_path):
    scorer = Brightness()
    suite = EvalSuite(("colour",), extractors=tiny_extractor(), scorers={"bright": scorer})
    options = {"suite": suite, "reading": Reading(workers=0), "cache": FeatureCache(tmp_path / "c")}
    first = evaluate(folder, **options)
    calls = scorer.calls
    assert evaluate(folder, **options).values == first.values and scorer.calls == calls > 0
    other = tmp_path / "other.txt"
    other.write_text("\n".join(p + "!" for p in PROMPTS))
    changed = evaluate(folder, prompts=str(other), **options)
    assert changed.values["bright"] > first.values["bright"] and scorer.calls > calls
    calls = scorer.calls
    suite.scorers["bright"] = lambda images, prompts: scorer(images, prompts)  # no identity
    for _ in range(2):
        assert evaluate(folder, **options).values == first.values
    assert scorer.calls == calls + 2


def test_training_loops_give_prompts(folder):
    suite = EvalSuite(("colour",), extractors=tiny_extractor(), scorers={"bright": Brightness()})

    def generate(seeds):
        return Generated(tensors(24, 2)[list(seeds)], prompts=[PROMPTS[s] for s in seeds])

    scores = PeriodicEvaluation(suite, generate, every=5, seeds=range(24), batch_size=9)(5)
    expected = float(expected_score(tensors(24, 2)).mean())
    assert scores["eval/bright"] == pytest.approx(expected, rel=1e-6)
