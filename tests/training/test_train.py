"""The training loop: exact resuming, what is refused, what is kept, several ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file

from diffsteer.training import (
    CheckpointError,
    LabelledImages,
    TrainConfig,
    Trainer,
    averaged_model,
    trainer,
)
from diffsteer.training.checkpoint import list_checkpoints
from diffsteer.training.data import EpochOrder
from diffsteer.training.draws import draw_batch
from diffsteer.training.ema import ExponentialMovingAverage, warmed_decay
from diffsteer.training.network import as_network, build_transformer, train_mode
from diffsteer.training.objectives import make_objective
from diffsteer.training.trainer import learning_rate_at


def everything(run: Trainer) -> dict[str, torch.Tensor]:
    """All tensors of a run's state, by name."""
    state = {f"model.{name}": value for name, value in run.model.state_dict().items()}
    state |= {f"ema.{name}": value for name, value in run.ema.state_dict().items()}
    for index, slot in run.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{name}": value for name, value in slot.items()}
    return {**state, "loss_sum": run.loss_sum}


def assert_same(one: Trainer, other: Trainer) -> None:
    a, b = everything(one), everything(other)
    assert a.keys() == b.keys()
    odd = [name for name in a if not torch.equal(a[name], b[name])]
    assert not odd, odd


def curve(out) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


# -- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dies_after", [3, 4, 7])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, images, config, dies_after, killed_at):
    whole = Trainer(config, images, tmp_path / "whole")
    assert whole.run()
    killed_at(Trainer(config, images, tmp_path / "cut"), dies_after)
    torch.manual_seed(99)  # whatever the new process draws must not matter
    second = Trainer(config, images, tmp_path / "cut")
    assert second.step == dies_after - dies_after % 3
    assert second.run()
    assert_same(whole, second)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert [step for step, _ in curve(tmp_path / "cut")] == [2, 4, 6, 8]


def test_layers_that_draw_resume_exactly_too(tmp_path, images, config, monkeypatch):
    build = trainer.build_transformer

    def with_dropout(config, classes):
        model = build(config, classes)
        model.pos_embed = torch.nn.Sequential(model.pos_embed, torch.nn.Dropout(0.3))
        return model

    monkeypatch.setattr(
        "diffsteer.training.network.initialise_transformer", lambda model: None
    )  # zero output weights would hide the dropout for the first updates
    monkeypatch.setattr(trainer, "build_transformer", with_dropout)
    whole = Trainer(config, images, tmp_path / "whole")
    whole.run()
    first = Trainer(replace(config, steps=8), images, tmp_path / "cut")
    for _ in range(3):
        first.update()
    first.checkpoint()
    second = Trainer(config, images, tmp_path / "cut")
    second.run()
    assert_same(whole, second)


def test_passes_of_an_update_change_rounding_only(tmp_path, images, config):
    runs = [
        Trainer(replace(config, accumulate=count), images, tmp_path / str(count))
        for count in (1, 4)
    ]
    for run in runs:
        for _ in range(3):
            run.update()
    a, b = (everything(run) for run in runs)
    assert a["loss_sum"].item() == pytest.approx(b["loss_sum"].item(), rel=1e-5)
    for name in a:
        if name.startswith("ema"):
            assert torch.allclose(a[name], b[name], atol=2e-4), name


def test_a_signal_stops_between_updates_with_a_checkpoint(tmp_path, images, config, monkeypatch):
    run = Trainer(config, images, tmp_path)
    update = run.update

    def signalled():
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return update()

    monkeypatch.setattr(run, "update", signalled)
    before = signal.getsignal(signal.SIGTERM)
    assert run.run() is False
    assert signal.getsignal(signal.SIGTERM) is before
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000005"


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"learning_rate": 1e-3}, {"steps": 9}, {"layers": 3}]
)
def test_a_changed_setting_is_refused_by_name_unless_allowed(tmp_path, images, config, change):
    first = Trainer(config, images, tmp_path)
    first.update()
    first.checkpoint()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    ((name, value),) = change.items()
    was = asdict(config)[name]
    with pytest.raises(CheckpointError, match=f"{name}={was}, now it is {value};.*--allow-change"):
        Trainer(replace(config, **change), images, tmp_path)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if name == "steps":
        Trainer(replace(config, **change), images, tmp_path, allow_change=("steps",))
        last = (tmp_path / "history.jsonl").read_text().splitlines()[-1]
        assert json.loads(last)["changed"] == {"steps": [8, 9]}


