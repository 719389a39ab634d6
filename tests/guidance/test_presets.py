"""Presets: every number carries its evidence, and the radii agree where they should."""

from __future__ import annotations

import pytest
import torch

from diffsteer.guidance import APG_PRESETS, AdaptiveProjectedGuidance, Preset

TAGS = {"scale": "ours", "eta": "verified", "radius": "transfer", "momentum": "ours"}


def test_transferred_numbers_are_the_defaults_of_the_rule() -> None:
    default = AdaptiveProjectedGuidance()
    for preset in APG_PRESETS.values():
        if preset.evidence["radius"] == "transfer":
            assert preset.rule.relative_radius == default.relative_radius
        if preset.evidence["momentum"] == "transfer":
            assert preset.rule.momentum == default.momentum
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


@pytest.mark.parametrize("evidence", [{}, {**TAGS, "scale": "sure"}, {"scale": "ours"}])
def test_numbers_without_evidence_are_refused(evidence: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="evidence"):
        Preset(AdaptiveProjectedGuidance(), evidence)  # type: ignore[arg-type]
