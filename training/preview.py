"""Sample grids drawn during training."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ..core.prediction import Kind, Level, from_denoised, to_denoised
from .data import derive_seed
from .flow import TIMESTEPS, Network

__all__ = ["preview", "sample_flow", "save_grid"]


@torch.no_grad()
def sample_flow(
    network: Network,
    noise: Tensor,
    labels: Tensor,
    *,
    null: int,
    kind: Kind,
    scale: float = 2.5,
    steps: int = 20,
) -> Tensor:
    """Images by Euler steps along the flow, with plain classifier-free guidance.

    Args:
        network: ``network(x, timestep, labels)``.
        noise: the sample at sigma 1, (B, C, H, W).
        labels: class indices, (B,).
        null: the label that means no class.
        kind: what the network's output means.
        scale: of the guidance; 1 is none.
        steps: equal steps in sigma.

    Returns:
        (B, C, H, W), about in [-1, 1].
    """
    x = noise
    sigmas = torch.linspace(1, 0, steps + 1)
    both = torch.cat([labels, torch.full_like(labels, null)])
    for now, then in pairwise(sigmas):
        doubled, level = torch.cat([x, x]), Level.flow(now)
        timestep = torch.full((len(both),), TIMESTEPS * float(now), device=x.device)
        denoised = to_denoised(network(doubled, timestep, both), kind, doubled, level)
        cond, uncond = from_denoised(denoised, Kind.VELOCITY, doubled, level).chunk(2)
        x = x + (then - now) * uncond.lerp(cond, scale)
    return x


def preview(
    network: Network,
    path: Path,
    *,
    classes: int,
    resolution: int,
    kind: Kind,
    device: torch.device,
    rows: int = 2,
) -> None:
    """Write a PNG grid, always from the same noise: a column a class (of the first ten)."""
    columns = min(classes, 10)
    labels = torch.arange(columns, device=device).repeat(rows)
    generator = torch.Generator().manual_seed(derive_seed("preview"))
    noise = torch.randn((len(labels), 3, resolution, resolution), generator=generator)
    images = sample_flow(network, noise.to(device), labels, null=classes, kind=kind)
    save_grid(images, path, columns=columns)


def save_grid(images: Tensor, path: Path, *, columns: int) -> None:
    """Write images in [-1, 1], (B, 3, H, W), as one PNG, row by row."""
    from PIL import Image

    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    rows = [torch.cat(list(row), dim=-1) for row in pixels.split(columns)]
    picture = torch.cat(rows, dim=-2).permute(1, 2, 0).contiguous().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    Image.fromarray(picture).save(aside, format="PNG")
    aside.replace(path)
