"""Presets: every number carries its evidence, and the numbers agree where they should."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from diffsteer.guidance import (
    APG_PRESETS,
    PRESETS,
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ManifoldProjectedGuidance,
    Preset,
    rules,
)

ALL = [(family, method) for family, methods in PRESETS.items() for method in methods]
REQUIRED = ("dit-xl-2-256", "edm2-s-512", "edm2-xxl-512", "sd2.1-768", "sdxl-1024", "sd3.5", "flux")


def logits_of(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :3]


@pytest.mark.parametrize("family, method", ALL)
def test_every_preset_builds_its_rule(family: str, method: str) -> None:
    preset = PRESETS[family][method]
    takes = {item.name for item in fields(preset.method)}
    needed = {"classifier": logits_of} if "classifier" in takes else {}
    if method in ("cfgmp", "degraded_pass", "interval", "rescale"):
        needed = {"rule": ClassifierFreeGuidance(2.0)}
    rule = preset.build(**needed)
    assert type(rule).__name__ in rules() and rule.__module__.endswith(f".{method}")
    assert all(getattr(rule, name) == value for name, value in preset.settings.items())


def test_the_families_of_the_papers_are_there() -> None:
    assert set(REQUIRED) <= PRESETS.keys() and APG_PRESETS.keys() >= {*REQUIRED, "sd3"}


def test_the_released_scripts_are_the_constructors_of_the_rule() -> None:
    cfg = ClassifierFreeGuidance(2.0)
    dit = PRESETS["dit-xl-2-256"]["cfgmp"].build(rule=cfg)
    sd3 = PRESETS["sd3.5"]["cfgmp"].build(rule=cfg)
    assert dit == ManifoldProjectedGuidance.dit(cfg)
    assert sd3 == ManifoldProjectedGuidance.sd3(cfg)


def test_transferred_numbers_are_the_defaults_of_the_rule() -> None:
    default = AdaptiveProjectedGuidance()
    for preset in APG_PRESETS.values():
        for name, tag in preset.evidence.items():
            assert tag != "transfer" or preset.settings[name] == getattr(default, name)
        assert preset.rule.eta == 0 and -0.75 <= preset.rule.momentum <= 0


def test_absolute_radii_say_that_they_belong_to_one_size() -> None:
    for name, preset in APG_PRESETS.items():
        assert (preset.rule.radius is not None) == ("absolute radius" in preset.note), name


@pytest.mark.parametrize(
    "name, shape, std", [("sdxl-1024", (4, 128, 128), 1.0), ("edm2-s-512", (4, 64, 64), 0.5)]
)
def test_the_default_radius_lies_among_the_known_ones(
    name: str, shape: tuple[int, ...], std: float
) -> None:
    """The transfer rule itself: known radii are 0.04 to 0.06 of the norm of a latent."""
    known = APG_PRESETS[name].rule.radius
    transferred = AdaptiveProjectedGuidance(latent_std=std).radius_for(torch.empty(1, *shape))
    assert known is not None and 0.8 < transferred / known < 1.3


def test_presets_cannot_be_changed_in_place() -> None:
    with pytest.raises(TypeError):
        APG_PRESETS["sdxl-1024"] = APG_PRESETS["sd3"]  # type: ignore[index]
    with pytest.raises(TypeError):
        APG_PRESETS["sd3"].evidence["scale"] = "verified"  # type: ignore[index]


@pytest.mark.parametrize("evidence", [{}, {"scale": "sure"}, {"scale": "ours", "eta": "ours"}])
def test_numbers_without_evidence_are_refused(evidence: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="evidence"):
        Preset(ClassifierFreeGuidance, {"scale": 2.0}, evidence)  # type: ignore[arg-type]
