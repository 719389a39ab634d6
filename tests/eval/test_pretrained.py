"""The optional networks, on tiny random weights: taps, positions, and clear errors."""

from __future__ import annotations

import builtins

import pytest
import torch
from eval_samples import tensors

from diffsteer.eval import PROTOCOLS
from diffsteer.eval.pretrained import (
    INCEPTION_STAGES,
    clip_extractor,
    dinov2_extractor,
    hub_position_table,
    inception_taps,
    load_extractor,
)


class Stage(torch.nn.Module):
    def __init__(self, name, log):
        super().__init__()
        self.name, self.log = name, log

    def forward(self, x):
        self.log.append(self.name)
        return x.mean((2, 3), keepdim=True) if self.name == "AvgPool" else x


def test_inception_gives_three_taps_in_one_pass():
    log, network = [], torch.nn.Module()
    for name in INCEPTION_STAGES:
        setattr(network, name, Stage(name, log))
    network.Mixed_6d.branch1x1 = torch.nn.Conv2d(3, 9, 1)
    network.fc = torch.nn.Linear(3, 5)
    images = torch.rand(2, 3, 17, 17)
    taps = inception_taps(network, images)
    assert log == list(INCEPTION_STAGES)
    x = (images * 255 - 128) / 128
    torch.testing.assert_close(taps.features, x.mean((2, 3)))
    torch.testing.assert_close(taps.logits, x.mean((2, 3)) @ network.fc.weight.T)
    assert taps.spatial.shape == (2, 2023)  # 17 x 17 x 7, channels last
    tap = network.Mixed_6d.branch1x1(x)
    torch.testing.assert_close(taps.spatial[:, :7], tap[:, :7, 0, 0])


def keys_cubic(t, a=-0.75):
    """PyTorch's cubic kernel (Keys 1981) at distance t from a sample."""
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def test_positions_are_sampled_where_the_hub_samples_them():
    side, grid = 37, 16
    row = torch.arange(side).float().square()
    table = torch.cat([torch.full((1, 1, 1), 9.0), row.expand(side, side).reshape(1, -1, 1)], 1)
    found = hub_position_table(table, grid)
    assert found.shape == (1, 1 + grid * grid, 1) and float(found[0, 0]) == 9
    for j in range(2, grid - 2):  # away from the border
        # A scale of 16.1 / 37 puts output column j at (j + 0.5) * 37 / 16.1 - 0.5.
        at = (j + 0.5) * side / (grid + 0.1) - 0.5
        near = range(int(at) - 1, int(at) + 3)
        expected = sum(float(row[i]) * keys_cubic(at - i) for i in near)
        assert float(found[0, 1 + j]) == pytest.approx(expected, rel=1e-4)
    assert hub_position_table(table, side) is table


@pytest.fixture
def models(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    dino = transformers.Dinov2Config(image_size=20, patch_size=2, **small)
    transformers.Dinov2Model(dino).save_pretrained(tmp_path / "dino")
    clip = transformers.CLIPVisionConfig(
        image_size=16, patch_size=8, projection_dim=5, intermediate_size=8, **small
    )
    transformers.CLIPVisionModelWithProjection(clip).save_pretrained(tmp_path / "clip")
    return tmp_path


def test_dinov2_uses_the_fixed_table(models):
    extractor = dinov2_extractor(PROTOCOLS["edm2"], "cpu", str(models / "dino"))
    assert extractor.side == 32 and extractor.resize == "torch-bicubic-aa"
    table = extractor.network.embeddings.position_embeddings
    assert table.shape == (1, 257, 8)
    assert extractor(tensors(3, size=(20, 20))).features.shape == (3, 8)
    x = torch.rand(1, 3, 32, 32)
    inside = extractor.network.embeddings.interpolate_pos_encoding(torch.zeros(1, 257, 8), 32, 32)
    assert inside is table or torch.equal(inside, table)
    assert extractor.forward(x).shape == (1, 8)
    assert dinov2_extractor(PROTOCOLS["dgm"], "cpu", str(models / "dino")).id != extractor.id


def test_clip_gives_projected_embeddings(models):
    extractor = clip_extractor(PROTOCOLS["default"], "cpu", str(models / "clip"))
    assert extractor(tensors(3)).features.shape == (3, 5)


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("torch_fidelity", "transformers"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *args, **kwargs)

    with pytest.raises(ValueError, match="resnet"):
        load_extractor("resnet", PROTOCOLS["adm"])
    with pytest.raises(ValueError, match="nowhere"):
        dinov2_extractor(PROTOCOLS["adm"], "cpu", str(tmp_path / "nowhere"))
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"diffsteer\[inception\]"):
        load_extractor("inception", PROTOCOLS["adm"])
    with pytest.raises(ImportError, match=r"diffsteer\[text\]"):
        load_extractor("dinov2", PROTOCOLS["adm"])