def test_other_data_and_unknown_names_are_refused_but_a_moved_folder_is_not(
    tmp_path, images, config
):
    Trainer(config, images, tmp_path).checkpoint()
    other = LabelledImages(images.pixels.flip(0), images.labels, images.names)
    with pytest.raises(CheckpointError, match="data="):
        Trainer(config, other, tmp_path)
    with pytest.raises(ValueError, match="allow_change names 'step'; the settings are"):
        Trainer(config, images, tmp_path, allow_change=("step",))
    Trainer(replace(config, data="elsewhere", checkpoint_every=5), images, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_kept(tmp_path, images, config):
    def broken(network, clean, noise, level, labels):
        return network(clean, 1000 * level.sigma, labels).flatten(1).mean(1) * float("nan")

    broken.draw = make_objective(config).draw
    run = Trainer(replace(config, checkpoint_every=100), images, tmp_path, objective=broken)
    with pytest.raises(FloatingPointError, match=r"after 2 updates.*--learning-rate"):
        run.run()
    assert not list_checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize(
    "name, value, what",
    [
        ("steps", 0, "at least 1"),
        ("batch_size", -1, "at least 1"),
        ("label_dropout", 1.0, r"in \[0, 1\)"),
        ("learning_rate", float("nan"), "finite"),
        ("clip", 0.0, "positive"),
        ("prediction", "epsilon", "one of denoised, velocity"),
        ("resolution", 30, "multiple of patch_size 4"),
        ("weak_at", -1, "0 or more"),
    ],
)
def test_settings_out_of_range_are_named(name, value, what):
    with pytest.raises(ValueError, match=f"{name} must be .*{what}"):
        TrainConfig(**{name: value})


def test_a_batch_that_cannot_be_split_is_refused(tmp_path, images, config):
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of 3 .*got 8"):
        Trainer(replace(config, accumulate=3), images, tmp_path)


# -- what an update is made of -------------------------------------------------------------------


def batch_of(images, step=0, **change):
    settings = {"batch_size": 8, "seed": 0, "flip": True, "label_dropout": 0.5, **change}
    order = EpochOrder(len(images), settings["seed"])
    objective = make_objective(TrainConfig())
    device = torch.device("cpu")
    return draw_batch(
        step, images=images, order=order, objective=objective, device=device, **settings
    )


def test_a_batch_is_a_function_of_seed_and_step(images):
    a, again, later, other = (batch_of(images, step, seed=s) for step, s in
                              ((2, 0), (2, 0), (3, 0), (2, 1)))  # fmt: skip
    for name in ("clean", "noise", "labels"):
        assert torch.equal(getattr(a, name), getattr(again, name))
    for batch in (later, other):
        assert not torch.equal(a.noise, batch.noise) and not torch.equal(a.clean, batch.clean)


def test_the_parts_of_a_batch_are_the_batch(images):
    whole = batch_of(images)
    parts = [whole.part(index, 4) for index in range(4)]
    assert torch.equal(torch.cat([part.clean for part in parts]), whole.clean)
    assert torch.equal(torch.cat([part.level.sigma for part in parts]), whole.level.sigma)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


def test_an_epoch_of_batches_holds_every_image_once_with_its_label(images):
    batches = [batch_of(images, step, flip=False, label_dropout=0.0) for step in range(3)]
    seen = torch.cat([batch.clean for batch in batches]).flatten(1)
    known = images.take(torch.arange(24), torch.zeros(24, dtype=torch.bool))[0].flatten(1)
    match = (seen[:, None] == known[None]).all(2)
    assert torch.equal(match.sum(0), torch.ones(24, dtype=torch.long))
    labels = torch.cat([batch.labels for batch in batches])
    assert torch.equal(labels, images.labels[match.int().argmax(1)])


def test_labels_are_dropped_to_the_null_class_at_the_asked_rate(images):
    labels = torch.cat([batch_of(images, step, label_dropout=0.25).labels for step in range(250)])
    share = (labels == 3).float().mean().item()
    assert share == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)
    assert labels.unique().tolist() == [0, 1, 2, 3]


def test_the_rate_rises_and_falls_linearly():
    config = TrainConfig(steps=100, warmup=10, learning_rate=1.0)
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:] == pytest.approx([(100 - step) / 90 for step in range(10, 100)])


# -- the average ---------------------------------------------------------------------------------


