"""Steered pipelines on a device that refuses what CUDA would, and says where the host waits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from tiny_pipelines import Tiny, build
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from diffsteer import steer
from diffsteer.core import Guidance, Step
from diffsteer.guidance import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    CalibratedClassifierGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    DegradedPassGuidance,
    FrequencyDecoupledGuidance,
    GradientFreeClassifierGuidance,
    GuidanceInterval,
    ManifoldProjectedGuidance,
    RescaledGuidance,
    rules,
)
from diffsteer.pipelines import degraded

CFG = ClassifierFreeGuidance(3.0)
APG = AdaptiveProjectedGuidance(6.0)
LABELS = torch.tensor([3, 7])
STEPS = 4


def unchanged(latents: Tensor) -> Tensor:
    return latents


def logits_of(images: Tensor) -> Tensor:
    return 5 * images.flatten(1)[:, :10]


CLASSIFIER: dict[str, Any] = {"decode": unchanged, "labels": LABELS}
ELUCD = CalibratedClassifierGuidance(logits_of, 0.5, rule=CFG, **CLASSIFIER)
RULES: dict[str, Any] = {
    "ClassifierFreeGuidance": CFG,
    "AdaptiveProjectedGuidance": APG,
    "AutoGuidance": AutoGuidance(2.5),
    "CalibratedClassifierGuidance": replace(ELUCD, label_map=torch.arange(10)),
    "ClassifierFreeZeroStarGuidance": ClassifierFreeZeroStarGuidance(3.0),
    "DegradedPassGuidance": DegradedPassGuidance(CFG, 2.0, start=0, stop=1),
    "FrequencyDecoupledGuidance": FrequencyDecoupledGuidance(6.0, 2.0),
    "GradientFreeClassifierGuidance": GradientFreeClassifierGuidance(
        logits_of, 3.0, hysteresis=1.5, label_map=torch.arange(10), decode=unchanged
    ),
    "GuidanceInterval": GuidanceInterval(APG, 0.05, 5.0),
    "ManifoldProjectedGuidance": ManifoldProjectedGuidance(
        CFG, iterations=3, anderson=2, above=0.2
    ),
    "RescaledGuidance": RescaledGuidance(APG),
}
# The class of a DiT is told to it, so that GFCG can tell it another.
HOME = {"GradientFreeClassifierGuidance": "dit"}


def test_every_rule_is_in_the_matrix() -> None:
    assert RULES.keys() == rules().keys()


@dataclass
class Watched:
    """A rule, and what was on record after it had run for the first and for the last time."""

    rule: Guidance
    gpu: FakeCuda
    marks: list[int] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)

    def __call__(self, step: Step) -> Tensor:
        guided = self.rule(step)
        self.marks.append(len(self.gpu.events))
        return guided

    def late(self) -> list[str]:
        """What we did between the two: the adapter's work of whole steps, and the rule's."""
        between = self.gpu.events[self.marks[0] : self.marks[-1]]
        return [str(event) for event in between if event.where.startswith("src/diffsteer")]


def weak_of(tiny: Tiny) -> nn.Module:
    layer = "mid_block" if tiny.denoisers[0] == "unet" else 0
    return degraded(getattr(tiny.pipe, tiny.denoisers[0]), skip=[layer])


def steered(tiny: Tiny, rule: Any, **inputs: Any) -> Tensor:
    said: Any = {"order": "cu", "sign": 1} if tiny.name == "qwen" else {}  # it renormalises
    with steer(tiny.pipe, rule, weak=weak_of(tiny), **said):
        return tiny.call(num_inference_steps=STEPS, **inputs)


def on_device(tiny: Tiny, gpu: FakeCuda) -> tuple[Tiny, dict[str, Any]]:
    for part in tiny.pipe.components.values():
        gpu.put(part)
    return tiny, tree_map(gpu.put, tiny.inputs())


def check(family: str, rule: Guidance, dtype: torch.dtype = torch.float32) -> Watched:
    expected = steered(build(family, dtype), rule)
    with FakeCuda(waits=True, doubles=True) as gpu:  # some networks take their sines in float64
        tiny, inputs = on_device(build(family, dtype), gpu)
        watched = Watched(rule, gpu)
        result = gpu.fetch(steered(tiny, watched, **inputs))
    assert result.dtype == expected.dtype and len(watched.marks) >= STEPS
    # Attention is another kernel there.
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    assert (result - expected).float().norm() < tolerance * expected.float().norm()
    return watched


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_waits_after_the_first_step(rule: str) -> None:
    watched = check(HOME.get(rule, "sd3"), RULES[rule])
    assert not watched.late()


@pytest.mark.parametrize("family", ["sdxl", "flux", "sana", "wan", "qwen"])
def test_steering_waits_at_the_first_step_alone(family: str) -> None:
    watched = check(family, APG, torch.bfloat16 if family == "flux" else torch.float32)
    assert not watched.late()


def test_a_timestep_that_levels_are_looked_up_by_is_read_once_a_step() -> None:
    """DDIM and PNDM read theirs on the host themselves, several times a step."""
    watched = check("sd", APG)
    assert len(watched.late()) == STEPS - 1, watched.late()
