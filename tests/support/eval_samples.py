"""A tiny feature network and little images for the tests of evaluation."""

from __future__ import annotations

import numpy as np
import torch

from diffsteer.eval import Extractor, Taps


class TinyNet(torch.nn.Module):
    """Fixed random weights: 6 features, 4 logits, 16 px."""

    def __init__(self, seed=1):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.conv = torch.nn.Conv2d(3, 6, 3, stride=2)
        self.head = torch.nn.Linear(6, 4)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=random))

    def forward(self, images):
        features = self.conv(images).relu().mean((2, 3))
        # Row by row: a matrix product may round a row by its place in the batch.
        logits = (features[:, None] * self.head.weight).sum(2) + self.head.bias
        return Taps(features, logits)


def tiny_extractor(seed=1, **options):
    names = {"class_names": tuple("abcd"), "space": "tiny", "side": 16, "micro_batch": 8}
    return Extractor(TinyNet(seed), **{**names, **options})


def pictures(count, seed=0, size=(16, 16)):
    """Uint8 images (count, H, W, 3), each with a colour of its own."""
    random = np.random.default_rng(seed)
    tint = random.integers(0, 200, (count, 1, 1, 3))
    return (tint + random.integers(0, 56, (count, *size, 3))).astype(np.uint8)


def tensors(count, seed=0, size=(16, 16)):
    """The same as tensors, (count, 3, H, W)."""
    return torch.from_numpy(pictures(count, seed, size)).permute(0, 3, 1, 2).contiguous()
