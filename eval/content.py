"""A key for every sample, made from its content: what order, file names and ranks cannot change.

Whatever depends on an order (splits, blocks, subsets) uses the order of these keys, so that results
do not depend on how samples were named, batched or spread over ranks. Equal keys are exact copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WORD = np.dtype("<u4")


def content_keys(samples: Tensor | Sequence[Tensor]) -> Tensor:
    """A 64-bit hash of each sample's shape and bytes.

    Args:
        samples: shape (B, ...), any dtype, or a sequence of tensors of different shapes.

    Returns:
        Shape (B,), int64. The chance that two of N different samples share a key is about
        N² / 2^65: 1e-10 for 50,000.
    """
    if not isinstance(samples, Tensor):
        parts = [content_keys(sample[None]) for sample in samples]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    array = samples.detach().cpu().contiguous()
    if array.dtype == torch.bfloat16:
        array = array.view(torch.int16)
    count = len(array)
    flat = array.numpy().reshape(count, -1).view(np.uint8)
    padded = np.zeros((count, -(-flat.shape[1] // 4) * 4), np.uint8)
    padded[:, : flat.shape[1]] = flat
    words = padded.view(_WORD)
    shape = np.array([*array.shape[1:], flat.shape[1]], np.uint64)
    hashed = _multilinear(words) + _multilinear(shape[None].astype(np.uint64))
    return torch.from_numpy(_mixed(hashed).view(np.int64))


def canonical_order(keys: Tensor) -> Tensor:
    """The order of samples by content, as indices (N,); copies keep their relative order."""
    return torch.argsort(keys, stable=True)


def _multilinear(words: NDArray[Any]) -> NDArray[Any]:
    """Sum of words times fixed odd random numbers, modulo 2^64; one value a row."""
    total = np.zeros(len(words), np.uint64)
    random = np.random.Generator(np.random.PCG64(20260101))
    for start in range(0, words.shape[1], 65536):  # large images: a block of factors at a time
        block = words[:, start : start + 65536]
        factors = random.integers(0, 2**63, block.shape[1], dtype=np.uint64) * np.uint64(2)
        total += (block * (factors + np.uint64(1))).sum(1, dtype=np.uint64)
    return total


def _mixed(x: NDArray[Any]) -> NDArray[Any]:
    """Spread every input bit over the whole word (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[Any] = x ^ (x >> np.uint64(31))
    return mixed
