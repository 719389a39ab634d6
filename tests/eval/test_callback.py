"""Scores during training: on time, with the same seeds, the reference kept."""

from __future__ import annotations

import pytest
import torch
from eval_samples import tensors, tiny_extractor

from diffsteer.eval import EvalSuite, PeriodicEvaluation


def test_scores_come_every_so_many_steps_and_show_the_model_alone():
    suite = EvalSuite(("fd", "accuracy"), extractors=tiny_extractor())
    suite.update(tensors(30, 1), real=True)
    seen, brightness = [], [0]

    def generate(seeds):
        seen.append(list(seeds))
        images = torch.cat([tensors(1, seed) for seed in seeds])
        return images // (1 + brightness[0]), torch.tensor(seeds) % 4

    evaluation = PeriodicEvaluation(suite, generate, every=10, seeds=range(40, 65), batch_size=10)
    logs = [evaluation(step) for step in range(21)]
    assert [i for i, log in enumerate(logs) if log] == [10, 20]
    assert seen[:3] == [list(range(40, 50)), list(range(50, 60)), list(range(60, 65))]
    assert logs[10] == logs[20] and set(logs[10]) >= {"eval/fd-tiny", "eval/accuracy"}
    brightness[0] = 3
    assert evaluation(30)["eval/fd-tiny"] > logs[10]["eval/fd-tiny"]
    with pytest.raises(ValueError, match="every"):
        PeriodicEvaluation(suite, generate, every=0)
