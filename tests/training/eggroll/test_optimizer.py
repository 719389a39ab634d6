"""E5, E10, E11: the black-box optimizer climbs, counts in units of sigma, and goes on exactly."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffsteer.training.eggroll import Eggroll, Shaped, find_layers


def linear(rows: int = 12, columns: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(columns, rows, bias=False)).eval()


def matrices(model: nn.Module, count: int) -> Tensor:
    """The weight of each member, read off its outputs at the unit vectors."""
    columns = model[0].in_features
    return model(torch.eye(columns).repeat(count, 1)).view(count, columns, -1).transpose(1, 2)


@pytest.mark.parametrize(("shaping", "rank"), [("zscore", 1), ("ranks", 4), ("sign_pairs", 1)])
def test_a_quadratic_is_solved(shaping: str, rank: int) -> None:
    model = linear()
    goal = torch.randn(12, 16)
    first = float((model[0].weight - goal).detach().square().sum())
    steps = 300
    es = Eggroll(model, sigma=0.02, population_size=256, rank=rank, fitness_shaping=shaping, lr=1.0)
    start = {"zscore": 4.0, "sign_pairs": 4.0, "ranks": 14.0}[shaping]  # ranks: deviation 0.29
    for step in range(steps):
        es.pace = replace(es.pace, lr=start * (1 - step / steps) + 1e-3)
        es.step(lambda model, count: -(matrices(model, count) - goal).square().sum((1, 2)))
    assert float((model[0].weight - goal).detach().square().sum()) < 1e-4 * first


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("population", [16, 256])
def test_an_uninformed_step_is_lr_times_sigma_in_each_entry(population: int, rank: int) -> None:
    squares = []
    for seed in range(60):
        es = Eggroll(linear(), sigma=0.03, lr=0.5, population_size=population, rank=rank, seed=seed)
        before = es.model[0].weight.detach().clone()
        es.tell(torch.randn(population, generator=torch.Generator().manual_seed(seed)))
        squares.append((es.model[0].weight - before).detach().square().mean())
    assert math.sqrt(torch.stack(squares).mean()) == pytest.approx(0.5 * 0.03, rel=0.06)


def test_a_reward_without_a_gradient_is_learnt() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).eval()
    points = torch.randn(64, 2)
    inside = points.square().sum(1) < 1.2
    graphs = []

    def accuracy(model: nn.Module, count: int) -> Tensor:
        output = model(points.repeat(count, 1)).view(count, -1)
        graphs.append(output.grad_fn)
        return ((output > 0) == inside).float().mean(1)

    with torch.no_grad():
        before = float(accuracy(model, 1))
    es = Eggroll(model, sigma=0.2, lr=0.5, population_size=64, evolve_bias=True, seed=1)
    reports = [es.step(accuracy) for _ in range(60)]
    with torch.no_grad():
        after = float(accuracy(model, 1))
    assert after > 0.9 > before + 0.15
    assert not any(graphs) and not any(p.grad is not None for p in model.parameters())
    assert [r.generation for r in reports] == list(range(1, 61))


def test_batches_of_members_change_nothing_but_rounding() -> None:
    results = []
    goal = torch.randn(12, 16)
    for options in ({}, {"member_batch_size": 4}, {"mode": "materialize"}):
        torch.manual_seed(0)
        model = linear().double()
        es = Eggroll(model, sigma=0.1, population_size=10, **options)
        sizes = [len(members) for members in es.groups()]
        assert sizes == {0: [10], 1: [4, 4, 2] if "mode" not in options else [1] * 10}[len(options)]
        for _ in range(3):
            es.step(
                lambda model, count: (
                    -(model(torch.eye(16).double().repeat(count, 1)).view(count, 16, 12) - goal.T)
                    .abs()
                    .sum((1, 2))
                )
            )
        results.append(model[0].weight.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(results[2], results[0], rtol=1e-10, atol=1e-12)


def test_a_score_a_prompt_is_centred_prompt_by_prompt() -> None:
    one, other = Eggroll(linear(), sigma=0.1), Eggroll(linear(), sigma=0.1)
    other.model.load_state_dict(one.model.state_dict())
    other.offsets = type(other.offsets)(other.layers)
    other.optimizer = torch.optim.SGD(other.offsets.parameters.values(), lr=1.0)
    scores = torch.randn(64, 3)
    one.tell(scores)
    other.tell(scores + torch.tensor([0.0, 10.0, -4.0]))
    torch.testing.assert_close(one.model[0].weight, other.model[0].weight)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_run_that_is_loaded_goes_on_to_the_same_bits(optimizer: str) -> None:
    settings = {"sigma": 0.1, "population_size": 8, "optimizer": optimizer, "lr": 0.1}
    settings |= {"sigma_decay": 0.9, "lr_decay": 0.8, "delta_decay": 0.01}

    def scores(step: int) -> Tensor:
        return torch.randn(8, generator=torch.Generator().manual_seed(step))

    def fresh() -> Eggroll:
        torch.manual_seed(5)
        return Eggroll(linear().bfloat16(), **settings)

    whole, first = fresh(), fresh()
    for step in range(6):
        whole.tell(scores(step))
        if step < 3:
            first.tell(scores(step))
    second = fresh()
    second.load_state_dict(first.state_dict())
    for step in range(3, 6):
        second.tell(scores(step))
    assert second.generation == 6 and second.sigma == pytest.approx(0.1 * 0.9**6)
    assert second.weights_hash() == whole.weights_hash()
    assert torch.equal(second.model[0].weight, whole.model[0].weight)
    assert first.weights_hash() != whole.weights_hash()


def test_offsets_in_main_memory_are_the_same_offsets() -> None:
    runs = []
    for offload in (False, True):
        torch.manual_seed(2)
        es = Eggroll(linear().bfloat16(), sigma=0.1, optimizer="adam", lr=0.01, offload=offload)
        for step in range(3):
            es.tell(torch.randn(64, generator=torch.Generator().manual_seed(step)))
        runs.append((es.weights_hash(), es.offsets.base_hash(), es.model[0].weight.clone()))
    assert runs[0][:2] == runs[1][:2] and torch.equal(runs[0][2], runs[1][2])


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
def test_offsets_stay_where_they_were_asked_to(offload: bool) -> None:
    model = linear().to("cuda", torch.bfloat16)
    before = model[0].weight.detach().clone()
    es = Eggroll(model, sigma=0.1, offload=offload)
    es.tell(torch.randn(64))
    where = {t.device.type for t in (*es.offsets.parameters.values(), *es.offsets.base.values())}
    assert where == {"cpu" if offload else "cuda"}
    assert model[0].weight.device.type == "cuda" and not torch.equal(model[0].weight, before)


def test_saved_states_of_other_runs_are_refused() -> None:
    es = Eggroll(linear(), sigma=0.1)
    state = es.state_dict()
    with pytest.raises(ValueError, match="began with other weights"):
        Eggroll(linear(), sigma=0.1).load_state_dict(state)
    with pytest.raises(ValueError, match="drew its noise with rank=1, this one has 2"):
        Eggroll(es.model, sigma=0.1, rank=2).load_state_dict(state)
    other = es.state_dict()
    other["offsets"] = {"0.weight": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"0.weight is \(3, 3\) there and \(12, 16\) here"):
        es.load_state_dict(other)


def test_caps_and_decays_hold() -> None:
    es = Eggroll(linear(), sigma=1.0, max_step_norm=0.5, max_delta_norm=0.7)
    first = es.model[0].weight.detach().clone()
    moves = []
    for _ in range(4):
        before = es.model[0].weight.detach().clone()
        report = es.tell(torch.randn(64))
        moves.append(float((es.model[0].weight - before).detach().norm()))
        assert report.step_norm == pytest.approx(0.5)
    assert moves[0] == pytest.approx(0.5, rel=1e-4)
    assert float((es.model[0].weight - first).detach().norm()) <= 0.7 * (1 + 1e-5)
    assert report.offset_norm == pytest.approx(0.7, rel=1e-5)


def test_any_torch_optimizer_takes_the_estimate() -> None:
    es = Eggroll(
        linear(),
        sigma=0.1,
        lr=0.01,
        optimizer=lambda parameters, lr: torch.optim.SGD(
            parameters, lr=lr, momentum=0.9, weight_decay=0.5
        ),
    )
    first = es.model[0].weight.detach().clone()
    es.tell(torch.randn(64))
    once = es.offsets.state_dict()["0.weight"].clone()
    torch.testing.assert_close(es.model[0].weight.detach(), first + once)
    es.offsets.parameters["0.weight"].data.zero_()
    es.offsets.write_back()
    assert torch.equal(es.model[0].weight, first)  # decay pulls to the first weights


def test_constant_fitness_takes_no_step_but_counts() -> None:
    es = Eggroll(linear(), sigma=0.1, delta_decay=0.5, optimizer="adam")
    es.tell(torch.randn(64))
    before = es.weights_hash()
    report = es.tell(torch.full((64,), 0.1))
    assert report.skipped and report.step_norm == 0 and report.generation == es.generation == 2
    assert es.weights_hash() == before
    report = es.tell(torch.full((64,), float("nan")))
    assert report.skipped and report.count == 0


def test_a_member_without_a_score_costs_its_pair() -> None:
    model = linear()
    es = Eggroll(model, sigma=0.1, population_size=8)
    scores = torch.randn(8)
    scores[2] = float("nan")
    assert es.tell(scores).count == 6
    assert model[0].weight.isfinite().all()


BAD = [
    ({"sigma": 0.0}, "sigma must be a finite number above 0, got 0.0"),
    ({"sigma": -1.0}, "sigma must be a finite number above 0"),
    ({"sigma": float("nan")}, "sigma must be a finite number above 0"),
    ({"lr": 0.0}, "lr must be a finite number above 0"),
    ({"population_size": 7}, "population_size 7 is odd"),
    ({"population_size": 0}, "population_size must be at least 2"),
    ({"member_batch_size": 3}, "member_batch_size 3 splits pairs"),
    ({"member_batch_size": 0}, "member_batch_size must be at least 1"),
    ({"rank": 0}, "rank must be at least 1"),
    ({"rank": 13}, "rank 13 is larger than 0 has room for, whose matrix is 12 x 16"),
    ({"noise_reuse": 0}, "reuse must be at least 1"),
    ({"noise_kind": "cauchy"}, "kind must be one of"),
    ({"fitness_shaping": "softmax"}, "fitness_shaping must be one of"),
    ({"mode": "loop"}, "mode must be one of lowrank, materialize"),
    ({"optimizer": "lbfgs"}, "optimizer must be one of sgd, adam, adamw"),
    ({"delta_decay": 1.0}, r"delta_decay must be in \[0, 1\)"),
    ({"max_step_norm": 0.0}, "max_step_norm must be a finite number above 0"),
    ({"target_modules": ["to_q"]}, "no Linear or Conv2d of Sequential matches"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_settings_that_cannot_work_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Eggroll(linear(), **({"sigma": 0.1} | change))


def test_scores_of_the_wrong_length_are_refused_and_nothing_moves() -> None:
    es = Eggroll(linear(), sigma=0.1)
    before = es.weights_hash()
    with pytest.raises(ValueError, match=r"gave scores of shape \(3,\) for 64 members"):
        es.step(lambda model, count: torch.zeros(3))
    with pytest.raises(ValueError, match="one finite value for each of 64 members"):
        es.tell(torch.randn(32))
    with pytest.raises(ValueError, match="with NaN or inf"):
        es.update(Shaped(torch.full((64,), float("nan")), 64, 1.0))
    assert es.generation == 0 and es.weights_hash() == before


def test_scores_may_be_a_list_of_numbers() -> None:
    es = Eggroll(linear(), sigma=0.1, population_size=4)
    assert es.step(lambda model, count: [float(i) for i in range(count)]).count == 4


def test_weights_follow_offsets_in_every_layer() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).half().eval()
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    es = Eggroll(model, sigma=0.1, evolve_bias=True, exclude=["0"])
    es.tell(torch.randn(64))
    assert (
        set(es.offsets.parameters)
        == {"2.weight", "2.bias"}
        == {
            name
            for layer in find_layers(model, biases=True, exclude="0").values()
            for name, _ in layer.parameters()
        }
    )
    for name, weight in model.named_parameters():
        assert torch.equal(weight, first[name]) == name.startswith("0.")
