"""Everything that metrics need to know of a set of images, gathered in one pass."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .colour import ColourStats, colour_stats
from .content import content_keys
from .extractors import Extractor
from .scorers import Scorer

# The columns of a feature set beside its taps.
COLUMNS = ("keys", "labels", "index", "colour", "prompts")


def _no_numbers() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class FeatureSet:
    """Per-sample values of N samples; sets add, and a canonical order makes them order-free.

    Args:
        taps: by "space/tap" (tap: features, logits, spatial or score), shape (N, d).
        keys: shape (N,), int64, the content of each sample (see ``content``).
        labels: shape (N,), int64, -1 where unknown.
        index: shape (N,), int64, the caller's number for each sample, -1 where not given.
        colour: shape (N, 3): saturation, contrast, clipped share; NaN where unknown.
        prompts: shape (N,), int64, a hash of each sample's prompt, -1 where there is none.
    """

    taps: dict[str, Tensor] = field(default_factory=dict)
    keys: Tensor = field(default_factory=_no_numbers)
    labels: Tensor = field(default_factory=_no_numbers)
    index: Tensor = field(default_factory=_no_numbers)
    colour: Tensor = field(default_factory=lambda: torch.empty(0, 3))
    prompts: Tensor = field(default_factory=_no_numbers)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def columns(self) -> list[Tensor]:
        """The values beside the taps, in the order of ``COLUMNS``."""
        return [getattr(self, name) for name in COLUMNS]

    def rows(self, which: Tensor) -> FeatureSet:
        """The samples that ``which`` picks: indices or a mask, (M,) or (N,)."""
        taps = {name: tap[which] for name, tap in self.taps.items()}
        return FeatureSet(taps, *(column[which] for column in self.columns))

    def only(self, names: Collection[str]) -> FeatureSet:
        """The same samples with the taps of these names ("features", "logits", ...) alone."""
        taps = {n: tap for n, tap in self.taps.items() if n.rpartition("/")[2] in names}
        return replace(self, taps=taps)

    def canonical(self) -> FeatureSet:
        """The same samples in the order of their content, without repeats of an index.

        A repeated index is a sample that a data loader repeated to fill a batch.
        """
        order = torch.argsort(self.index, stable=True)
        index = self.index[order]
        order = order[(index != index.roll(1)) | (index < 0) | (torch.arange(len(index)) == 0)]
        # Ties between copies: one that was asked to show another class is another sample.
        for column in (self.prompts, self.labels, self.keys):
            order = order[torch.argsort(column[order], stable=True)]
        return self.rows(order)  # wide rows are copied once

    @classmethod
    def join(cls, parts: Sequence[FeatureSet]) -> FeatureSet:
        """All samples of ``parts``, in their order; empty parts are welcome.

        Raises:
            ValueError: if two parts were made with different extractors or scorers.
        """
        filled = [part for part in parts if len(part)]
        if not filled:
            return parts[0] if parts else cls()
        if len(filled) == 1:
            return filled[0]
        names = filled[0].taps.keys()
        for part in filled[1:]:
            if part.taps.keys() != names:
                raise ValueError(
                    f"cannot join features of {sorted(names)} with those of {sorted(part.taps)}"
                )
        return cls(
            {name: torch.cat([part.taps[name] for part in filled]) for name in names},
            *(torch.cat(columns) for columns in zip(*(p.columns for p in filled), strict=True)),
        )


def extract(
    images: Tensor | list[Tensor],
    extractors: Sequence[Extractor],
    *,
    labels: Tensor | None = None,
    index: Tensor | None = None,
    prompts: Sequence[str] | None = None,
    scorers: Mapping[str, Scorer] | None = None,
) -> FeatureSet:
    """One forward pass of each extractor over uint8 images, and everything else that is measured.

    Args:
        images: uint8, shape (B, 3, H, W), or a list of (3, H, W).
        extractors: each runs once.
        labels: shape (B,), integer; -1 for unknown.
        index: shape (B,), integer numbers of the samples; repeats are counted once.
        prompts: what each image was asked to show.
        scorers: by name; they run where there are prompts.

    Raises:
        ValueError: if labels, index, prompts or a scorer's values do not fit the images.
    """
    count = len(images)
    for name, given in (("labels", labels), ("index", index)):
        if given is not None and given.shape != (count,):
            raise ValueError(f"{name} must have shape ({count},), got {tuple(given.shape)}")
    if prompts is not None and len(prompts) != count:
        raise ValueError(f"prompts must be one an image, {count}, got {len(prompts)}")
    unknown = torch.full((count,), -1, dtype=torch.int64)
    taps = {}
    for extractor in extractors:
        found = extractor(images)
        for tap in ("features", "logits", "spatial"):
            value = getattr(found, tap)
            if value is not None:
                taps[f"{extractor.space}/{tap}"] = value
    for name, scorer in (scorers or {}).items() if prompts is not None else ():
        taps[f"{name}/score"] = _scored(name, scorer, images, prompts or ())
    return FeatureSet(
        taps,
        content_keys(images),
        unknown if labels is None else labels.cpu().to(torch.int64),
        unknown if index is None else index.cpu().to(torch.int64),
        _colour(images),
        unknown if prompts is None else torch.tensor([_hash(prompt) for prompt in prompts]),
    )


def _scored(
    name: str, scorer: Scorer, images: Tensor | list[Tensor], prompts: Sequence[str]
) -> Tensor:
    values = torch.as_tensor(scorer(images, prompts)).detach().float().cpu()
    if values.shape != (len(images),):
        raise ValueError(
            f"the scorer {name!r} must give one value an image, shape ({len(images)},), got "
            f"{tuple(values.shape)}"
        )
    return values[:, None]


def _hash(prompt: str) -> int:
    """63 bits of a prompt: the same in every process, unlike ``hash``."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") >> 1


def _colour(images: Tensor | list[Tensor]) -> Tensor:
    if isinstance(images, Tensor):
        return _columns(colour_stats(images))
    return torch.cat([_columns(colour_stats(image[None])) for image in images])


def _columns(stats: ColourStats) -> Tensor:
    return torch.stack([stats.saturation, stats.contrast, stats.clipped], 1).cpu()