def test_the_average_is_the_weighted_sum_of_what_it_saw():
    layer = torch.nn.Linear(1, 1, bias=False)
    seen = torch.randn(6, generator=torch.Generator().manual_seed(0))
    layer.weight.data.fill_(seen[0])
    ema = ExponentialMovingAverage(layer, decay=0.5)
    known = seen[0].item()
    for step, value in enumerate(seen[1:].tolist()):
        layer.weight.data.fill_(value)
        ema.update(layer, step)
        decay = warmed_decay(step, 0.5)
        known = decay * known + (1 - decay) * value
    ema.copy_to(layer)
    assert layer.weight.item() == pytest.approx(known, rel=1e-6)
    assert warmed_decay(0, 0.999) == pytest.approx(0.1) and warmed_decay(10**5, 0.999) == 0.999


def test_an_average_of_another_model_is_refused():
    ema = ExponentialMovingAverage(torch.nn.Linear(2, 2), decay=0.9)
    with pytest.raises(ValueError, match=r"another model; differing parameters: .*weight"):
        ema.load_state_dict({"bias": torch.zeros(2)})


# -- the network ---------------------------------------------------------------------------------


def test_a_fresh_network_says_zero_and_its_blocks_are_the_identity(config):
    model = build_transformer(config, classes=3)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 900.0]), torch.tensor([0, 3])
    output = as_network(model, bf16=False)(x, t, y)
    assert torch.equal(output, torch.zeros_like(x))
    tokens = model.pos_embed(x)
    for block in model.transformer_blocks:
        after = block(
            tokens, timestep=torch.tensor([3.0, 900.0]), class_labels=torch.tensor([0, 3])
        )
        assert torch.equal(after, tokens)


def test_labels_are_not_dropped_a_second_time_inside_the_network(config):
    """In plain train mode diffusers would: then repeated calls differ."""
    model = build_transformer(config, classes=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, t, y = torch.randn(64, 3, 8, 8), torch.full((64,), 500.0), torch.zeros(64, dtype=torch.long)
    network = as_network(model, bf16=False)
    model.train()
    assert not torch.equal(network(x, t, y), network(x, t, y))
    train_mode(model)
    assert model.training and torch.equal(network(x, t, y), network(x, t, y))


def test_training_learns_what_there_is_to_learn(tmp_path, config):
    """One flat colour a class: the loss falls far below that of a network that knows nothing."""
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    flat = LabelledImages(pixels.contiguous(), torch.arange(2), ("black", "white"))
    config = replace(config, steps=60, learning_rate=5e-3, weak_at=10, preview_every=60)
    run = Trainer(replace(config, log_every=10), flat, tmp_path)
    run.run()
    losses = [loss for _, loss in curve(tmp_path)]
    assert losses[0] > 1 and losses[-1] < 0.35 * losses[0]
    assert (tmp_path / "previews" / "step-00000060.png").is_file()
    saved = averaged_model(tmp_path)
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, run.ema.average[name])
    weak = type(run.model).from_pretrained(tmp_path / "weak")
    assert weak.proj_out_2.weight.abs().max() > 0
    assert not torch.equal(weak.proj_out_2.weight, saved.proj_out_2.weight)
    stored = load_file(tmp_path / "weak" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}


def test_there_is_nothing_to_save_before_the_first_checkpoint(tmp_path, images, config):
    with pytest.raises(FileNotFoundError, match="no training run"):
        averaged_model(tmp_path)
    Trainer(config, images, tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        averaged_model(tmp_path)


# -- several ranks -------------------------------------------------------------------------------

RANKS = """
import json, sys, torch
from pathlib import Path
from diffsteer.training import LabelledImages, TrainConfig, Trainer
pixels, out, config = torch.load(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
images = LabelledImages(pixels, torch.arange(24) % 3, ("ant", "bee", "cat"))
run = Trainer(TrainConfig(**config), images, out)
assert run.accelerator.num_processes == 2
run.run()
"""


@pytest.mark.slow
def test_two_ranks_train_like_one(tmp_path, images, config):
    """With a learned k, whose gradient is shared outside of the wrapped network."""
    config = replace(config, objective="kdiff", k_rate=0.05, k_freeze=2)
    whole = Trainer(config, images, tmp_path / "one")
    whole.run()
    torch.save(images.pixels, tmp_path / "pixels.pt")
    (tmp_path / "ranks.py").write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = [tmp_path / name for name in ("ranks.py", "pixels.pt", "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *map(str, paths), json.dumps(asdict(config))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [step for step, _ in two] == [2, 4, 6, 8]
    for (_, a), (_, b) in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    ks = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "loss.jsonl").read_text().splitlines()
        ks.append([json.loads(line)["k"] for line in lines])
    assert ks[0] == pytest.approx(ks[1], rel=1e-4) and ks[0][0] != ks[0][1]
    back = Trainer(config, images, tmp_path / "two")  # and one rank takes over from two
    assert back.step == config.steps
