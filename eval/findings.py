"""What is suspicious about a set of samples: collapse, copies, imbalance, counts."""

from __future__ import annotations

import torch

from .features import FeatureSet
from .reference import Reference
from .settings import Settings


def findings(fake: FeatureSet, reference: Reference, settings: Settings, space: str) -> list[str]:
    """Warnings about the samples themselves, each once, in words for the user.

    Args:
        fake: the generated samples.
        reference: what they are compared with.
        settings: the protocol.
        space: of the first extractor.
    """
    return [
        *_counts(fake, reference, settings, space),
        *_copies(fake, reference),
        *_flatness(fake),
        *_balance(fake, reference),
    ]


def _counts(fake: FeatureSet, reference: Reference, settings: Settings, space: str) -> list[str]:
    found = []
    if settings.samples is not None and len(fake) < min(settings.samples, 10_000):
        found.append(
            f"{len(fake)} samples, where the {settings.protocol} protocol has {settings.samples}: "
            "distances are larger at smaller N, so compare at equal N only"
        )
    real = reference.count(space)
    if real and real != len(fake):
        found.append(f"{len(fake)} generated against {real} real samples; distances depend on both")
    return found


def _copies(fake: FeatureSet, reference: Reference) -> list[str]:
    found = []
    copies = len(fake) - len(torch.unique(fake.keys))
    if copies > len(fake) / 100:
        found.append(
            f"{copies} of {len(fake)} generated samples are exact copies of others (collapse, or a "
            "loader that repeats samples); precision and recall then depend on < or <="
        )
    memorised = int(torch.isin(fake.keys, reference.keys()).sum())
    if memorised:
        found.append(f"{memorised} generated samples are exact copies of real ones")
    return found


def _flatness(fake: FeatureSet) -> list[str]:
    contrast = fake.colour[:, 1]
    if len(contrast) and bool((contrast < 1 / 255).all()):
        return [
            "all generated images are flat (contrast below one grey level): were floats in [0, 1] "
            "cast to uint8?"
        ]
    return []


def _balance(fake: FeatureSet, reference: Reference) -> list[str]:
    labels = fake.labels
    if len(labels) == 0 or bool((labels < 0).any()):
        return []
    counts = torch.bincount(labels).double()
    real = reference.labels
    whose = "those of the reference"
    if real is not None and len(real) and bool((real >= 0).all()):
        size = max(len(counts), int(real.max()) + 1)
        share = torch.bincount(labels, minlength=size).double() / len(labels)
        wanted = torch.bincount(real, minlength=size).double() / len(real)
    else:
        whose = "one another"
        share = counts[counts > 0] / len(labels)
        wanted = torch.full_like(share, 1 / len(share))
    # Four standard deviations of a random draw: chance alone does not warn.
    spread = (wanted * (1 - wanted) / len(labels)).sqrt()
    if bool(((share - wanted).abs() > 4 * spread + 1 / len(labels)).any()):
        return [f"class shares of the generated samples differ from {whose}"]
    return []
