"""From a folder of samples to a result: read, extract once, compare, say what was odd."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .arrays import open_array
from .cache import FeatureCache
from .gather import world_size
from .images import open_images
from .labels import find_labels
from .prompts import find_prompts
from .reading import Reading as Reading
from .reading import read_features as read_features
from .report import EvalResult
from .runs import incomplete
from .suite import EvalSuite


def evaluate(
    samples: str | Path,
    reference: str | Path | None = None,
    *,
    suite: EvalSuite | None = None,
    reading: Reading | None = None,
    labels: str | None = None,
    prompts: str | None = None,
    cache: FeatureCache | None = None,
    force: bool = False,
) -> EvalResult:
    """Score a set of images against real ones.

    Args:
        samples: whatever ``images.open_images`` opens.
        reference: images, or statistics (.npz with mu and sigma, .pkl, .pt); None takes what the
            suite holds, or the embedded CIFAR-10 test set.
        suite: metrics, extractors and protocol; its reference is kept, so one suite scores many
            folders and reads the reference once.
        reading: how images are read.
        labels: see ``labels.find_labels``.
        prompts: see ``prompts.find_prompts``.
        cache: features are looked up here first.
        force: accept statistics of another extractor.

    Raises:
        ValueError: if anything cannot be read or does not fit; nothing is scored in part.
    """
    suite, reading = suite or EvalSuite(), reading or Reading()
    source = open_images(samples)
    known = find_labels(source, labels, class_names=suite.extractors[0].class_names)
    notes = incomplete(source.where)
    if reference is not None:
        notes += set_reference(suite, reference, reading, cache=cache, force=force)
    suite.reset(keep_reference=True)
    read = read_features(
        source, suite.extractors, reading, cache=cache, title="samples", scorers=suite.scorers,
        prompts=find_prompts(source, prompts),
    )  # fmt: skip
    features = read.features
    if known is not None and len(features):
        features = replace(features, labels=known[features.index])
    suite.add(features)
    suite.sync()
    result = suite.compute(together=world_size() > 1, progress=reading.shows_progress())
    about = {
        "samples": {"where": str(samples), "count": len(source), "fingerprint": source.fingerprint},
        "reading": asdict(reading),
        "skipped_images": read.skipped,
    }
    return replace(
        result, meta={**result.meta, **about}, warnings=[*notes, *read.warnings(), *result.warnings]
    )


def set_reference(
    suite: EvalSuite,
    reference: str | Path,
    reading: Reading | None = None,
    *,
    cache: FeatureCache | None = None,
    force: bool = False,
) -> list[str]:
    """Give a suite its reference, statistics or images (or both in one ADM file); remarks back.

    All images of a reference are read, whatever ``reading.num`` says of the samples.

    Raises:
        ValueError: if it cannot be read, or belongs to another extractor.
    """
    suite.reset()
    path = Path(reference)
    statistics = path.suffix in (".pkl", ".pickle", ".pt", ".pth")
    if path.suffix == ".npz" and path.is_file():
        statistics = open_array(path, ("mu", "features", "feats", "reps")) is not None
        if open_array(path, ("arr_0",)) is None and not statistics:
            raise ValueError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma)")
    if statistics:
        suite.set_reference(path, force=force)
        if path.suffix != ".npz" or open_array(path, ("arr_0",)) is None:
            return []
    source = open_images(reference)
    whole = replace(reading or Reading(), num=None)
    read = read_features(source, suite.extractors, whole, cache=cache, title="reference")
    labels = find_labels(source, class_names=suite.extractors[0].class_names)
    features = read.features
    if labels is not None and len(features):
        features = replace(features, labels=labels[features.index])
    suite.add(features, real=True)
    return read.warnings()


def environment() -> dict[str, Any]:
    """Versions that a result should name."""
    import platform

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
