"""What all tiny pipelines share: the record, random weights that matter, text without files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import tokenizers
import torch
import transformers
from torch import Tensor, nn

TRANSFORMERS = int(transformers.__version__.partition(".")[0])
STEPS, SCALE = 4, 4.0
PROMPTS = ["a red fox in snow", "two blue birds"]
NEGATIVES = ["blurry", "low quality, text"]


def first(output: Any) -> Tensor:
    """The latents of a pipeline output: its first field (images, frames or a plain tensor)."""
    return output if isinstance(output, Tensor) else output[0]


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline and how to run it.

    Attributes:
        pipe: the diffusers pipeline, fresh: nothing is shared between two builds.
        inputs: makes the arguments of a run anew, so that every run starts from the same seed.
        guidance_argument: what the pipeline calls its guidance scale.
        denoisers: the names of the components that predict.
        latents: reads the final latents, (2, ...), out of the pipeline's output.
        name: the name it was built by.
        run: what ``call`` calls; the pipeline itself if None.
    """

    pipe: Any
    inputs: Callable[[], dict[str, Any]]
    guidance_argument: str = "guidance_scale"
    denoisers: tuple[str, ...] = ("transformer",)
    latents: Callable[[Any], Tensor] = first
    name: str = ""
    run: Callable[..., Any] | None = None

    def call(self, **overrides: Any) -> Tensor:
        """Run a few steps under classifier-free guidance; the final latents, a copy."""
        arguments = {"num_inference_steps": STEPS, self.guidance_argument: SCALE}
        with torch.no_grad():
            output = (self.run or self.pipe)(**(arguments | self.inputs() | overrides))
        return self.latents(output).clone()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


@torch.no_grad()
def wake(module: Any, seed: int = 0) -> Any:
    """Redraw all weights.

    Many models start with a zero output layer or zero gates: then the conditional and the
    unconditional prediction are equal, and a test of guidance proves nothing.
    """
    source = generator(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=source)
        if weight.ndim > 1:
            weight.copy_(noise * 1.5 / math.sqrt(weight[0].numel()))
        else:
            weight.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
    return module.eval().requires_grad_(False)


def finish(pipe: Any, dtype: torch.dtype) -> Any:
    """Wake every network of a pipeline, cast it, and switch the progress bar off."""
    networks = [c for c in pipe.components.values() if isinstance(c, nn.Module)]
    for seed, network in enumerate(networks):
        wake(network, seed).to(dtype)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    return pipe


def vae(**changes: Any) -> diffusers.AutoencoderKL:
    """An image autoencoder, four latent channels, half the resolution."""
    return diffusers.AutoencoderKL(
        **{
            "block_out_channels": (4, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
            "norm_num_groups": 2,
            "sample_size": 16,
            **changes,
        }
    )


def video_vae() -> diffusers.AutoencoderKLWan:
    """The causal video autoencoder of Wan: a quarter of the frames, an eighth of the size."""
    return diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def flow_scheduler(**changes: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**changes)


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """A CLIP tokenizer that spells: the 256 bytes, the same at the end of a word, no merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(i) for i in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    if TRANSFORMERS >= 5:
        return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    with TemporaryDirectory() as folder:
        vocab, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps(vocabulary), encoding="utf-8")
        merges.write_text("#version: 0.2\n", encoding="utf-8")
        return transformers.CLIPTokenizer(str(vocab), str(merges), model_max_length=77)


def clip_encoder(width: int = 16, projected: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config)


def t5_tokenizer() -> transformers.T5Tokenizer:
    """A T5 tokenizer that spells printable ASCII."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(i), -3.0) for i in range(33, 127)]
    if TRANSFORMERS >= 5:
        return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=77)
    spelling = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    spelling.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    ends = {"single": "$A </s>", "special_tokens": [("</s>", 1)]}
    spelling.post_processor = tokenizers.processors.TemplateProcessing(**ends)
    return transformers.T5TokenizerFast(tokenizer_object=spelling, extra_ids=0, model_max_length=77)


def t5_encoder(width: int = 32) -> transformers.T5EncoderModel:
    config = transformers.T5Config(
        vocab_size=98, d_model=width, d_kv=8, num_heads=2, d_ff=width, num_layers=1
    )
    return transformers.T5EncoderModel(config)
