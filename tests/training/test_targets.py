"""Training runs with k-Diff and PFGM++: resuming, freezing, what becomes of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from diffsteer.core import Kind
from diffsteer.pipelines import load_pipeline
from diffsteer.samplers.pfgmpp_schedulers import PFGMPPHeunScheduler
from diffsteer.training import Trainer, averaged_pipeline, suggest_k
from diffsteer.training.objectives import estimated_k


def lines(path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.fixture
def learning(config):
    return replace(config, objective="kdiff", k_freeze=3, k_rate=0.05, weight_decay=0.5)


@pytest.mark.parametrize("dies_after", [4, 5, 7])
def test_a_learned_k_resumes_bit_for_bit(tmp_path, images, learning, dies_after, killed_at):
    learning = replace(learning, checkpoint_every=1)
    whole = Trainer(learning, images, tmp_path / "whole")
    whole.run()
    killed_at(Trainer(learning, images, tmp_path / "cut"), dies_after)
    second = Trainer(learning, images, tmp_path / "cut")
    assert second.step == dies_after and second.run()
    assert torch.equal(whole.objective.k.logit, second.objective.k.logit)
    assert whole.k.average() == second.k.average()
    for name, value in whole.ema.average.items():
        assert torch.equal(value, second.ema.average[name]), name
    states = [run.optimizer.state_dict()["state"] for run in (whole, second)]
    assert states[0].keys() == states[1].keys()
    last = max(states[0])  # the slot of k
    assert states[0][last]["exp_avg"].shape == (1,)
    for name, value in states[0][last].items():
        assert torch.equal(value, states[1][last][name]), name


def test_a_learned_k_moves_is_logged_and_stops_before_the_end(tmp_path, images, learning):
    run = Trainer(replace(learning, log_every=1), images, tmp_path)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.5, 0.0]
    assert run.optimizer.param_groups[1]["lr"] == 0.05
    run.run()
    ks = [line["k"] for line in lines(tmp_path / "loss.jsonl")]
    assert len(set(ks[:5])) == 5 and len(set(ks[4:])) == 1  # updates 5, 6, 7 leave it
    assert ks[0] != 0.5 and 0 < ks[-1] < 1
    assert run.k.average() == pytest.approx(ks[-1], abs=1e-7)
    assert run.target()["k"] == run.k.average()


def test_the_average_starts_anew_where_k_freezes(tmp_path, images, learning):
    """Averaged over a drifting k, the weights would predict a mix of targets."""
    run = Trainer(learning, images, tmp_path)
    for _ in range(5):
        run.update()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.update()
    for name, parameter in run.model.named_parameters():
        want = torch.lerp(before[name], parameter.detach(), 0.9)  # the first step of an average
        torch.testing.assert_close(run.ema.average[name], want)


def test_auto_is_the_estimate_and_stays_it(tmp_path, images, config):
    config = replace(config, objective="kdiff", k="auto", augment_dim=4.0)
    run = Trainer(config, images, tmp_path)
    run.run()
    pixels = images.pixels.float() / 127.5 - 1
    assert run.objective.k == pytest.approx(suggest_k(pixels, patch_size=4, augment_dim=4.0))
    assert 0.5 < run.objective.k < 1
    assert averaged_pipeline(tmp_path).config.k == run.objective.k
    other = images.__class__(images.pixels // 2, images.labels, images.names)
    assert estimated_k(config, other) != run.objective.k
    again = Trainer(config, other, tmp_path, allow_change=("data",))
    assert again.objective.k == run.objective.k


CASES = {
    "kdiff learned": ({"objective": "kdiff"}, "kdiff", None),
    "kdiff 0": ({"objective": "kdiff", "k": 0}, "kdiff", None),
    "kdiff 1, D": ({"objective": "kdiff", "k": 1, "augment_dim": 64}, "kdiff", 64.0),
    "pfgmpp": ({"objective": "pfgmpp", "augment_dim": 128}, "edm", 128.0),
    "pfgmpp small D": ({"objective": "pfgmpp", "augment_dim": 1.5}, "edm", 1.5),
    "edm": ({"objective": "pfgmpp"}, "edm", None),
    "flow, D": ({"augment_dim": 4, "prediction": "velocity", "stable_targets": True}, "velocity",
                4.0),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_objective_becomes_a_folder_that_samples(tmp_path, images, config, case):
    change, prediction, dim = CASES[case]
    config = replace(config, steps=3, precision="bf16", preview_every=3, weak_at=2, **change)
    run = Trainer(config, images, tmp_path)
    run.run()
    averaged_pipeline(tmp_path).save_pretrained(tmp_path / "model")
    pipe = load_pipeline(tmp_path / "model")
    assert pipe.config.prediction == prediction and pipe.config.augment_dim == dim
    assert isinstance(pipe.scheduler, PFGMPPHeunScheduler) == (prediction == "edm" and bool(dim))
    if prediction == "kdiff":
        assert pipe.prediction_kind == Kind.kdiff(run.target()["k"])
    call = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 2.0}
    assert pipe("bee", seeds=[1, 2], **call).images.isfinite().all()
    assert (tmp_path / "previews" / "step-00000003.png").is_file()
    assert json.loads((tmp_path / "weak" / "target.json").read_text())["prediction"] == prediction


def test_a_run_starts_from_another_models_weights(tmp_path, images, config):
    config = replace(config, prediction="velocity")
    first = Trainer(config, images, tmp_path / "first")
    first.run()
    averaged_pipeline(tmp_path / "first").save_pretrained(tmp_path / "model")
    init = str(tmp_path / "model")
    run = Trainer(replace(config, objective="kdiff", init=init), images, tmp_path / "second")
    average = first.ema.average
    torch.testing.assert_close(run.model.proj_out_2.weight, -average["proj_out_2.weight"] / 2)
    torch.testing.assert_close(run.model.proj_out_1.weight, average["proj_out_1.weight"])
    assert torch.equal(run.ema.average["proj_out_2.weight"], run.model.proj_out_2.weight)
    assert run.objective.kind == Kind.kdiff(0.5)
    run.run()  # and goes on from its own checkpoint, not from the weights it began with
    again = Trainer(replace(config, objective="kdiff", init=init), images, tmp_path / "second")
    assert torch.equal(again.model.proj_out_2.weight, run.model.proj_out_2.weight)
    bad = replace(config, objective="kdiff", k=0.9, init=init)
    with pytest.raises(ValueError, match=r"no factor turns into kdiff k=0\.9"):
        Trainer(bad, images, tmp_path / "third")


def test_a_run_is_scored_on_the_way(tmp_path, images, config):
    config = replace(config, eval_every=3, eval_images=10)
    Trainer(config, images, tmp_path).run()
    scores = lines(tmp_path / "scores.jsonl")
    assert [line["step"] for line in scores] == [3, 6]
    assert all(math.isfinite(line["eval/fd-cifar"]) for line in scores)
    plain = Trainer(replace(config, eval_every=0), images, tmp_path / "plain")
    plain.run()
    one, two = (lines(folder / "loss.jsonl") for folder in (tmp_path, tmp_path / "plain"))
    assert [line["loss"] for line in one] == [line["loss"] for line in two]
