"""Text-image scores: parity with transformers and torchmetrics, preprocessing, bad input."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch
from eval_samples import tensors

from diffsteer.eval.scorers import ClipScorer, clip_pixels, load_scorer

pytest.importorskip("transformers")
from tiny_clip import tiny_clip

PROMPTS = ("a cat", "a dog on grass", "a cat", "snow", "x")


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


def test_the_score_is_that_of_transformers(clip):
    model, tokenizer = clip
    images = tensors(5, 1)
    pixels = torch.stack([clip_pixels(image, 16) for image in images])
    tokens = tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=pixels, **tokens).logits_per_image.diagonal()
    found = ClipScorer(model, tokenizer, scale="logit", batch_size=2)(images, PROMPTS)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    assert float(found.std()) > 0.1  # the images differ, so something is measured
    cosine = ClipScorer(model, tokenizer, scale="cosine")(images, PROMPTS)
    torch.testing.assert_close(cosine * model.logit_scale.exp(), found, rtol=1e-4, atol=1e-5)
    score = ClipScorer(model, tokenizer)(images, PROMPTS)
    torch.testing.assert_close(score, 100 * cosine.clamp_min(0))


def test_low_precision_keeps_the_temperature():
    model, tokenizer = tiny_clip()
    factor = float(model.logit_scale.detach().exp())
    whole = [
        ClipScorer(model, tokenizer, scale=scale, dtype=torch.bfloat16)(tensors(5, 1), PROMPTS)
        for scale in ("logit", "cosine")
    ]
    torch.testing.assert_close(whole[0] / whole[1], torch.full((5,), factor), rtol=1e-5, atol=0)


class Older:
    """The model as torchmetrics 1.9 expects it: transformers 5 wraps what it takes for tensors."""

    def __init__(self, model):
        def unwrapped(method):
            def call(*arguments):
                found = method(*arguments)
                return getattr(found, "pooler_output", found)

            return call

        self.config, self.to = model.config, lambda device: self
        self.get_image_features = unwrapped(model.get_image_features)
        self.get_text_features = unwrapped(model.get_text_features)


def test_the_mean_is_that_of_torchmetrics(clip):
    from torchmetrics.functional.multimodal import clip_score
    from transformers import CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, tokenizer = clip
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = CLIPProcessor(CLIPImageProcessorPil(**size), tokenizer)
    images = tensors(5, 2, (20, 28))
    expected = clip_score(list(images), list(PROMPTS), lambda: (Older(model), processor))
    found = 100 * ClipScorer(model, tokenizer, scale="cosine")(images, PROMPTS)
    assert float(found.mean().clamp_min(0)) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("size", [(16, 16), (20, 28), (40, 17)])
def test_pixels_are_those_of_clips_own_processor(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    image = tensors(1, 3, size)[0]
    expected = processor(images=np.array(image.permute(1, 2, 0)), return_tensors="np")
    np.testing.assert_allclose(clip_pixels(image, 16), expected["pixel_values"][0], atol=1e-5)


def test_a_score_depends_on_its_image_and_prompt_alone(clip):
    scorer = ClipScorer(*clip, scale="cosine")
    images = tensors(5, 4)
    whole = scorer(images, PROMPTS)
    alone = torch.cat([scorer(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-6)
    mixed = scorer([*images[:2], *tensors(1, 5, (30, 20))], PROMPTS[:3])
    torch.testing.assert_close(mixed[:2], whole[:2], rtol=1e-5, atol=1e-6)
    assert scorer(images[:0], ()).shape == (0,)


def test_long_prompts_are_cut_and_counted(clip):
    scorer = ClipScorer(*clip)
    scorer(tensors(2), ["a" * 100, "short"])
    assert scorer.truncated == 1


def test_bad_input_is_named(clip, tmp_path, monkeypatch):
    scorer = ClipScorer(*clip)
    with pytest.raises(ValueError, match="got 1 for 2"):
        scorer(tensors(2), ["a"])
    with pytest.raises(TypeError, match="uint8"):
        scorer(tensors(1).float(), ["a"])
    with pytest.raises(ValueError, match="'loud'"):
        ClipScorer(*clip, scale="loud")
    with pytest.raises(ValueError, match="beauty"):
        load_scorer("beauty")
    with pytest.raises(ValueError, match="nowhere"):
        load_scorer("clip", model=str(tmp_path / "nowhere"))
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "transformers":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"diffsteer\[text\]"):
        load_scorer("pickscore")


def test_weights_are_loaded_from_a_folder_and_named(clip, tmp_path):
    model, tokenizer = clip
    model.save_pretrained(tmp_path / "pick")
    tokenizer.save_pretrained(tmp_path / "pick")
    scorer = load_scorer("pickscore", model=str(tmp_path / "pick"))
    assert scorer.scale == "logit" and scorer.id.startswith("pick@")
    assert scorer.id != ClipScorer(model, tokenizer, name="pick").id
    expected = ClipScorer(model, tokenizer, scale="logit")(tensors(5, 1), PROMPTS)
    torch.testing.assert_close(scorer(tensors(5, 1), PROMPTS), expected)
