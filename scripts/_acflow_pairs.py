"""Paired differences between the runs of the comparison of AC-Flow, with intervals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def half_width(values: Sequence[float]) -> float:
    """Half the 95 % interval of the mean over seeds (Student's t); 0 of a single one."""
    if len(values) < 2:
        return 0.0
    return T95.get(len(values), 1.96) * statistics.stdev(values) / len(values) ** 0.5


def difference(
    ours: Mapping[int, Sequence[float]], theirs: Mapping[int, Sequence[float]]
) -> tuple[float, float] | None:
    """Mean of ``ours - theirs`` and half its 95 % interval; None where no seed has both.

    Values are paired by training seed and by place: the scores of the same judged images, or
    one number of the run. The interval adds the spread between training seeds and that between
    images, each as if the other were none, so it is rather too wide.

    Args:
        ours: from the training seed to the values.
        theirs: the same of what it is compared with.
    """
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    gaps = [[a - b for a, b in zip(ours[s], theirs[s], strict=True)] for s in seeds]
    over_images = [statistics.mean(column) for column in zip(*gaps, strict=True)]
    if not over_images:
        return None
    images = 0.0
    if len(over_images) > 1:
        images = 1.96 * statistics.stdev(over_images) / len(over_images) ** 0.5
    runs = half_width([statistics.mean(row) for row in gaps])
    return statistics.mean(over_images), (runs**2 + images**2) ** 0.5


def shown(found: tuple[float, float] | None, digits: int) -> str:
    """A cell of a table; without an interval where there is nothing to vary over."""
    if found is None:
        return "-"
    text = f"{found[0]:+.{digits}f}"
    return f"{text} ± {found[1]:.{digits}f}" if found[1] else text
