"""Starting points for APG by model family, each number with what is known about it.

The tags: *verified* is read in the paper through several independent sources; *third-party* is one
statement about the paper; *unverified* is recalled by somebody and must not be quoted as the
paper's; *transfer* carries the known models over by the relative radius of 0.05 and the band of
momenta that the paper recommends; *ours* is a choice of this library, to be tuned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from .apg import AdaptiveProjectedGuidance

Evidence = Literal["verified", "third-party", "unverified", "transfer", "ours"]


@dataclass(frozen=True)
class Preset:
    """A rule for a model family and, for each of its numbers, where it comes from.

    Args:
        rule: ready to use; vary it with ``dataclasses.replace``.
        evidence: a tag for ``scale``, ``eta``, ``radius`` (absolute or relative) and ``momentum``.
        note: what to know before use.

    Raises:
        ValueError: if a number has no tag, or a tag is unknown.
    """

    rule: AdaptiveProjectedGuidance
    evidence: Mapping[str, Evidence]
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse numbers without evidence."""
        if set(self.evidence) != {"scale", "eta", "radius", "momentum"}:
            raise ValueError(
                f"evidence must tag scale, eta, radius and momentum, got {sorted(self.evidence)}"
            )
        unknown = set(self.evidence.values()) - set(get_args(Evidence))
        if unknown:
            raise ValueError(f"unknown evidence {unknown}; the tags are {get_args(Evidence)}")


def _preset(
    rule: AdaptiveProjectedGuidance,
    scale: Evidence,
    radius: Evidence,
    momentum: Evidence,
    note: str = "",
) -> Preset:
    evidence: dict[str, Evidence] = {
        "scale": scale,
        "eta": "verified",
        "radius": radius,
        "momentum": momentum,
    }
    return Preset(rule, MappingProxyType(evidence), note)


_Rule = AdaptiveProjectedGuidance
_LATENT = "absolute radius: for this latent size only"

APG_PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "sdxl-1024": _preset(
            _Rule(15.0, radius=15.0), "unverified", "verified", "verified", _LATENT
        ),
        "edm2-s-512": _preset(
            _Rule(4.0, radius=2.5, momentum=-0.75),
            "unverified", "third-party", "unverified", _LATENT,
        ),
        "edm2-xxl-512": _preset(
            _Rule(2.0, radius=2.5, momentum=-0.75),
            "unverified", "third-party", "unverified", _LATENT,
        ),
        "dit-xl-2-256": _preset(
            _Rule(4.0, radius=5.0), "unverified", "unverified", "unverified", _LATENT
        ),
        "sd2.1-768": _preset(
            _Rule(10.0, radius=7.5, momentum=-0.75),
            "unverified", "unverified", "unverified", _LATENT,
        ),
        "sd3": _preset(_Rule(8.0), "ours", "transfer", "transfer"),
        "flux": _preset(
            _Rule(4.0), "ours", "transfer", "transfer", "needs true guidance: a negative prompt"
        ),
        "sit-xl-2-256": _preset(_Rule(4.0), "ours", "transfer", "transfer"),
        "video": _preset(_Rule(6.0), "ours", "transfer", "transfer"),
        "pixels": _preset(
            _Rule(4.0, latent_std=0.5), "ours", "transfer", "transfer", "images in [-1, 1]"
        ),
        "few-step": _preset(
            _Rule(2.0, momentum=0.0), "ours", "transfer", "ours",
            "up to 4 steps: a sum of two or three terms is only noise",
        ),
    }
)  # fmt: skip
