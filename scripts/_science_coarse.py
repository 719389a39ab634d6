"""How near images are to real ones in coarse pixels: a space that no classifier has had a say in.

A classifier's gradient may raise another classifier's accuracy, and lower distances between that
one's features, by details that nobody sees. The averages of 8 x 8 blocks do not know these details.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from diffsteer.eval import open_images
from diffsteer.eval.features import FeatureSet
from diffsteer.eval.frechet import Gaussian
from diffsteer.eval.half_samples import Estimate, HalfSampling, mean_of
from diffsteer.eval.moments import Moments
from diffsteer.pipelines import ImageRequest

SIDE = 8


def coarse_pixels(images: Iterable[Tensor]) -> Tensor:
    """Block means in [0, 1], (N, 3 * SIDE * SIDE), of uint8 images (3, H, W)."""
    return torch.stack(
        [adaptive_avg_pool2d(image.double() / 255, SIDE).flatten() for image in images]
    )


class CoarseDistance:
    """The Fréchet distance to real images in coarse pixels, with its error."""

    def __init__(self, real: str, halves: int, most: int = 10_000) -> None:
        source = open_images(real)
        pixels = coarse_pixels(source.image(i) for i in range(min(len(source), most)))
        moments = Moments.of(pixels)
        gaussian = Gaussian.of(moments.mean, moments.covariance)
        self.sampling = HalfSampling(gaussian, space="coarse", halves=halves)

    def __call__(
        self, folder: Path, requests: Sequence[ImageRequest], cuts: Sequence[Tensor]
    ) -> Estimate:
        """Of a point's images in the order of the requests; the mean over sets of rows."""
        source = open_images(folder / "images")
        place = {Path(name).name: index for index, name in enumerate(source.names)}
        pixels = coarse_pixels(source.image(place[Path(r.file).name]) for r in requests)
        count = len(pixels)
        features = FeatureSet(
            {"coarse/features": pixels}, torch.arange(count), torch.full((count,), -1),
            torch.arange(count), torch.zeros(count, 3), torch.full((count,), -1),
        )  # fmt: skip
        return mean_of([self.sampling(features.rows(rows))["fd"] for rows in cuts])
