"""Read images and extract their features once: in order, with what was odd, from the cache."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
import torch
from tqdm import tqdm

from .cache import FeatureCache
from .decode import Alpha
from .extractors import Extractor, NotFinite
from .features import FeatureSet, extract
from .gather import Share
from .images import Batch, ImageSource, OnError, batches
from .scorers import Scorer


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
    on_error: OnError = "fail"
    alpha: Alpha = "white"
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0:
            raise ValueError(
                "batch_size must be at least 1 and workers 0 or more, got "
                f"{self.batch_size} and {self.workers}"
            )
        if self.on_error not in get_args(OnError) or self.alpha not in get_args(Alpha):
            raise ValueError(
                f"on_error must be 'fail' or 'skip' and alpha 'white' or 'error', got "
                f"{self.on_error!r} and {self.alpha!r}"
            )

    def shows_progress(self) -> bool:
        """Whether this process may draw a bar (it still does so on a terminal only)."""
        return self.progress and Share.of_this_rank().rank == 0

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
    prompts: Sequence[str] | None = None,
    scorers: Mapping[str, Scorer] | None = None,
) -> Read:
    """Features of this rank's share of ``source``, from the cache where they are known.

    Args:
        source: the images.
        extractors: each runs once an image.
        reading: which images, and how.
        cache: features are looked up here first, and stored. One process at a time extracts what
            another already does: the others wait and find it there.
        title: of the progress bar.
        prompts: of all images of the source.
        scorers: by name, where there are prompts.

    Raises:
        ImageError: on an unreadable image; see ``images.batches``.
        ValueError: if features are not finite, or ``reading.num`` is too large.
    """
    reading, scorers = reading or Reading(), scorers or {}
    share = Share.of_this_rank()
    mine = reading.indices(len(source))[share.rank :: share.world]
    work = _Work(source, extractors, reading, mine, title, prompts, scorers)
    ids = {name: getattr(s, "id", None) for name, s in scorers.items()} if prompts else {}
    if cache is None or None in ids.values():  # what has no identity cannot be looked up
        return work.run()
    key = FeatureCache.key(
        source.content() if cache.verify else source.fingerprint,
        ";".join(e.id for e in extractors),
        mine,
        reading.on_error,
        reading.alpha,
        "" if prompts is None else json.dumps([prompts[i] for i in mine]),
        json.dumps(ids),
    )
    with cache.lock(key):
        known = cache.get(key)
        if known is not None:
            note = known[1]
            return Read(known[0], source, note["notes"], note["skipped"], note["sizes"], True)
        read = work.run()
        note = {"notes": read.notes, "skipped": read.skipped, "sizes": read.sizes}
        cache.put(key, read.features, note)
    return read


@dataclass
class _Work:
    """One extraction: everything that it needs, so that it can be done under a lock or without."""

    source: ImageSource
    extractors: Sequence[Extractor]
    reading: Reading
    indices: list[int]
    title: str
    prompts: Sequence[str] | None
    scorers: Mapping[str, Scorer]
    skipped: list[str] = field(default_factory=list)

    def run(self) -> Read:
        """Decode and extract, with a bar."""
        parts: list[FeatureSet] = []
        sizes: Counter[str] = Counter()
        reading = self.reading
        quiet = None if reading.shows_progress() else True  # None: off when not a terminal
        with tqdm(total=len(self.indices), desc=self.title, unit="img", disable=quiet) as bar:
            for batch in batches(
                self.source, reading.batch_size, indices=self.indices, workers=reading.workers,
                on_error=reading.on_error, skipped=self.skipped, alpha=reading.alpha,
            ):  # fmt: skip
                sizes.update(f"{image.shape[2]}x{image.shape[1]}" for image in batch.images)
                parts.append(self.extracted(batch))
                bar.update(len(batch.indices))
        return Read(
            FeatureSet.join(parts), self.source, dict(self.source.notes), self.skipped, dict(sizes)
        )

    def extracted(self, batch: Batch) -> FeatureSet:
        """Features of a batch; images without finite features are named, or left out and named."""
        images, indices = batch.images, list(batch.indices)
        while indices:
            prompts = None if self.prompts is None else [self.prompts[i] for i in indices]
            try:
                return extract(
                    images, self.extractors, index=torch.tensor(indices), prompts=prompts,
                    scorers=self.scorers,
                )  # fmt: skip
            except NotFinite as error:
                names = [self.source.names[indices[row]] for row in error.rows]
                message = (
                    f"{error.name} gives NaN or infinity for {names[0]} of {self.source.where}"
                )
                if self.reading.on_error == "fail":
                    more = f"(and {len(names) - 1} more in its batch)"
                    raise ValueError(f"{message} {more}") from error
                self.skipped += [f"{error.name} gives NaN or infinity for {name}" for name in names]
                bad = set(error.rows)
                images = [image for row, image in enumerate(images) if row not in bad]
                indices = [index for row, index in enumerate(indices) if row not in bad]
        return FeatureSet()
