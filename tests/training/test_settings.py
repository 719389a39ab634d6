"""Settings of runs: what makes another run, what a file may hold."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from diffsteer.training import CheckpointError, TrainConfig
from diffsteer.training.acflow import ACFlowConfig, GRPOConfig
from diffsteer.training.acflow.run_files import check_same_run
from diffsteer.training.eggroll import EggrollConfig
from diffsteer.training.settings import read_settings

BOUND = {TrainConfig: "beta2", ACFlowConfig: "critic_memory", EggrollConfig: "delta_decay"}


@pytest.mark.parametrize("config", BOUND)
def test_a_run_from_before_a_setting_existed_had_its_default(config):
    name, saved = BOUND[config], asdict(config())
    before = saved.pop(name)
    assert config().changes(saved) == {}
    assert config().changes({**saved, name: 7}) == {name: (7, before)}


@pytest.mark.parametrize("config", BOUND)
def test_settings_that_are_free_make_no_other_run(config):
    assert config().changes({**asdict(config()), "checkpoint_every": 3, "log_with": "wandb"}) == {}


@pytest.mark.parametrize("config", BOUND)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_named(config, value):
    name = "lr" if config is EggrollConfig else "learning_rate"
    with pytest.raises(ValueError, match=f"{name} must be a finite number"):
        config(**{name: value})


@pytest.mark.parametrize("text, words", [("{", "cannot read"), ("[1]", "names and values")])
def test_a_file_of_something_else_is_named(tmp_path, text, words):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{words}.*|run\.json.*{words}"):
        read_settings(tmp_path / "run.json")


@pytest.mark.parametrize("before, now", [(ACFlowConfig, GRPOConfig), (GRPOConfig, ACFlowConfig)])
def test_fine_tuning_goes_on_as_what_it_was(tmp_path, before, now):
    saved = asdict(before())
    del saved["critic_memory"]  # a run from before that setting
    (tmp_path / "config.json").write_text(json.dumps(saved))
    (tmp_path / "inputs.json").write_text("{}")
    assert check_same_run(tmp_path, before(), {}) == {}
    with pytest.raises(CheckpointError, match="of another kind"):
        check_same_run(tmp_path, now(), {})
