"""Models whose rows cannot be told apart, or whose fitness would be about something else."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import nn

from diffsteer.training.eggroll import Eggroll, NoiseFormat, find_layers, perturbed


def inside(model: nn.Module, members=(0, 1), rows=None, **changes):
    options = {"noise": NoiseFormat(0), "step": 0, "sigma": 0.1, "rows_per_member": rows}
    return perturbed(model, list(members), **(options | changes))


def test_a_model_without_layers_that_match() -> None:
    with pytest.raises(ValueError, match="its layers are: none at all"):
        find_layers(nn.Sequential(nn.ReLU()))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"matches target=\['0'\] with exclude=\['0'\].*: 0, 1"):
        find_layers(model, ["0"], ["0"])


def test_targets_are_named_as_in_peft(network) -> None:
    model = network("sd3").model
    every = set(find_layers(model))
    assert set(find_layers(model, ["to_q"])) == {n for n in every if n.endswith(".to_q")} != set()
    assert set(find_layers(model, r".*blocks\.1\..*")) == {n for n in every if "blocks.1." in n}
    assert set(find_layers(model, exclude=["proj"])) == {n for n in every if ".proj" not in n}
    assert not {n for n in find_layers(model, exclude=r"transformer_blocks.*") if "blocks" in n}


def test_names_do_not_depend_on_wrappers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    inner = nn.Sequential(model[0], torch.compile(model[1], backend="eager"))
    assert list(find_layers(torch.compile(inner, backend="eager"))) == list(find_layers(model))


def test_tied_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight are one parameter"):
        find_layers(model)
    shared = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="are one parameter: tied weights"):
        find_layers(nn.Sequential(shared, nn.ReLU(), shared))
    embedded = nn.ModuleDict({"tokens": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    embedded["head"].weight = embedded["tokens"].weight
    with pytest.raises(ValueError, match=r"tokens\.weight and head\.weight"):
        find_layers(embedded)


def test_quantised_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"the weight of 0 is torch\.int8"):
        find_layers(model)


def test_dropout_left_on(mlp) -> None:
    model = nn.Sequential(mlp, nn.Dropout(0.5)).eval()
    with inside(model):
        pass
    model[1].train()
    with pytest.raises(ValueError, match=r"1 is in training mode.*model\.eval\(\)"):
        with inside(model):
            pass
    with pytest.raises(ValueError, match="is in training mode"):
        Eggroll(model, sigma=0.1)


def test_projections_fused_after_the_start(network) -> None:
    net = network("sd3")
    layers = find_layers(net.model)
    net.model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="add_k_proj is not the layer any more that it was"):
        with inside(net.model, layers=layers):
            pass
    fused = find_layers(net.model)
    assert any(name.endswith(".to_qkv") for name in fused)
    assert not any(name.endswith((".to_q", ".to_k", ".add_v_proj")) for name in fused)


def test_projections_fused_before_the_start_evolve_as_one(network) -> None:
    net = network("sd3")
    net.model.fuse_qkv_projections()
    arguments = net.arguments(2)
    plain = net(net.model, arguments)
    with inside(net.model, rows=1):
        assert not torch.equal(net(net.model, arguments), plain)


def test_a_layer_replaced_after_the_start(mlp) -> None:
    layers = find_layers(mlp)
    mlp[0] = nn.Linear(3, 8).double().eval()
    with pytest.raises(ValueError, match="0 is not the layer any more"):
        with inside(mlp, layers=layers):
            pass


def test_forward_chunking(network) -> None:
    net = network("sd3")
    for block in net.model.transformer_blocks:
        block.set_chunk_feed_forward(1, dim=0)
    with pytest.raises(ValueError, match=r"transformer_blocks\.0 feeds its layers slices"):
        with inside(net.model):
            pass
    with inside(net.model, [0], mode="materialize"):
        net(net.model, net.arguments(2))
    with inside(net.model, layers=find_layers(net.model, ["norm_out.linear"])):
        net(net.model, net.arguments(2))


def test_multihead_attention_uses_weights_behind_the_back_of_layers() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2, batch_first=True)).eval()
    with pytest.raises(ValueError, match=r"0 is an nn\.MultiheadAttention"):
        with inside(model):
            pass
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        plain = model[0](x, x, x)[0]
        with inside(model, [0], mode="materialize"):
            assert not torch.equal(model[0](x, x, x)[0], plain)


def test_a_forward_that_was_replaced(mlp) -> None:
    mlp[0].forward = mlp[0].forward
    with pytest.raises(ValueError, match="the forward of 0 was replaced"):
        with inside(mlp):
            pass


def test_rows_that_are_shared_between_members() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.clock = nn.Linear(3, 3), nn.Linear(2, 3)

        def forward(self, x):
            return self.body(x) + self.clock(torch.ones(1, 2))

    model = Shared().eval()
    with pytest.raises(ValueError, match=r"clock got an input of shape \(1, 2\).*excluded"):
        with inside(model):
            model(torch.randn(4, 3))
    with inside(model, layers=find_layers(model, exclude=["clock"])):
        model(torch.randn(4, 3))


def test_tokens_before_the_batch() -> None:
    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x.transpose(0, 1)).transpose(0, 1)

    with pytest.raises(ValueError, match=r"layer got an input of shape \(6, 4, 3\)"):
        with inside(model := TokensFirst().eval()):
            model(torch.randn(4, 6, 3))


def test_batches_that_do_not_divide_by_members(mlp) -> None:
    x = torch.randn(6, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="6 rows, which is no multiple of 4 members"):
        with inside(mlp, range(4)):
            mlp(x)
    with pytest.raises(ValueError, match="no multiple of 2 members x 2 rows each"):
        with inside(mlp, rows=2):
            mlp(x)
    with pytest.raises(ValueError, match="without a tensor that has a batch dimension"):
        with inside(model := nn.Sequential(nn.Identity(), mlp).eval()):
            model(None)


def test_layers_that_take_no_part(mlp) -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)}).eval()
    model.forward = lambda x: model["used"](x)
    with pytest.raises(ValueError, match=r"1 layers took no part in the forward pass \(idle\)"):
        with inside(model):
            model(torch.randn(2, 3))
    with inside(mlp):
        pass  # not called at all: nothing to complain of


def test_contexts_do_not_nest(mlp) -> None:
    with inside(mlp):
        with pytest.raises(ValueError, match="already perturbed"):
            with inside(mlp):
                pass
        mlp(torch.randn(2, 3).double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": -0.1}, "sigma must be a finite number of at least 0"),
        ({"members": []}, "at least one member"),
        ({"members": [0, 1], "mode": "materialize"}, "one member at a time, got 2"),
        ({"members": [-3]}, "members are numbered from 0"),
        ({"mode": "vmap"}, "mode must be one of"),
        ({"rows": 0}, "rows_per_member must be at least 1"),
        ({"copies": 0}, "copies must be at least 1"),
    ],
)
def test_arguments_out_of_range(change, message, mlp) -> None:
    with pytest.raises(ValueError, match=message):
        with inside(mlp, **change):
            pass


def test_a_whole_pipeline_with_guidance_keeps_members_apart() -> None:
    from tiny_pipelines import build

    tiny = build("dit")
    options = {"noise": NoiseFormat(3), "step": 1, "sigma": 0.1, "rows_per_member": 2}

    def images(labels, seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return tiny.call(class_labels=labels, generator=generators)

    members = [0, 1, 4]
    with perturbed(tiny.pipe.transformer, members, **options):
        together = images([1, 2] * 3, [7, 8] * 3)
    for place, member in enumerate(members):
        with perturbed(tiny.pipe.transformer, [member], **(options | {"mode": "materialize"})):
            alone = images([1, 2], [7, 8])
        torch.testing.assert_close(together[2 * place : 2 * place + 2], alone, rtol=1e-3, atol=1e-3)
    assert isinstance(tiny.pipe.transformer, diffusers.DiTTransformer2DModel)
    assert (together[0] - together[2]).abs().max() > 0.05
