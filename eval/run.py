"""From a folder of samples to a result: read, extract once, compare, say what was odd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from .arrays import open_array
from .cache import FeatureCache
from .decode import Alpha
from .extractors import Extractor, NotFinite
from .features import FeatureSet, extract
from .images import Batch, ImageSource, batches, open_images
from .labels import find_labels
from .report import EvalResult
from .runs import incomplete
from .suite import EvalSuite


@dataclass(frozen=True)
class Reading:
    """How images are read; part of what a result records.

    Args:
        num: how many images, drawn at random by ``seed``; None takes all.
        seed: of that draw.
        batch_size: images decoded into one batch; changes no result.
        workers: decoding threads.
        on_error: "fail" on an unreadable image, or "skip" it, up to 1 % of all.
        alpha: transparent images: composited on "white", or an "error".
        progress: show bars, on rank 0 and on a terminal only.
    """

    num: int | None = None
    seed: int = 0
    batch_size: int = 256
    workers: int = 4
    on_error: Literal["fail", "skip"] = "fail"
    alpha: Alpha = "white"
    progress: bool = True

    def indices(self, count: int) -> list[int]:
        """Which of ``count`` images are read, ascending.

        Raises:
            ValueError: if more are asked for than there are.
        """
        if self.num is None or self.num == count:
            return list(range(count))
        if not 0 < self.num < count:
            raise ValueError(f"num = {self.num} images asked for, but there are {count}")
        drawn = np.random.RandomState(self.seed).choice(count, self.num, replace=False)
        return sorted(int(i) for i in drawn)


@dataclass
class Read:
    """Features of a source and what happened on the way."""

    features: FeatureSet
    source: ImageSource
    notes: dict[str, int]
    skipped: list[str]
    sizes: dict[str, int]
    cached: bool = False

    def warnings(self) -> list[str]:
        """What the user should know about these images."""
        where = self.source.where
        found = [f"{where}: {count} {note}" for note, count in sorted(self.notes.items())]
        if len(self.sizes) > 1:
            shown = ", ".join(f"{n} of {size}" for size, n in Counter(self.sizes).most_common(5))
            found.append(f"{where}: images of {len(self.sizes)} sizes ({shown}); each is resized")
        if self.skipped:
            found.append(f"{where}: {len(self.skipped)} images skipped: {self.skipped[0]}")
        if self.source.ignored:
            found.append(f"{where}: {self.source.ignored} files are no images and were left out")
        return found


def read_features(
    source: ImageSource,
    extractors: Sequence[Extractor],
    reading: Reading | None = None,
    *,
    cache: FeatureCache | None = None,
    title: str = "features",
) -> Read:
    """Features of this rank's share of ``source``, from the cache where they are known.

    Raises:
        ImageError: on an unreadable image; see ``images.batches``.
        ValueError: if features are not finite, or ``reading.num`` is too large.
    """
    reading = reading or Reading()
    rank, world = _rank_and_world()
    mine = reading.indices(len(source))[rank::world]
    key = FeatureCache.key(
        source.fingerprint,
        ";".join(e.id for e in extractors),
        mine,
        reading.on_error,
        reading.alpha,
    )
    known = cache.get(key) if cache else None
    if known is not None:
        note = known[1]
        return Read(known[0], source, note["notes"], note["skipped"], note["sizes"], True)
    parts: list[FeatureSet] = []
    skipped: list[str] = []
    sizes: Counter[str] = Counter()
    quiet = None if reading.progress and rank == 0 else True  # None: off when not a terminal
    with tqdm(total=len(mine), desc=title, unit="img", disable=quiet) as bar:
        for batch in batches(
            source, reading.batch_size, indices=mine, workers=reading.workers,
            on_error=reading.on_error, skipped=skipped, alpha=reading.alpha,
        ):  # fmt: skip
            sizes.update(f"{image.shape[2]}x{image.shape[1]}" for image in batch.images)
            parts.append(_extracted(batch, source, extractors, reading.on_error, skipped))
            bar.update(len(batch.indices))
    read = Read(FeatureSet.join(parts), source, dict(source.notes), skipped, dict(sizes))
    if cache:
        note = {"notes": read.notes, "skipped": skipped, "sizes": read.sizes}
        cache.put(key, read.features, note)
    return read


def _extracted(
    batch: Batch,
    source: ImageSource,
    extractors: Sequence[Extractor],
    on_error: str,
    skipped: list[str],
) -> FeatureSet:
    """Features of a batch; images without finite features are named, or left out and named."""
    images, indices = batch.images, list(batch.indices)
    while indices:
        try:
            return extract(images, extractors, index=torch.tensor(indices))
        except NotFinite as error:
            names = [source.names[indices[row]] for row in error.rows]
            message = f"{error.name} gives NaN or infinity for {names[0]} of {source.where}"
            if on_error == "fail":
                raise ValueError(f"{message} (and {len(names) - 1} more in its batch)") from error
            skipped += [f"{error.name} gives NaN or infinity for {name}" for name in names]
            bad = set(error.rows)
            images = [image for row, image in enumerate(images) if row not in bad]
            indices = [index for row, index in enumerate(indices) if row not in bad]
    return FeatureSet()


def evaluate(
    samples: str | Path,
    reference: str | Path | None = None,
    *,
    suite: EvalSuite | None = None,
    reading: Reading | None = None,
    labels: str | None = None,
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
    read = read_features(source, suite.extractors, reading, cache=cache, title="samples")
    features = read.features
    if known is not None and len(features):
        features = replace(features, labels=known[features.index])
    suite.add(features)
    suite.sync()
    result = suite.compute()
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


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def environment() -> dict[str, Any]:
    """Versions that a result should name."""
    import platform

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
