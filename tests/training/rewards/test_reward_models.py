"""Rewards of the CLIP and BLIP families, on tiny random models from a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffsteer.eval.scorers import clip_pixels
from diffsteer.training.rewards import (
    AestheticScore,
    ClipScore,
    HPSv2,
    ImageReward,
    PickScore,
    load_reward,
)
from diffsteer.training.rewards.hub import ScoreHead

transformers = pytest.importorskip("transformers")

WORDS = ["a red fox", "a blue car in the snow", "one"]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(3, 3, 40, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny CLIP and a tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("clip")
    text = {**SIZES, "num_attention_heads": 2, "vocab_size": 99, "max_position_embeddings": 20}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**SIZES, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
        model.logit_scale.fill_(2.0)
    model.save_pretrained(folder)
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    letters = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(letters)}, unk_token="z"))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex(r"."), "isolated")
    tokens.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


def prepared(images: Tensor) -> Tensor:
    return torch.stack([clip_pixels(image, 32) for image in (images * 255).round().byte()])


def test_the_clip_family_is_the_cosine_that_transformers_gives(images: Tensor, clip: Path) -> None:
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    words = tokenizer(WORDS, padding="max_length", truncation=True, max_length=20,
                      return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        output = model(
            input_ids=words["input_ids"], attention_mask=words["attention_mask"],
            pixel_values=prepared(images),
        )  # fmt: skip
    cosine = (output.image_embeds * output.text_embeds).sum(1)
    assert cosine.std() > 1e-3  # else nothing is tested
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(
        ClipScore(clip, batch_size=2)(images, WORDS), 100 * cosine.clamp_min(0), **close
    )
    picks = PickScore(clip, None)(images, WORDS)
    torch.testing.assert_close(picks, output.logits_per_image.diagonal(), **close)
    torch.testing.assert_close(HPSv2(clip)(images, WORDS), cosine, **close)
    torch.testing.assert_close(
        load_reward(f"clip:model='{clip}'")(images, WORDS, []), 100 * cosine.clamp_min(0), **close
    )


def test_the_aesthetic_score_is_a_head_on_unit_features(
    images: Tensor, clip: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    head = ScoreHead(8)
    torch.save(head.state_dict(), tmp_path / "head.pth")
    score = AestheticScore(clip, tmp_path / "head.pth", batch_size=2)(images)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        states = model.vision_model(pixel_values=prepared(images)).pooler_output
        features = F.normalize(model.visual_projection(states), dim=-1)
        wanted = head.eval()(features)
    torch.testing.assert_close(score, wanted, rtol=1e-4, atol=1e-6)
    torch.save(ScoreHead(9).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"head: the weights in .* do not fit"):
        AestheticScore(clip, tmp_path / "other.pth")


def official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of our network under the names of the authors' checkpoint."""
    table = (
        ("vision.embeddings.patch_embedding", "blip.visual_encoder.patch_embed.proj"),
        ("vision.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
        ("vision.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
        ("vision.post_layernorm", "blip.visual_encoder.norm"),
        ("vision.encoder.layers", "blip.visual_encoder.blocks"),
        ("self_attn.projection", "attn.proj"),
        ("self_attn", "attn"),
        ("layer_norm", "norm"),
        ("text.", "blip.text_encoder."),
        ("head.", "mlp."),
    )
    renamed = {}
    for name, value in state.items():
        for ours, theirs in table:
            name = name.replace(ours, theirs)
        renamed[name] = value
    return renamed


def test_image_reward_reads_a_checkpoint_of_the_authors_names(
    images: Tensor, clip: Path, tmp_path: Path
) -> None:
    from diffsteer.training.rewards.image_reward import MEAN, STD, _Network

    vision = {**SIZES, "num_attention_heads": 2, "image_size": 32}
    text = {**SIZES, "num_attention_heads": 2, "encoder_hidden_size": 16, "vocab_size": 99}
    text |= {"max_position_embeddings": 40, "bos_token_id": 0, "sep_token_id": 1}
    torch.manual_seed(0)
    network = _Network(vision, text).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.3)
    state = official_names(network.state_dict())
    keys = {"blip.visual_encoder.blocks.1.attn.qkv.weight", "blip.visual_encoder.norm.bias",
            "blip.text_encoder.encoder.layer.0.crossattention.self.query.weight",
            "mlp.layers.7.weight"}  # fmt: skip
    assert keys <= set(state)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    state["blip.vision_proj.weight"] = torch.zeros(4, 16)
    torch.save(state, tmp_path / "ImageReward.pt")
    reward = ImageReward(tmp_path, clip, vision=vision, text=text, batch_size=2)
    scores = reward(images, WORDS)
    words = reward.tokenizer(WORDS, padding="max_length", truncation=True, max_length=35,
                             return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        raw = network(prepared(images), words["input_ids"], words["attention_mask"])
    torch.testing.assert_close(scores, (raw - MEAN) / STD, rtol=1e-4, atol=1e-4)
    assert not scores.allclose(reward(images, WORDS[::-1]))  # the prompt is read
    del state["mlp.layers.7.weight"]
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"1 tensors are missing, such as 'head.layers.7.weight'"):
        ImageReward(tmp_path, clip, vision=vision, text=text)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match=r"cannot load the model .*give a folder"):
        ClipScore(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'diffsteer\[text\]'"):
        ClipScore(tmp_path)
