"""Checkpoints are whole or not there, whatever happens while one is written."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from diffsteer.training import CheckpointError, checkpoint
from diffsteer.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from diffsteer.training.run_folder import newest_state


def state(step: int) -> dict:
    return {"step": step, "weights": torch.full((1000,), float(step)), "name": "x"}


def test_what_is_saved_comes_back_and_the_newest_are_kept(tmp_path):
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, state(step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000100"]
    back = load_checkpoint(list_checkpoints(tmp_path)[-1])
    assert back["step"] == 100 and back["name"] == "x"
    assert torch.equal(back["weights"], state(100)["weights"])
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_the_checkpoint_before_untouched(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, state(1), keep=1)

    def full(value, file):
        file.write(b"part of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint of step 2 \(No space left.*make room"):
        save_checkpoint(tmp_path, 2, state(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(list_checkpoints(tmp_path)[-1])["step"] == 1


def test_what_torch_says_of_a_full_disk_is_said_plainly(tmp_path, small_disk):
    with small_disk(2000), pytest.raises(OSError, match=r"step 2 \(File too large.*make room"):
        save_checkpoint(tmp_path, 2, state(2))
    assert list(tmp_path.iterdir()) == []
    with small_disk(2000), pytest.raises(OSError, match=r"File too large: .*note\.json"):
        checkpoint.write_json(tmp_path / "note.json", ["x"] * 2000)


def test_a_kill_while_writing_leaves_the_checkpoint_before_and_is_cleaned_up_later(tmp_path):
    save_checkpoint(tmp_path, 1, state(1))
    code = f"""
        import os, signal, torch
        from pathlib import Path
        from diffsteer.training import checkpoint
        def die(value, file):
            file.write(b"part of it"); file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.torch.save = die
        checkpoint.save_checkpoint(Path({str(tmp_path)!r}), 2, {{"step": 2}})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert any(path.name.startswith(".writing-") for path in tmp_path.iterdir())
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    save_checkpoint(tmp_path, 2, state(2))
    assert len(list(tmp_path.iterdir())) == 2


def truncate(path):
    data = (path / "state.pt").read_bytes()
    (path / "state.pt").write_bytes(data[: len(data) // 2])


def flip_a_bit(path):
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.pt").write_bytes(data)


def lose_the_note(path):
    (path / "checkpoint.json").write_text("{}")


def rename(path):
    note = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps({**note, "step": 7}))


@pytest.mark.parametrize(
    "damage, what",
    [
        (truncate, "damaged"),
        (flip_a_bit, "damaged"),
        (lose_the_note, "incomplete"),
        (lambda path: (path / "state.pt").unlink(), "incomplete"),
        (rename, "not one of a training run"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_the_remedy(tmp_path, damage, what):
    for step in (1, 2):
        last = save_checkpoint(tmp_path / "checkpoints", step, state(step))
    damage(last)
    with pytest.raises(CheckpointError, match=f"{last}.*{what}.*delete .* resume from the one bef"):
        newest_state(tmp_path)
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    assert newest_state(tmp_path)["step"] == 1


def test_a_file_that_is_no_checkpoint_is_not_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    path = save_checkpoint(tmp_path / "checkpoints", 1, {"step": 1, "bomb": Bomb()})
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_a_failed_json_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "config.json"
    checkpoint.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
