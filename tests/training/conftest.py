"""A data set of a few images and a transformer of a few thousand weights."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffsteer.training import LabelledImages, TrainConfig


@pytest.fixture
def images() -> LabelledImages:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (24, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return LabelledImages(pixels, torch.arange(24) % 3, ("ant", "bee", "cat"))


@pytest.fixture
def config() -> TrainConfig:
    return TrainConfig(
        resolution=8, patch_size=4, layers=2, heads=2, head_dim=8, batch_size=8, steps=8, warmup=2,
        checkpoint_every=3, log_every=2, preview_every=0, precision="fp32", learning_rate=1e-2,
    )  # fmt: skip


def png_bytes(pixels: torch.Tensor) -> bytes:
    """One uint8 image (3, H, W) as a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def parquet(tmp_path: Path, images: LabelledImages) -> Path:
    """The images as one parquet file in the hub's layout."""
    return write_parquet(tmp_path / "data" / "train.parquet", images)


def write_parquet(path: Path, images: LabelledImages, *, image: str = "img", label: str = "label"):
    """Write a parquet file with these column names."""
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        image: [{"bytes": png_bytes(pixels), "path": None} for pixels in images.pixels],
        label: images.labels.tolist(),
    }
    features = {image: datasets.Image(), label: datasets.ClassLabel(names=list(images.names))}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
    return path
