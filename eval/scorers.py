"""Scores of single images under their prompts: CLIP score, PickScore, or any callable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ._weights import weights_digest

# From uint8 images, (B, 3, H, W) or a list of (3, H, W), and as many prompts to values (B,).
# Attributes ``id`` and ``higher_is_better`` are used where a scorer has them.
Scorer = Callable[[Tensor | list[Tensor], Sequence[str]], Tensor]
Scale = Literal["cosine", "clip-score", "logit"]

CLIP_STATISTICS = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)


class ClipScorer:
    """Agreement of an image with its prompt: the cosine of CLIP's two embeddings, scaled.

    Any model with the parts of transformers' ``CLIPModel`` will do; PickScore is one. Images pass
    CLIP's own preprocessing (shortest side to ``side`` by Pillow's bicubic, centre crop), prompts
    are cut to the model's length, and cut prompts are counted in ``truncated``.

    Args:
        model: a ``CLIPModel``; it is put in eval mode and frozen.
        tokenizer: its tokenizer.
        name: for the identity.
        scale: "cosine"; "clip-score", ``100 max(cosine, 0)`` (Hessel et al. 2021 with torchmetrics'
            factor); or "logit", the cosine times the model's temperature (PickScore).
        device: the model runs on.
        dtype: the model runs in.
        batch_size: images and prompts a forward pass.

    Raises:
        ValueError: if ``scale`` is unknown.
    """

    higher_is_better = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str = "clip",
        scale: Scale = "clip-score",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
    ) -> None:
        if scale not in ("cosine", "clip-score", "logit"):
            raise ValueError(f"scale must be 'cosine', 'clip-score' or 'logit', got {scale!r}")
        self.digest = weights_digest(model.state_dict())
        # Before the cast: bfloat16 would take a percent off the temperature.
        temperature: Any = model.logit_scale
        self._factor = float(temperature.detach().exp()) if scale == "logit" else 1.0
        self.model: Any = model.eval().requires_grad_(False).to(device, dtype)
        self.tokenizer, self.name, self.scale = tokenizer, name, scale
        self.device, self.dtype, self.batch_size = torch.device(device), dtype, batch_size
        config: Any = model.config
        self.side: int = config.vision_config.image_size
        self.length: int = config.text_config.max_position_embeddings
        self.truncated = 0

    @property
    def id(self) -> str:
        """Identity of the numbers: model, weights, size, precision, scale."""
        precision = str(self.dtype).removeprefix("torch.")
        return f"{self.name}@{self.digest[:16]}/{self.side}px-clip/{precision}/{self.scale}"

    @torch.no_grad()
    def __call__(self, images: Tensor | list[Tensor], prompts: Sequence[str]) -> Tensor:
        """Score of each image under its prompt, shape (B,), float32 on the CPU.

        Args:
            images: uint8, (B, 3, H, W) or a list of (3, H, W) of any sizes.
            prompts: one an image.

        Raises:
            TypeError: if the images are not uint8.
            ValueError: if there are not as many prompts as images.
        """
        if len(prompts) != len(images):
            raise ValueError(f"expected one prompt an image, got {len(prompts)} for {len(images)}")
        if len(images) == 0:
            return torch.zeros(0)
        # Few prompts and many images of each is the usual case: each text is encoded once.
        place = {text: row for row, text in enumerate(dict.fromkeys(prompts))}
        rows = torch.tensor([place[prompt] for prompt in prompts])
        cosine = (self.embed_images(images) * self.embed_texts(list(place))[rows]).sum(1)
        return 100 * cosine.clamp_min(0) if self.scale == "clip-score" else self._factor * cosine

    @torch.no_grad()
    def embed_images(self, images: Tensor | list[Tensor]) -> Tensor:
        """Unit image embeddings, (B, d), float32 on the CPU."""
        parts = []
        for start in range(0, len(images), self.batch_size):
            block = images[start : start + self.batch_size]
            pixels = torch.stack([clip_pixels(image, self.side) for image in block])
            seen = self.model.vision_model(pixel_values=pixels.to(self.device, self.dtype))
            parts.append(self.model.visual_projection(seen.pooler_output).float().cpu())
        return F.normalize(torch.cat(parts), dim=1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit text embeddings, (B, d), float32 on the CPU."""
        whole = self.tokenizer(list(texts))["input_ids"]
        self.truncated += sum(len(ids) > self.length for ids in whole)
        parts = []
        for start in range(0, len(texts), self.batch_size):
            # One length for all: so the numbers do not depend on what else is in the batch.
            tokens = self.tokenizer(
                list(texts[start : start + self.batch_size]), padding="max_length",
                truncation=True, max_length=self.length, return_tensors="pt",
            ).to(self.device)  # fmt: skip
            read = self.model.text_model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
            parts.append(self.model.text_projection(read.pooler_output).float().cpu())
        return F.normalize(torch.cat(parts), dim=1)


def clip_pixels(image: Tensor, side: int) -> Tensor:
    """CLIP's preprocessing of one uint8 image (3, H, W): float32 (3, side, side), normalised.

    Raises:
        TypeError: if the image is not uint8.
    """
    if image.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 in [0, 255], got {image.dtype}")
    height, width = image.shape[1:]
    shorter = min(height, width)
    size = (int(side * width / shorter), int(side * height / shorter))
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    pixels = torch.from_numpy(np.array(picture.resize(size, Image.Resampling.BICUBIC)))
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    crop = pixels[top : top + side, left : left + side].permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in CLIP_STATISTICS)
    return (crop - mean) / std


# Name: weights, where their tokenizer is, scale.
SCORERS: dict[str, tuple[str, str, Scale]] = {
    "clip": ("openai/clip-vit-base-patch16", "openai/clip-vit-base-patch16", "clip-score"),
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "logit"),
}


def load_scorer(
    name: str,
    *,
    model: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ClipScorer:
    """A named scorer: "clip" (CLIP score) or "pickscore".

    Args:
        name: of ``SCORERS``.
        model: another folder or hub id of weights, with their tokenizer.
        device: it runs on.
        dtype: it runs in.

    Raises:
        ImportError: if transformers is missing.
        ValueError: if there is none of that name, or its weights cannot be had.
    """
    if name not in SCORERS:
        raise ValueError(f"scorer must be one of {', '.join(SCORERS)}, got {name!r}")
    weights, tokens, scale = SCORERS[name]
    if model is not None:
        weights = tokens = model
    try:
        from transformers import AutoTokenizer, CLIPModel
    except Exception as error:  # a broken torchvision makes this a RuntimeError
        raise ImportError(
            f"the scorer {name} needs transformers ({error}): pip install diffsteer[text]"
        ) from error
    try:
        network = CLIPModel.from_pretrained(weights)
        tokenizer = AutoTokenizer.from_pretrained(tokens)
    except (OSError, ValueError) as error:
        raise ValueError(f"the weights of {weights} cannot be loaded: {error}") from error
    return ClipScorer(
        network, tokenizer, name=weights.rstrip("/").rpartition("/")[2] or name, scale=scale,
        device=device, dtype=dtype,
    )  # fmt: skip
