"""Folders that other libraries write are whole or not there, like the files of our own."""

from __future__ import annotations

import pytest
from tiny_flow import tiny_pipeline

from diffsteer.pipelines import ImageFolder, ImageRequest
from diffsteer.pipelines.files import whole_folder, write_json


def test_a_folder_takes_the_place_of_the_one_before(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    with whole_folder(tmp_path / "model") as aside:
        (aside / "new").write_text("new")
        assert (tmp_path / "model" / "old").exists()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_beginning_anew_removes_what_the_run_lists_inside_its_folder_and_nothing_else(tmp_path):
    folder, request = ImageFolder(tmp_path / "run"), ImageRequest(0, label=1)
    folder.prepare([request], {})
    outside, inside = tmp_path / "mine.png", folder.path / request.file
    inside.parent.mkdir(exist_ok=True)
    for path in (outside, inside):
        path.write_bytes(b"a picture")
    run = folder.read()
    run["images"].append({"file": "../mine.png"})  # a list that somebody has written by hand
    write_json(folder.run_file, run)
    folder.prepare([request], {}, overwrite=True)
    assert outside.exists() and not inside.exists()


def test_a_full_disk_under_safetensors_is_said_plainly_and_leaves_what_was_there(
    tmp_path, small_disk
):
    pipe = tiny_pipeline()
    with whole_folder(tmp_path / "model") as aside:
        pipe.save_pretrained(aside)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model/transformer").iterdir()}
    message = r"cannot write .*/model: .*too large.*run the same command again"
    with small_disk(2000), pytest.raises(OSError, match=message):
        with whole_folder(tmp_path / "model") as aside:
            pipe.save_pretrained(aside)
    after = {path.name: path.read_bytes() for path in (tmp_path / "model/transformer").iterdir()}
    assert before == after
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
