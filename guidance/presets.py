"""Starting points by model family and method, each number with what is known about it.

The tags: *verified* is read in the paper or its official presets through several independent
sources; *released-code* is in the authors' code; *third-party* is one statement about the paper;
*unverified* is recalled by somebody and must not be quoted as the paper's; *transfer* carries the
known models over by the relative radius of 0.05 and the band of momenta that the paper recommends;
*reconstruction* is a principled start where the paper could not be read; *ours* is a choice of this
library, to be tuned. Where nothing is known there is no preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from .apg import AdaptiveProjectedGuidance
from .autoguidance import AutoGuidance
from .cfg import ClassifierFreeGuidance
from .cfgmp import ManifoldProjectedGuidance
from .degraded_pass import DegradedPassGuidance
from .elucd import CalibratedClassifierGuidance
from .gfcg import GradientFreeClassifierGuidance
from .interval import GuidanceInterval
from .rescale import RescaledGuidance

Evidence = Literal[
    "verified", "released-code", "third-party", "unverified", "transfer", "reconstruction", "ours"
]


@dataclass(frozen=True)
class Preset:
    """Settings of a method for a model family and, for each of them, where it comes from.

    Args:
        method: the guidance method's class.
        settings: its arguments.
        evidence: a tag for each of them.
        note: what to know before use.

    Raises:
        ValueError: if a setting has no tag, or a tag is unknown.
    """

    method: type[Any]
    settings: Mapping[str, Any]
    evidence: Mapping[str, Evidence]
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse numbers without evidence."""
        if set(self.evidence) != set(self.settings):
            raise ValueError(
                f"evidence must tag {sorted(self.settings)}, got {sorted(self.evidence)}"
            )
        unknown = set(self.evidence.values()) - set(get_args(Evidence))
        if unknown:
            raise ValueError(f"unknown evidence {unknown}; the tags are {get_args(Evidence)}")
        for name in ("settings", "evidence"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def build(self, **more: Any) -> Any:
        """The method, ready to use.

        Args:
            **more: what the preset cannot know (``classifier=``, ``rule=``), and what is to differ
                from it.
        """
        return self.method(**{**self.settings, **more})

    @property
    def rule(self) -> Any:
        """``build()``, for methods that need nothing more; vary it with ``dataclasses.replace``."""
        return self.build()


_Tagged = tuple[Any, Evidence]


def _preset(method: type[Any], note: str = "", **tagged: _Tagged) -> Preset:
    values = {name: value for name, (value, _) in tagged.items()}
    return Preset(method, values, {name: tag for name, (_, tag) in tagged.items()}, note)


def _apg(
    scale: float, tag: Evidence, radius: _Tagged | None, momentum: _Tagged, note: str = ""
) -> Preset:
    name = "relative_radius" if radius is None else "radius"
    size: dict[str, _Tagged] = {name: (0.05, "transfer") if radius is None else radius}
    notes = [] if radius is None else ["absolute radius: for this latent size only"]
    return _preset(
        AdaptiveProjectedGuidance, "; ".join([*notes, *filter(None, [note])]),
        scale=(scale, tag), eta=(0.0, "verified"), momentum=momentum, **size,
    )  # fmt: skip


def _cfg(scale: float, tag: Evidence, note: str = "") -> Preset:
    return _preset(ClassifierFreeGuidance, note, scale=(scale, tag))


def _gfcg_with_autoguidance(scale: float) -> Preset:
    return _preset(
        GradientFreeClassifierGuidance,
        "the scale is that of autoguidance for FD-DINOv2; tune it by 0.3, fit the temperature",
        combine=("autoguidance", "reconstruction"), cfg_scale=(scale, "verified"),
        mode=("pair", "reconstruction"), threshold=(0.5, "reconstruction"),
        low=(0.28, "reconstruction"), high=(3.0, "reconstruction"),
    )  # fmt: skip


def _elucd(form: str, scale: float, marginal: float, tag: Evidence, note: str) -> Preset:
    return _preset(
        CalibratedClassifierGuidance, note, form=(form, tag), scale=(scale, tag), joint=(1.0, tag),
        marginal=(marginal, tag), sine=(0.3, tag),
    )  # fmt: skip


def _interval(high: float, tag: Evidence, note: str = "") -> Preset:
    return _preset(GuidanceInterval, note, low=(0.28, tag), high=(high, tag))


def _degraded(scale: float, start: float, stop: float, note: str) -> Preset:
    tag: Evidence = "third-party"
    return _preset(
        DegradedPassGuidance, note, scale=(scale, tag), start=(start, tag), stop=(stop, tag)
    )


_AUTO, _MP = AutoGuidance, ManifoldProjectedGuidance
_STEADY: _Tagged = (-0.5, "transfer")
_CODE: Evidence = "released-code"
_FD = "for FID; for FD-DINOv2 take"

PRESETS: Mapping[str, Mapping[str, Preset]] = MappingProxyType(
    {
        "dit-xl-2-256": {
            "cfg": _cfg(1.5, "verified", "the scale of DiT's FID script; its demo uses 4"),
            "apg": _apg(4.0, "unverified", (5.0, "unverified"), (-0.5, "unverified")),
            "gfcg": _preset(
                GradientFreeClassifierGuidance, "the scale is DiT's; fit the temperature",
                combine=("cfg", "reconstruction"), cfg_scale=(1.5, "verified"),
                scale=(1.0, "reconstruction"), mode=("pair", "reconstruction"),
            ),
            "elucd": _elucd(
                "posterior", 1.0, 0.5, "reconstruction",
                "the numbers of ADM-128, to be tuned; over CFG at 1.5, softplus 3, through the VAE",
            ),
            "cfgmp": _preset(
                _MP, "with D2FScheduler, 10 to 20 steps, scale 1.5 to 2.5", iterations=(2, _CODE),
                anderson=(1, _CODE), damping=(1.0, _CODE), above=(0.4, _CODE),
                step_share=(0.5, _CODE),
            ),
        },
        "edm2-s-512": {
            "cfg": _cfg(1.4, "verified", f"{_FD} 1.9"),
            "apg": _apg(4.0, "unverified", (2.5, "third-party"), (-0.75, "unverified")),
            "autoguidance": _preset(
                _AUTO, f"weak: XS at 134M images; {_FD} 2.45", scale=(2.1, "verified")
            ),
            "gfcg": _gfcg_with_autoguidance(2.45),
            "interval": _interval(3.0, "reconstruction"),
        },
        "edm2-xxl-512": {
            "cfg": _cfg(1.2, "verified", f"{_FD} 1.7"),
            "apg": _apg(2.0, "unverified", (2.5, "third-party"), (-0.75, "unverified")),
            "autoguidance": _preset(
                _AUTO, f"weak: M at 268M images; {_FD} 2.3", scale=(2.05, "verified")
            ),
            "gfcg": _gfcg_with_autoguidance(2.3),
            "interval": _interval(3.0, "reconstruction"),
        },
        "sd2.1-768": {
            "cfg": _cfg(7.5, "reconstruction"),
            "rescale": _preset(
                RescaledGuidance, "with zero terminal SNR, around cfg", rescale=(0.7, "third-party")
            ),
            "apg": _apg(10.0, "unverified", (7.5, "unverified"), (-0.75, "unverified")),
            "gfcg": _preset(
                GradientFreeClassifierGuidance, "a closed set of prompts: give condition=, labels=",
                combine=("switch", "reconstruction"), cfg_scale=(7.5, "reconstruction"),
                threshold=(0.5, "reconstruction"), mode=("pair", "reconstruction"),
            ),
        },
        "sdxl-1024": {
            "apg": _apg(15.0, "unverified", (15.0, "verified"), (-0.5, "verified")),
            "interval": _interval(5.42, "third-party", "what one other program ships"),
            "degraded_pass": _degraded(3.0, 0.0, 1.0, 'PAG: weak="perturb:mid_block"; diffusers'),
        },
        "sd3": {"apg": _apg(8.0, "ours", None, _STEADY)},
        "sd3.5": {
            "cfg": _cfg(4.5, _CODE, "of the demo of CFG-MP"),
            "degraded_pass": _degraded(
                2.8, 0.01, 0.2, 'SLG, for medium: weak="skip:7,8,9"; Stability AI, says diffusers'
            ),
            "apg": _apg(8.0, "ours", None, _STEADY),
            "cfgmp": _preset(
                _MP, "10 steps, scale 4 to 4.5; measured independently, 20 steps with iterations=1 "
                "do better at equal cost", iterations=(3, _CODE), anderson=(1, _CODE),
                damping=(1.0, _CODE), above=(0.6, _CODE), twin_above=(0.95, _CODE),
                step_share=(0.5, _CODE),
            ),
        },
        "flux": {
            "apg": _apg(4.0, "ours", None, _STEADY, "needs true guidance: a negative prompt"),
            "cfgmp": _preset(
                _MP, "needs true guidance: a negative prompt; never the embedded scale",
                iterations=(2, "third-party"), anderson=(1, "third-party"),
                above=(0.6, "reconstruction"), step_share=(0.5, "third-party"),
            ),
        },
        "adm-128": {
            "elucd": _elucd(
                "posterior", 1.0, 0.5, _CODE, "ResNet-101 V2, softplus 3, 250 ancestral steps"
            ),
        },
        "edm-64": {
            "elucd": _elucd(
                "direction", 0.004, 0.0, _CODE, "ResNet-101 V2, softplus 5, 10 Heun steps"
            ),
        },
        "sit-xl-2-256": {"apg": _apg(4.0, "ours", None, _STEADY)},
        "video": {"apg": _apg(6.0, "ours", None, _STEADY)},
        "few-step": {
            "apg": _apg(
                2.0, "ours", None, (0.0, "ours"),
                "up to 4 steps: a sum of two or three terms is only noise",
            ),
        },
        "pixels": {
            "apg": _preset(
                AdaptiveProjectedGuidance, "images in [-1, 1]", scale=(4.0, "ours"),
                eta=(0.0, "verified"), relative_radius=(0.05, "transfer"), latent_std=(0.5, "ours"),
                momentum=_STEADY,
            ),
        },
    }
)  # fmt: skip

APG_PRESETS: Mapping[str, Preset] = MappingProxyType(
    {family: methods["apg"] for family, methods in PRESETS.items() if "apg" in methods}
)
