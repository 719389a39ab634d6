"""E2, E3, E7, E12: the estimate is the sum it stands for; offsets keep what bfloat16 drops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffsteer.training.eggroll import (
    NoiseFormat,
    Shaped,
    es_gradient,
    find_layers,
    perturbed,
    shape_fitness,
    update,
    weights_hash,
)
from diffsteer.training.eggroll.forward import member_deltas
from diffsteer.training.eggroll.update import Offsets


def shaped_of(values: torch.Tensor) -> Shaped:
    return Shaped(values.double(), len(values), 1.0)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_estimate_is_the_naive_sum(rank, antithetic, kind, explicit, monkeypatch) -> None:
    monkeypatch.setattr(update, "CHUNK", 20)  # several chunks, the last one shorter
    model = nn.Sequential(nn.Linear(7, 5), nn.Conv2d(4, 6, 3)).double().eval()
    noise = NoiseFormat(3, rank=rank, antithetic=antithetic, kind=kind)
    values, alone = torch.randn(58).double(), explicit(model, noise, 4, 1.0)
    for name, layer in find_layers(model).items():
        weight = layer.module.weight
        naive = sum(f * alone.perturbation(name, weight, i) for i, f in enumerate(values))
        got = es_gradient(noise, layer, 4, 0.3, shaped_of(values))[f"{name}.weight"]
        torch.testing.assert_close(got, 0.3 / math.sqrt(58) * naive, rtol=1e-9, atol=1e-11)


def test_a_few_members_span_a_few_ranks(mlp) -> None:
    layer = find_layers(nn.Sequential(nn.Linear(20, 30)).double())["0"]
    for antithetic, pairs in ((True, 2), (False, 4)):
        noise = NoiseFormat(0, rank=3, antithetic=antithetic)
        got = es_gradient(noise, layer, 0, 1.0, shaped_of(torch.randn(4)))["0.weight"]
        assert torch.linalg.matrix_rank(got) == 3 * pairs


def test_biases_get_full_noise_and_the_same_sign(mlp) -> None:
    layers = find_layers(mlp, biases=True)
    noise, values = NoiseFormat(1), torch.tensor([0.0, 0.0, 2.0, 0.0])
    for name, layer in layers.items():
        got = es_gradient(noise, layer, 0, 0.1, shaped_of(values))
        member = member_deltas(layer, 2, noise, 0, 0.1)
        assert set(got) == set(member) == {f"{name}.weight", f"{name}.bias"}
        for key in got:  # one member with weight 2: its own perturbation, 2 / sqrt(4) of it
            torch.testing.assert_close(got[key], member[key])


def test_what_the_forward_pass_adds_is_what_the_update_learns_of(mlp) -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    layer, noise = find_layers(mlp, ["0"])["0"], NoiseFormat(8, rank=2)
    only = torch.tensor([0.0, 0, 0, 0, 0, 1.0])
    inner = nn.Sequential(mlp[0]).eval()
    options = {"noise": noise, "step": 2, "sigma": 0.7, "rows_per_member": 2}
    with perturbed(inner, [5], layers={"0": layer}, **options):
        moved = inner(x) - nn.functional.linear(x, mlp[0].weight, mlp[0].bias)
    learnt = es_gradient(noise, layer, 2, 0.7, shaped_of(only))["0.weight"] * math.sqrt(6)
    torch.testing.assert_close(moved, x @ learnt.T, rtol=1e-9, atol=1e-12)


def test_pairs_with_equal_scores_cancel_to_the_last_bit() -> None:
    layer = find_layers(nn.Sequential(nn.Linear(9, 9)))["0"]
    values = torch.randn(300).repeat_interleave(2)
    got = es_gradient(NoiseFormat(0), layer, 0, 0.1, shaped_of(values))["0.weight"]
    assert not got.any()
    constant = shape_fitness(torch.full((8,), 0.3))
    assert not es_gradient(NoiseFormat(0), layer, 0, 0.1, constant)["0.weight"].any()


def test_the_size_of_chunks_changes_rounding_only(monkeypatch) -> None:
    layer, noise = find_layers(nn.Sequential(nn.Linear(40, 30)))["0"], NoiseFormat(0, rank=2)
    values = torch.randn(500)
    whole = es_gradient(noise, layer, 0, 0.1, shaped_of(values))["0.weight"]
    again = es_gradient(noise, layer, 0, 0.1, shaped_of(values))["0.weight"]
    assert torch.equal(whole, again)
    monkeypatch.setattr(update, "CHUNK", 6)
    parts = es_gradient(noise, layer, 0, 0.1, shaped_of(values))["0.weight"]
    assert not torch.equal(whole, parts)
    assert (whole - parts).abs().max() < 1e-6 * whole.abs().max() * 10


def test_offsets_keep_steps_that_bfloat16_would_lose() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).bfloat16()
    model[0].weight.data.fill_(0.02)
    base = model[0].weight.detach().float().clone()
    offsets = Offsets(find_layers(model))
    naive = base.bfloat16()
    for _ in range(100):
        offsets.parameters["0.weight"].data += 1e-5
        offsets.write_back()
        naive += 1e-5
    assert torch.equal(naive.float(), base)
    torch.testing.assert_close(model[0].weight.float(), base + 1e-3, rtol=4e-3, atol=0)


def test_offsets_shrink_towards_the_first_weights_and_under_a_cap(mlp) -> None:
    first = mlp[0].weight.detach().clone()
    offsets = Offsets(find_layers(mlp))
    for offset in offsets.parameters.values():
        offset.data += 1.0
    offsets.decay(0.25)
    assert all((offset == 0.75).all() for offset in offsets.parameters.values())
    offsets.limit(2.0)
    total = sum(float(offset.square().sum()) for offset in offsets.state_dict().values())
    assert math.sqrt(total) == pytest.approx(2.0)
    before = offsets.state_dict()
    offsets.limit(3.0)
    assert all(torch.equal(before[k], v) for k, v in offsets.state_dict().items())
    offsets.write_back()
    torch.testing.assert_close(mlp[0].weight, first + before["0.weight"])


def test_the_hash_sees_every_bit_and_its_place() -> None:
    tensors = [torch.randn(50), torch.randn(3, 4).bfloat16()]
    known = weights_hash(tensors)
    assert known == weights_hash([t.clone() for t in tensors]) and 0 <= known < 2**64
    flipped = tensors[0].clone()
    flipped[17] = torch.nextafter(flipped[17], torch.tensor(9.0))
    swapped = tensors[0].clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert len({known, *(weights_hash([t, tensors[1]]) for t in (flipped, swapped))}) == 3
    assert weights_hash([torch.zeros(3)]) != weights_hash([torch.tensor([0.0, -0.0, 0.0])])
    pair = [torch.ones(2), torch.zeros(2)]
    assert weights_hash(pair) != weights_hash(pair[::-1])
