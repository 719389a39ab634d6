"""sweep.py: grids from options and files, equal price, errors in one line."""

from __future__ import annotations

import csv
import json

import pytest
import scripts_main
from tiny_flow import tiny_dit, tiny_pipeline

from diffsteer.guidance import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    GuidanceInterval,
    LinearScale,
    ManifoldProjectedGuidance,
)

cli = scripts_main.load("_cli")
grid = scripts_main.load("_grid")
script = scripts_main.load("sweep")


def points(*arguments):
    args = script.parser().parse_args(["--out", "x", *map(str, arguments)])
    return grid.points_of(grid.groups_of(args))


def test_a_group_is_all_combinations_of_its_values():
    found = points(
        *("--rule", "none", "--rule", "cfg", "--scale", 2, "linear:1:8"),
        *("--rule", "apg", "--scale", 4, 8, "--eta", 0, 0.5, "--steps", 10),
    )
    assert [(p.name, p.family, p.scale, p.steps) for p in found] == [
        ("none", "no guidance", None, 20),
        ("cfg-scale=2", "cfg", 2.0, 20),
        ("cfg-scale=linear_1_8", "cfg", None, 20),
        ("apg-scale=4-eta=0-steps=10", "apg-eta=0", 4.0, 10),
        ("apg-scale=4-eta=0.5-steps=10", "apg-eta=0.5", 4.0, 10),
        ("apg-scale=8-eta=0-steps=10", "apg-eta=0", 8.0, 10),
        ("apg-scale=8-eta=0.5-steps=10", "apg-eta=0.5", 8.0, 10),
    ]
    assert found[0].rule is None
    assert found[2].rule == ClassifierFreeGuidance(LinearScale(1.0, 8.0))
    assert found[6].rule == AdaptiveProjectedGuidance(8.0, eta=0.5)


def test_bases_intervals_and_common_steps():
    found = points(
        *("--steps", 5, 6, "--rule", "cfg", "--flow-interval", "none", "0.2:0.9"),
        *("--rule", "cfgmp", "--base", "cfg:scale=2", "cfg:scale=3", "--iterations", 1),
    )
    assert [p.steps for p in found] == [5, 5, 6, 6, 5, 5, 6, 6]
    assert found[0].rule == ClassifierFreeGuidance()
    assert found[1].rule == GuidanceInterval.flow(ClassifierFreeGuidance(), 0.2, 0.9)
    assert found[5].rule == ManifoldProjectedGuidance(ClassifierFreeGuidance(3.0), iterations=1)
    assert [(p.family, p.scale) for p in found[4:6]] == [
        ("cfgmp-base=cfg-iterations=1", 2.0), ("cfgmp-base=cfg-iterations=1", 3.0),
    ]  # fmt: skip
    assert len({p.name for p in found}) == 8


YAML = """
- rule: apg
  scale: [4, 8]
  eta: 0.5
  flow-interval: [0.2, 0.9]
- rule: cfgmp
  base: "cfg:scale=2"
  interval: [[0, 3], none]
  iterations: [1]
- {rule: none, steps: 7}
"""
SAME = (
    *("--rule", "apg", "--scale", 4, 8, "--eta", 0.5, "--flow-interval", "0.2:0.9"),
    *("--rule", "cfgmp", "--base", "cfg:scale=2", "--interval", "0:3", "none"),
    *("--iterations", 1, "--rule", "none", "--steps", 7),
)


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_file_says_the_same(tmp_path, kind):
    import yaml

    text = YAML if kind == "yaml" else json.dumps(yaml.safe_load(YAML))
    (tmp_path / f"grid.{kind}").write_text(text)
    assert points("--grid", tmp_path / f"grid.{kind}") == points(*SAME)


def test_every_option_of_every_rule_is_there():
    text = script.parser().format_help()
    for rule in cli.rule_choices().values():
        for name in cli.options_of(rule):
            assert "--" + name.replace("_", "-") in text


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    network = tiny_dit(sample_size=32, patch_size=8)
    tiny_pipeline("denoised", network).save_pretrained(folder)
    return folder


def run(model, out, capsys, *arguments):
    capsys.readouterr()
    options = ("--model", model, "--device", "cpu", "--num", 4, "--out", out)
    code = scripts_main.run("sweep", *options, *arguments)
    shown = capsys.readouterr()
    return code, shown.out, shown.err.strip().split("\n")[-1]


def test_at_equal_price(model, tmp_path, capsys):
    rules = ("--rule", "none", "--rule", "cfg", "--scale", 2)
    code, shown, _ = run(
        model, tmp_path / "out", capsys, "--budget-nfe", 5, "--metrics", "accuracy", *rules
    )
    assert code == 0 and "cfg-scale=2-steps=2" in shown
    rows = list(csv.DictReader((tmp_path / "out/sweep.csv").read_text().splitlines()))
    assert [(row["steps"], row["nfe"]) for row in rows] == [("5", "5"), ("2", "4")]
    code, _, message = run(
        model, tmp_path / "dear", capsys, "--budget-nfe", 1, "--rule", "cfg", "--scale", 2
    )
    assert code == 2 and "a single step needs 2 evaluations" in message
    assert not (tmp_path / "dear").exists()


BAD = {
    "nothing": ((), "nothing to sweep: give --rule"),
    "stray": (("--scale", 2, "--rule", "cfg"), "--scale belongs to a method; put it after"),
    "not its": (("--rule", "cfg", "--eta", 0), "cfg-eta=0: --eta is no option of --guidance cfg"),
    "value": (("--rule", "cfg", "--scale", 2, "x"), "cfg-scale=x: --scale: cannot read 'x'"),
    "none": (("--rule", "none", "--scale", 2), "--rule none takes no --scale"),
    "steps": (("--rule", "cfg", "--steps", 0), "--steps must be whole numbers of at least 1"),
    "interval": (("--rule", "cfg", "--interval", "3"), "an interval looks like LOW:HIGH, got '3'"),
    "empty": (("--rule", "cfg", "--interval", "3:1"), "low must be less than high"),
    "twice": (("--rule", "cfg", "--rule", "cfg"), "cfg is there twice"),
    "budget": (("--rule", "cfg", "--steps", 3, "--budget-nfe", 9), "leave --steps out"),
    "budget 0": (("--rule", "cfg", "--budget-nfe", 0), "budget must be an integer of at least 1"),
    "weak": (("--rule", "autoguidance"), "point autoguidance: "),
    "no file": (("--grid", "nowhere.json"), "nowhere.json"),
    "labels": (("--rule", "cfg", "--classes", "unicorn"), "unknown class name 'unicorn'"),
    "reference": (("--rule", "none", "--steps", 1, "--reference", "nowhere"), "nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(model, tmp_path, capsys, name):
    arguments, text = BAD[name]
    code, _, message = run(model, tmp_path / "out", capsys, *arguments)
    assert code == 2 and message.startswith("error: ") and text in message
    assert not list(tmp_path.glob("out/points/*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "grid.yaml"),
        ("rule: cfg", "must hold a list of groups"),
        ("- {scale: 2}", "each group is a mapping with a rule"),
        ("- {rule: cgf}", "each group is a mapping with a rule"),
        ("- {rule: cfg, scale: []}", "at least one value"),
    ],
)
def test_bad_grid_files_are_named(tmp_path, text, message):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        points("--grid", tmp_path / "grid.yaml")
