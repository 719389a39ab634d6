"""Per-sample scalars, dot products and norms over batches of any shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 4096


def per_sample(scalar: Tensor, like: Tensor) -> Tensor:
    """View one value a sample so that it broadcasts over ``like``.

    Args:
        scalar: shape () or (B,).
        like: shape (B, ...).

    Returns:
        A view of ``scalar`` with shape (1, 1, ...) or (B, 1, ...), as many dimensions as ``like``.

    Raises:
        ValueError: if ``scalar`` has any other shape. Nothing is guessed: a (B,) tensor that is
            left to PyTorch's own broadcasting is *silently* wrong where B equals the width.
    """
    batch = like.shape[0] if like.ndim else 1
    if scalar.ndim > 1 or (scalar.ndim == 1 and scalar.shape[0] not in (1, batch)):
        raise ValueError(
            f"expected one value per sample, shape () or ({batch},), got {tuple(scalar.shape)}; "
            "pass noise levels as they are, without unsqueezing them by hand"
        )
    return scalar.reshape(-1, *[1] * (like.ndim - 1))


def widen(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32 if it is narrower, and unchanged if it is float32 or float64."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def send(
    values: Tensor | Sequence[float],
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Values of the host, or a tensor, on ``device``.

    A copy to an accelerator is not waited for, as ``torch.tensor(..., device=)`` would. One from
    it is: its values may be read at once.

    Args:
        values: numbers, or a tensor of any shape.
        device: where to.
        dtype: of the result; None keeps it.
    """
    there = torch.device(device).type != "cpu"
    return torch.as_tensor(values).to(device=device, dtype=dtype, non_blocking=there)


def sample_dot(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Dot product of each sample, over all dimensions but the first.

    Args:
        a: shape (B, ...), float32 or wider (see ``widen``).
        b: same shape.
        weight: optional mask or weight that broadcasts over ``a`` (padded tokens: 0).

    Returns:
        Shape (B,).
    """
    product = a * b if weight is None else a * b * weight
    return product.flatten(1).sum(1) if product.ndim > 1 else product


def sample_norm(a: Tensor, weight: Tensor | None = None) -> Tensor:
    """Euclidean norm of each sample, over all dimensions but the first.

    Args:
        a: shape (B, ...), float32 or wider (see ``widen``).
        weight: optional mask or weight that broadcasts over ``a``.

    Returns:
        Shape (B,).
    """
    if weight is not None:
        return sample_dot(a, a, weight).sqrt()
    if a.ndim == 1:
        return a.abs()
    flat = a.flatten(1)
    blocks, rest = divmod(flat.shape[1], _BLOCK)
    if not a.is_cpu or blocks < 2:
        return _norm(flat)
    # On the CPU one long float32 sum loses four digits over a video latent; sums of blocks do not.
    whole = flat[:, :-rest] if rest else flat
    norms = _norm(whole.view(-1, blocks, _BLOCK))
    return _norm(torch.cat([norms, _norm(flat[:, -rest:])[:, None]], 1) if rest else norms)


def _norm(rows: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norm
