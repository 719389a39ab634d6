"""The tables and verdicts of the study of guidance, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import _science_claims as claims

from diffsteer.eval.half_samples import Estimate
from diffsteer.pipelines import PointResult

COLUMNS = {
    "fd": ("fd ↓", 1, 1), "accuracy": ("accuracy ↑ %", 100, 1), "precision": ("precision ↑", 1, 3),
    "recall": ("recall ↑", 1, 3), "diversity": ("diversity ↑", 1, 3),
    "saturation": ("saturation", 1, 3), "contrast": ("contrast", 1, 3),
    "clipped": ("clipped %", 100, 1), "coarse": ("coarse fd ↓", 1, 2),
}  # fmt: skip


@dataclass(frozen=True)
class Study:
    """Everything that was measured."""

    samples: int
    seeds: int
    steps: int
    parts: tuple[str, ...]
    results: list[PointResult]
    scores: dict[str, dict[str, Estimate]]
    pushes: dict[str, float]
    gaps: dict[str, Any]
    honesty: dict[str, Any] | None
    real: dict[str, float]
    extractor: str

    def of(self, prefix: str) -> list[PointResult]:
        """The results whose point has this family."""
        return [found for found in self.results if found.point.family == prefix]

    def point(self, name: str) -> PointResult:
        """The result of a point."""
        return next(found for found in self.results if found.point.name == name)

    def numbers(self) -> dict[str, Any]:
        """All estimates as plain data."""
        scores = {
            name: {key: {"value": e.value, "stderr": e.stderr} for key, e in found.items()}
            for name, found in self.scores.items()
        }
        return {
            "samples": self.samples, "seeds": self.seeds, "steps": self.steps,
            "extractor": self.extractor, "scores": scores, "pushes": self.pushes,
            "gaps": self.gaps, "calibration": self.honesty, "real": self.real,
        }  # fmt: skip


def results(study: Study) -> str:
    """The whole generated part of the page."""
    sections: dict[str, tuple[str, Callable[[Study], list[str]]]] = {
        "a": ("(a) APG against CFG", _apg),
        "b": ("(b) GFCG-style guidance", _gfcg),
        "c": ("(c) EluCD", _elucd),
        "d": ("(d) CFG-MP and CFG-MP+", _projection),
        "e": ("(e) Autoguidance", _auto),
        "f": ("(f) Compositions", _composed),
    }
    lines = [_what_was_run(study)]
    for part, (title, write) in sections.items():
        if part in study.parts:
            lines += [f"## {title}", *write(study)]
    return "\n\n".join(lines) + "\n"


def table(study: Study, names: Sequence[str], titles: dict[str, str] | None = None) -> str:
    """One row a point: price, and every score with the half-width of its 95 % interval."""
    shown = {key: form for key, form in COLUMNS.items() if key in study.scores[names[0]]}
    heads = ["", "steps", "NFE", *(title for title, _, _ in shown.values())]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in names:
        found, scores = study.point(name), study.scores[name]
        cells = [
            (titles or {}).get(name, _title(found)),
            str(found.point.steps),
            str(found.cost.nfe),
        ]
        cells += [_cell(scores[key], factor, digits) for key, (_, factor, digits) in shown.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(score: Estimate, factor: float, digits: int) -> str:
    width = 1.96 * score.stderr * factor
    return f"{score.value * factor:.{digits}f} ± {width:.{digits}f}"


def _title(found: PointResult) -> str:
    scale = "" if found.point.scale is None else f" {found.point.scale:g}"
    return found.point.family + scale


def _names(study: Study, *families: str) -> list[str]:
    return [found.point.name for family in families for found in study.of(family)]


def _what_was_run(study: Study) -> str:
    sets = "" if study.seeds == 1 else f", {study.seeds} independent sets of seeds"
    real = ", ".join(f"{name} {value:.3f}" for name, value in study.real.items())
    return (
        f"**What was run:** {study.samples} images a point{sets}, the same seeds and classes for "
        f"every point; {study.steps} Euler steps except in (d); {len(study.results)} points. "
        f"Scores by `{study.extractor}`." + (f" Real images: {real}." if real else "")
    )


def _apg(study: Study) -> list[str]:
    return [
        table(study, _names(study, "no guidance", "CFG", "APG")),
        "Effective push `||D - D_c||`, root mean square over pixels, steps and images:",
        claims.push_table(study),
        *claims.apg(study),
    ]


def _gfcg(study: Study) -> list[str]:
    honesty = study.honesty or {}
    high = honesty.get("high")
    fitted = (
        f"Fitted by calibration: temperature {honesty.get('temperature')}, guided where "
        f"{honesty.get('low')} < sigma / alpha <= {'infinity' if high is None else high}."
    )
    families = ("GFCG-style", "CFG 2 + GFCG-style", "autoguidance + GFCG-style")
    names = ["none", "cfg-2", "cfg-3", *_names(study, *families)]
    return [fitted, table(study, names), claims.classifier_times(study, families),
            *claims.gfcg(study)]  # fmt: skip


def _elucd(study: Study) -> list[str]:
    names = ["none", "cfg-2", *_names(study, "plain classifier", "EluCD")]
    names += [f.point.name for f in study.results if f.point.family.startswith("EluCD, ")]
    names += _names(study, "CFG 2 + EluCD")
    return [table(study, names), claims.classifier_times(study, ("plain classifier", "EluCD")),
            claims.calibration_table(study), *claims.elucd(study)]  # fmt: skip


def _projection(study: Study) -> list[str]:
    names = [f.point.name for f in study.results if f.point.name.startswith(("cfg30", "mp"))]
    return [table(study, names), claims.gap_table(study), *claims.projection(study)]


def _auto(study: Study) -> list[str]:
    names = ["none", "cfg-1.5", "cfg-2", "cfg-3", *_names(study, "autoguidance")]
    return [table(study, names), *claims.auto(study)]


def _composed(study: Study) -> list[str]:
    names = [f.point.name for f in study.results
             if f.point.name in ("interval-cfg-6", "auto-apg-3", "auto2-elucd")]  # fmt: skip
    titles = {found.point.name: found.point.family for found in study.results}
    return [table(study, names, titles), *claims.composed(study)]
