"""Prompts from files and from the classes of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_flow import tiny_pipeline
from tiny_pipelines import build

from diffsteer.training.prompts import Prompt, call_inputs, class_prompts, read_prompts


def test_text_and_jsonl_say_the_same(tmp_path: Path) -> None:
    plain, rich = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text("a fox\n\n  a car \n")
    rich.write_text('{"prompt": "a fox", "tag": 1}\n{"prompt": "a car"}\n')
    assert read_prompts(plain) == [Prompt("a fox"), Prompt("a car")]
    assert read_prompts(rich) == [Prompt("a fox", {"tag": 1}), Prompt("a car")]


@pytest.mark.parametrize(
    "name, text, what",
    [
        ("p.txt", "\n \n", "holds none"),
        ("p.txt", "a\nb\na\n", "line 3 of .* repeats line 1, 'a'"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"', "line 2 of .* is no JSON"),
        ("p.jsonl", '{"text": "a"}', 'must be an object with a "prompt"'),
    ],
)
def test_bad_files_are_refused_with_the_line(
    tmp_path: Path, name: str, text: str, what: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=what):
        read_prompts(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="prompts: there is no file"):
        read_prompts(tmp_path / "missing.txt")


def test_classes_are_prompts_with_labels() -> None:
    pipe = tiny_pipeline()
    cat, ship = class_prompts(pipe, ["cat", 8])
    assert (cat.text, ship.text) == ("cat", "ship")
    assert ship.metadata == {"label": 8, "class": "ship"}
    assert call_inputs(pipe, [ship, cat, ship]) == {"class_labels": [8, 3, 8]}
    assert len(class_prompts(pipe)) == 10
    with pytest.raises(ValueError, match="the prompt 'a fox' has no label"):
        call_inputs(pipe, [cat, Prompt("a fox")])
    with pytest.raises(ValueError, match="different ones"):
        class_prompts(pipe, [1, 1])


def test_pipelines_of_prompts_take_prompts() -> None:
    pipe = build("sd3").pipe
    assert call_inputs(pipe, [Prompt("a fox")]) == {"prompt": ["a fox"]}
    with pytest.raises(ValueError, match="takes prompts; give a prompt file"):
        class_prompts(pipe)
