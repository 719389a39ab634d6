"""The embedded model: found without a network, complete, and the loaders' errors."""

from __future__ import annotations

import pytest
import torch
from tiny_flow import NAMES, tiny_dit, tiny_pipeline

from diffsteer import Kind, load_embedded
from diffsteer.pipelines import embedded, load_embedded_weak, load_pipeline, model_digest


@pytest.fixture
def tiny_weights(tmp_path, monkeypatch):
    """Tiny random weights in the place of the real ones."""
    tiny_pipeline("denoised").to(torch.float16).save_pretrained(tmp_path / "model")
    tiny_dit(num_layers=1).half().save_pretrained(tmp_path / "weak")
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path)
    return tmp_path


def test_half_precision_files_give_the_dtype_asked_for(tiny_weights):
    pipe, half = load_embedded(), load_embedded(dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.float32 and half.transformer.dtype == torch.bfloat16
    assert pipe.prediction_kind == Kind.DENOISED and pipe.id2label == NAMES
    weight = next(pipe.transformer.parameters())
    stored = next(tiny_dit().parameters()).half().float()
    assert torch.equal(weight, stored)
    weak = load_embedded_weak(dtype=torch.bfloat16, device="cpu")
    assert weak.dtype == torch.bfloat16 and len(weak.transformer_blocks) == 1


def test_by_name_it_is_a_model_like_any_other(tiny_weights):
    pipe = load_pipeline("embedded")
    other = load_pipeline(tiny_weights / "model")
    call = {"seeds": [4], "num_inference_steps": 2, "output_type": "latent"}
    assert torch.equal(pipe("cat", **call).images, other("cat", **call).images)
    assert model_digest("embedded") == model_digest(tiny_weights / "model")


def test_missing_weights_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path)
    for load in (load_embedded, load_embedded_weak):
        with pytest.raises(FileNotFoundError, match=r"embedded weights are missing.*reinstall"):
            load()


def test_the_shipped_model_makes_images_of_its_classes():
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    assert pipe.id2label == NAMES
    call = {"seeds": [0, 1], "num_inference_steps": 4, "output_type": "latent"}
    images = pipe(["cat", "truck"], guidance_scale=2.0, **call).images
    assert images.shape == (2, 3, 32, 32)
    # A trained model ends near the pixels' range; random weights leave it at once.
    assert 0.2 < float(images.std()) < 1.0
    plain = pipe(["cat", "truck"], **call).images
    assert not torch.allclose(images, plain, atol=0.01)


def test_the_weak_model_fits_the_strong_one():
    strong, weak = load_embedded().transformer, load_embedded_weak()
    assert weak.config.sample_size == strong.config.sample_size
    x, time = torch.randn(1, 3, 32, 32), torch.tensor([500.0])
    with torch.no_grad():
        outputs = [m.eval()(x, timestep=time, class_labels=torch.tensor([3])).sample
                   for m in (strong, weak)]  # fmt: skip
    assert outputs[0].shape == outputs[1].shape
    assert not torch.allclose(*outputs, atol=0.01)
