"""Folders of little images, laid out as generate.py lays them out."""

from __future__ import annotations

import json

import pytest
from eval_samples import pictures, tiny_extractor
from PIL import Image


@pytest.fixture
def extractor():
    return tiny_extractor()


@pytest.fixture
def make_folder(tmp_path):
    def make(name, count=12, seed=0, labels=True, size=(16, 16)):
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        samples = []
        for i, picture in enumerate(pictures(count, seed, size)):
            Image.fromarray(picture).save(folder / "images" / f"{i:06d}.png")
            samples.append({"file": f"images/{i:06d}.png", "seed": i, "label": i % 4})
        if labels:
            (folder / "run.json").write_text(json.dumps({"images": samples}))
        return folder

    return make
