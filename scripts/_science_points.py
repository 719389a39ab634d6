"""The settings that the study of guidance compares, part by part."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from diffsteer.core import Guidance
from diffsteer.guidance import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    CalibratedClassifierGuidance,
    ClassifierFreeGuidance,
    GradientFreeClassifierGuidance,
    GuidanceInterval,
    ManifoldProjectedGuidance,
    smooth_activations,
)
from diffsteer.pipelines import SweepPoint

CFG_SCALES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
APG_SCALES = (2.0, 4.0, 6.0, 8.0, 12.0)
PARTS = "abcdef"
BUDGET = 60  # evaluations an image of part d
GATE = 0.4  # flow sigma above which CFG-MP iterates


@dataclass(frozen=True)
class Tools:
    """What rules are built from: the guiding classifier and what calibration has fitted."""

    classifier: Any
    latent_std: float
    steps: int = 20
    temperature: float = 1.0
    low: float = 0.0
    high: float = float("inf")


def one_view(classifier: Any) -> Any:
    """A classifier without its pass over mirror images, which would double its price."""
    if getattr(classifier.config, "mirrored", False):
        classifier.config = replace(classifier.config, mirrored=False)
    return classifier


def apg(scale: float, tools: Tools, **more: Any) -> AdaptiveProjectedGuidance:
    return AdaptiveProjectedGuidance(scale, latent_std=tools.latent_std, **more)


def cfg_points(tools: Tools) -> list[SweepPoint]:
    """What every part is compared with: no guidance, and CFG over scales."""
    none = SweepPoint("none", None, tools.steps)
    return [none, *(_point(f"cfg-{w:g}", ClassifierFreeGuidance(w), tools.steps, "CFG", w)
                    for w in CFG_SCALES)]  # fmt: skip


def apg_points(tools: Tools) -> list[SweepPoint]:
    """Part a."""
    return [_point(f"apg-{w:g}", apg(w, tools), tools.steps, "APG", w) for w in APG_SCALES]


def gfcg_points(tools: Tools) -> list[SweepPoint]:
    """Part b: alone, on CFG, and as the label of autoguidance's weak model."""

    def rule(scale: float, **more: Any) -> GradientFreeClassifierGuidance:
        return GradientFreeClassifierGuidance(
            tools.classifier, scale=scale, temperature=tools.temperature, low=tools.low,
            high=tools.high, **more,
        )  # fmt: skip

    def points(name: str, family: str, scales: tuple[float, ...], **more: Any) -> list[SweepPoint]:
        return [_point(f"{name}-{s:g}", rule(s, **more), tools.steps, family, s) for s in scales]

    mixed = [
        _point(f"auto-gfcg-{w:g}", rule(1.0, combine="autoguidance", cfg_scale=w), tools.steps,
               "autoguidance + GFCG-style", w)
        for w in (2.0,)
    ]  # fmt: skip
    return [
        *points("gfcg", "GFCG-style", (1.0, 2.0)),
        *points("cfg2-gfcg", "CFG 2 + GFCG-style", (1.0,), combine="cfg", cfg_scale=2.0),
        *mixed,
    ]


ELUCD_SCALES = (0.2, 0.5, 1.0)
PLAIN_SCALES = (0.5,)
ABLATED_AT = 0.5
ABLATIONS = ("noisy input", "ReLU", "equal temperatures", "no sine term")


def elucd_points(tools: Tools) -> list[SweepPoint]:
    """Part c: the whole method, plain classifier guidance, and each ingredient taken away."""
    smooth = smooth_activations(tools.classifier, beta=5.0)

    def rule(scale: float, classifier: Any = smooth, **more: Any) -> CalibratedClassifierGuidance:
        return CalibratedClassifierGuidance(classifier, scale=scale, **more)

    def plain(scale: float) -> CalibratedClassifierGuidance:
        return rule(scale, tools.classifier, marginal=1.0, sine=0.0)

    s = ABLATED_AT
    ablations: dict[str, Guidance] = {
        "noisy input": rule(s, classify_on="noisy"),
        "ReLU": rule(s, tools.classifier),
        "equal temperatures": rule(s, marginal=1.0),
        "no sine term": rule(s, sine=0.0),
    }
    steps = tools.steps
    return [
        *(_point(f"plain-{w:g}", plain(w), steps, "plain classifier", w) for w in PLAIN_SCALES),
        *(_point(f"elucd-{w:g}", rule(w), steps, "EluCD", w) for w in ELUCD_SCALES),
        *(_point(f"elucd-{name.replace(' ', '_')}", found, steps, f"EluCD, {name}", s)
          for name, found in ablations.items()),
        _point("cfg2-elucd", rule(s, rule=ClassifierFreeGuidance(2.0)), steps, "CFG 2 + EluCD", s),
    ]  # fmt: skip


def projection_points(tools: Tools) -> list[SweepPoint]:
    """Part d: how to spend the same number of evaluations, counted as the authors count."""
    found = []
    for w in (2.0, 4.0):
        cfg = ClassifierFreeGuidance(w)
        found.append(_point(f"cfg30-{w:g}", cfg, BUDGET // 2, f"CFG, {BUDGET // 2} steps", w))
        for name, iterations, anderson in (("mp1", 1, 0), ("mp2", 2, 0), ("mp2plus", 2, 1)):
            steps = budget_steps(iterations)
            rule = ManifoldProjectedGuidance(
                cfg, iterations=iterations, anderson=anderson, above=GATE
            )
            title = f"CFG-MP{'+' if anderson else ''}, K={iterations}, {steps} steps"
            found.append(_point(f"{name}-{w:g}", rule, steps, title, w))
    return found


def budget_steps(iterations: int, budget: int = BUDGET) -> int:
    """Most steps with 2 N + 2 K (number of gated steps) <= budget; sigmas are 1, 1 - 1/N, ..."""

    def nfe(steps: int) -> int:
        gated = sum(1 - index / steps > GATE for index in range(steps))
        return 2 * steps + 2 * iterations * gated

    return max(steps for steps in range(1, budget) if nfe(steps) <= budget)


def auto_points(tools: Tools) -> list[SweepPoint]:
    """Part e."""
    return [_point(f"auto-{w:g}", AutoGuidance(w), tools.steps, "autoguidance", w)
            for w in (1.5, 2.0, 3.0)]  # fmt: skip


def composed_points(tools: Tools) -> list[SweepPoint]:
    """Part f: compositions that the parts before suggest."""
    interval = GuidanceInterval.flow(ClassifierFreeGuidance(6.0), 0.2, 0.9)
    projected = AutoGuidance(rule=apg(3.0, tools))
    both = CalibratedClassifierGuidance(
        smooth_activations(tools.classifier, beta=5.0), scale=ABLATED_AT, rule=AutoGuidance(2.0)
    )
    steps = tools.steps
    return [
        _point("interval-cfg-6", interval, steps, "CFG 6 in (0.2, 0.9]", 6.0),
        _point("auto-apg-3", projected, steps, "autoguidance 3 with APG", 3.0),
        _point("auto2-elucd", both, steps, "autoguidance 2 + EluCD", ABLATED_AT),
    ]


def points_of(part: str, tools: Tools) -> list[SweepPoint]:
    """The points of a part, without those of ``cfg_points``."""
    made = {
        "a": apg_points, "b": gfcg_points, "c": elucd_points, "d": projection_points,
        "e": auto_points, "f": composed_points,
    }  # fmt: skip
    return made[part](tools)


def _point(name: str, rule: Guidance, steps: int, family: str, scale: float) -> SweepPoint:
    return SweepPoint(name, rule, steps, family, scale)
