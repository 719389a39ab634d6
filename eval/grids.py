"""Which images to look at: the most and least real, and each beside its nearest real one."""

from __future__ import annotations

from torch import Tensor

from .features import FeatureSet
from .images import ImageSource
from .memorisation import realism
from .neighbours import nearest, pair_up

Captioned = list[tuple[Tensor, str]]


def best_and_worst(
    source: ImageSource, fake: FeatureSet, real: Tensor, space: str, *, k: int = 3, count: int = 24
) -> list[tuple[str, Captioned]]:
    """The samples of highest and lowest realism, as captioned images for ``html.write_html``.

    Args:
        source: where the samples are read from.
        fake: their features, with the index of each in ``source``.
        real: real feature rows of the same space, (N, d).
        space: of the features.
        k: the neighbour that sets the balls of ``realism``.
        count: images of each kind, at most half of the samples.

    Raises:
        ValueError: if there are not more than ``k`` real rows.
    """
    scores = realism(real, fake.taps[f"{space}/features"], k)
    count = max(1, min(count, len(fake) // 2))
    order = scores.argsort(descending=True).tolist()

    def shown(rows: list[int]) -> Captioned:
        indices = [int(fake.index[row]) for row in rows]
        notes = [f"{source.names[i]}: realism {float(scores[row]):.3f}"
                 for i, row in zip(indices, rows, strict=True)]  # fmt: skip
        return [(source.image(i), note) for i, note in zip(indices, notes, strict=True)]

    return [
        ("Most real", shown(order[:count])),
        ("Least real", shown(order[::-1][:count])),
    ]


def nearest_real(
    source: ImageSource,
    fake: FeatureSet,
    real_source: ImageSource,
    real: FeatureSet,
    space: str,
    *,
    count: int = 12,
) -> list[tuple[str, Captioned]]:
    """The samples that lie closest to a real image, each followed by that image: copies show here.

    Args:
        source: where the samples are read from.
        fake: their features, with indices.
        real_source: where the real images are read from.
        real: their features, with indices.
        space: of the features.
        count: pairs.

    Raises:
        ValueError: if there are no real images.
    """
    name = f"{space}/features"
    points_fake, points_real = pair_up(fake.taps[name], real.taps[name])
    distance, index = nearest(points_fake, points_real, 1)
    pairs: Captioned = []
    for row in distance[:, 0].argsort()[:count].tolist():
        mine, theirs = int(fake.index[row]), int(real.index[int(index[row, 0])])
        gap = float(distance[row, 0]) ** 0.5
        pairs.append((source.image(mine), f"{source.names[mine]}: at distance {gap:.4g}"))
        pairs.append((real_source.image(theirs), f"nearest real: {real_source.names[theirs]}"))
    return [("Samples closest to a real image, each before that image", pairs)]
