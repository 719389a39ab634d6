"""E1, E9: a population in one batch computes what each member would alone, and leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from diffsteer.training.eggroll import BASELINE, NoiseFormat, find_layers, perturbed

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def run(model, x, members, rows=None, **changes):
    options = {"noise": NoiseFormat(5, rank=2), "step": 3, "sigma": 0.1, "rows_per_member": rows}
    with perturbed(model, members, **(options | changes)):
        return model(x)


@pytest.mark.parametrize(
    ("name", "rank", "copies"), [("sd3", 1, 2), ("sd3", 3, 1), ("dit", 1, 2), ("unet", 2, 2)]
)
def test_a_batch_of_members_equals_explicit_weights(
    name, rank, copies, network, explicit, rows_of_arguments
) -> None:
    net = network(name)
    members, k = [4, 1, 0, BASELINE], 2
    noise = NoiseFormat(seed=9, rank=rank)
    rows = copies * len(members) * k
    arguments = net.arguments(rows)
    with perturbed(net.model, members, noise=noise, step=6, sigma=0.05, rows_per_member=k):
        together = net(net.model, arguments)
    alone = explicit(net.model, noise, 6, 0.05)
    plain = net(net.model, arguments)
    for place, member in enumerate(members):
        mine = [c * len(members) * k + place * k + i for c in range(copies) for i in range(k)]
        expected = net(alone.member(member), rows_of_arguments(arguments, mine))
        torch.testing.assert_close(together[mine], expected, **TIGHT)
        moved = (expected - plain[mine]).abs().mean()
        assert (moved > 1e-3) == (member != BASELINE)


CONVOLUTIONS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    "patches": {"kernel_size": 4, "stride": 4},
    "pointwise": {"kernel_size": 1},
    "pointwise stride": {"kernel_size": 1, "stride": 2},
    "dilated same": {"kernel_size": 3, "dilation": 2, "padding": "same"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "pointwise grouped": {"kernel_size": 1, "groups": 2},
    "oblong": {"kernel_size": (1, 3), "padding": (0, 1)},
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_every_kind_of_convolution_is_exact(kind, layout, explicit) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, **CONVOLUTIONS[kind])).double().eval()
    model.to(memory_format=layout)
    x = torch.randn(12, 4, 8, 8, dtype=torch.float64).to(memory_format=layout)
    got = run(model, x, [2, 3, 7], 2)  # two copies
    alone = explicit(model, NoiseFormat(5, rank=2), 3, 0.1)
    for place, member in enumerate([2, 3, 7]):
        mine = [2 * place, 2 * place + 1, 6 + 2 * place, 6 + 2 * place + 1]
        torch.testing.assert_close(got[mine], alone.member(member)(x[mine]), **TIGHT)


def test_rows_with_any_number_of_dimensions_and_strides(explicit) -> None:
    model = nn.Linear(4, 3).double().eval()
    wrapped = nn.Sequential(model).eval()
    alone = explicit(wrapped, NoiseFormat(5, rank=2), 3, 0.1)
    flat = torch.randn(6, 4, dtype=torch.float64)
    deep = torch.randn(6, 2, 5, 4, dtype=torch.float64)
    turned = torch.randn(6, 4, 5, dtype=torch.float64).transpose(1, 2)
    for x in (flat, deep, turned, torch.randn(1, 7, 4).double().expand(6, 7, 4)):
        got = run(wrapped, x, [0, 1, 5])
        for place, member in enumerate([0, 1, 5]):
            mine = slice(2 * place, 2 * place + 2)
            torch.testing.assert_close(got[mine], alone.member(member)(x[mine]), **TIGHT)


def test_tokens_folded_into_the_batch_stay_with_their_member(explicit) -> None:
    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x.flatten(0, 1)).view(x.shape)

    model = Folding().double().eval()
    x = torch.randn(8, 3, 4, dtype=torch.float64)
    got = run(model, x, [0, 1], rows=2)
    alone = explicit(model, NoiseFormat(5, rank=2), 3, 0.1)
    for place in (0, 1):
        mine = [2 * place, 2 * place + 1, 4 + 2 * place, 5 + 2 * place]
        torch.testing.assert_close(got[mine], alone.member(place)(x[mine]), **TIGHT)


@pytest.mark.parametrize("antithetic", [True, False])
def test_materialised_members_are_the_same_members(antithetic, mlp) -> None:
    noise = NoiseFormat(1, antithetic=antithetic)
    biased = {"layers": find_layers(mlp, biases=True), "noise": noise}
    x = torch.randn(4, 3, dtype=torch.float64)
    members = [3, 0, BASELINE, 2]
    together = run(mlp, x.repeat(4, 1), members, **biased).view(4, 4, 2)
    for rows, member in zip(together, members, strict=True):
        alone = run(mlp, x, [member], mode="materialize", **biased)
        torch.testing.assert_close(rows, alone, **TIGHT)
    assert torch.equal(together[2], mlp(x))


def test_without_sigma_nothing_is_touched(network) -> None:
    net = network("dit", torch.float32)
    arguments = net.arguments(4)
    before = net(net.model, arguments)
    for mode, members in (("lowrank", [0, 1]), ("materialize", [0])):
        options = {"noise": NoiseFormat(0), "step": 0, "sigma": 0.0, "mode": mode}
        with perturbed(net.model, members, rows_per_member=2, **options):
            assert torch.equal(net(net.model, arguments), before)


@pytest.mark.parametrize("mode", ["lowrank", "materialize"])
def test_the_model_is_as_it_was_also_after_an_error(mode, mlp) -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    before, kinds = mlp(x), [type(m) for m in mlp.modules()]
    state, weights = copy.deepcopy(mlp.state_dict()), [p.data_ptr() for p in mlp.parameters()]
    with pytest.raises(KeyError):
        with perturbed(
            mlp, [0], noise=NoiseFormat(0), step=0, sigma=1, rows_per_member=2, mode=mode
        ):
            assert not torch.equal(mlp(x), before)
            assert mlp.state_dict().keys() == state.keys()
            raise KeyError
    assert [type(m) for m in mlp.modules()] == kinds
    assert [p.data_ptr() for p in mlp.parameters()] == weights
    assert all(torch.equal(v, state[k]) for k, v in mlp.state_dict().items())
    assert torch.equal(mlp(x), before)
    assert not mlp._forward_pre_hooks and "_eggroll" not in vars(mlp[0])


def test_nothing_has_a_gradient(mlp) -> None:
    got = run(mlp, torch.randn(4, 3, dtype=torch.float64), [0, 1])
    assert got.grad_fn is None and torch.is_grad_enabled()


def test_half_precision_and_autocast_stay_near_the_exact_result(explicit) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(4, 9, 64)
    exact = run(copy.deepcopy(model).double(), x.double(), [0, 1]).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(model, x, [0, 1])
    half = run(copy.deepcopy(model).bfloat16(), x.bfloat16(), [0, 1])
    plain = (model.bfloat16()(x.bfloat16()).float() - model.float()(x)).abs().max()
    assert cast.dtype == half.dtype == torch.bfloat16
    for got in (cast, half):
        assert (got.float() - exact).abs().max() < 3 * plain + 0.02


def test_a_call_with_and_one_without_guidance_copies_may_mix(mlp, explicit) -> None:
    x = torch.randn(8, 3, dtype=torch.float64)
    with perturbed(mlp, [0, 1], noise=NoiseFormat(0), step=0, sigma=0.1, rows_per_member=2):
        double, single = mlp(x), mlp(x[:4])
    torch.testing.assert_close(double[:4], single, **TIGHT)
    alone = explicit(mlp, NoiseFormat(0), 0, 0.1)
    torch.testing.assert_close(double[4:6], alone.member(0)(x[4:6]), **TIGHT)


def test_a_compiled_model_computes_the_same(mlp) -> None:
    x = torch.randn(8, 3, dtype=torch.float64)
    expected = run(mlp, x, [0, 1, 2, 3])
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    plain = compiled(x)
    for members, step in (([0, 1, 2, 3], 3), ([3, 2], 3), ([0, 1, 2, 3], 4)):
        got = run(compiled, x, members, step=step)
        torch.testing.assert_close(got, run(mlp, x, members, step=step), **TIGHT)
    torch.testing.assert_close(run(compiled, x, [0, 1, 2, 3]), expected, **TIGHT)
    assert torch.equal(compiled(x), plain)


def test_members_of_the_next_generation_need_no_new_compilation(mlp) -> None:
    seen = []

    def counting(graph, example_inputs):
        seen.append(graph)
        return graph.forward

    x = torch.randn(8, 3, dtype=torch.float64)
    compiled = torch.compile(mlp, backend=counting, fullgraph=True)
    outputs = [run(compiled, x, [0, 1, 2, 3], step=step) for step in range(5)]
    assert len(seen) <= 2
    for step, output in enumerate(outputs):
        torch.testing.assert_close(output, run(mlp, x, [0, 1, 2, 3], step=step), **TIGHT)


def test_a_model_compiled_in_place_is_told_its_copies(mlp) -> None:
    x = torch.randn(8, 3, dtype=torch.float64)
    expected = run(mlp, x, [0, 1], rows=2)
    mlp.compile(backend="eager")
    mlp(x)
    with pytest.raises(ValueError, match="pass copies=1, or copies=2"):
        run(mlp, x, [0, 1])
    torch.testing.assert_close(run(mlp, x, [0, 1], copies=2), expected, **TIGHT)
