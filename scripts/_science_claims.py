"""Whether each claim held: differences over the same seeds, with intervals, and a word."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from _science_points import ABLATED_AT

from diffsteer.eval.half_samples import Estimate

if TYPE_CHECKING:
    from _science_page import Study

HIGH = ("6", "8", "12")
DOWN, UP = -1, 1  # what a claim wants of a difference


def verdict(text: str, change: Estimate, wanted: int, digits: int = 1, factor: float = 1.0) -> str:
    """One line: held, failed, or not decided by an interval of 95 %."""
    width = 1.96 * change.stderr
    if not change.differs():
        word = "not decided"
    else:
        word = "held" if change.value * wanted > 0 else "failed"
    number = f"{change.value * factor:+.{digits}f} ± {width * factor:.{digits}f}"
    return f"- **{word}**: {text}: {number}"


def against(study: Study, first: str, second: str, score: str) -> Estimate:
    """A score of one point minus that of another, over the same seeds."""
    return study.scores[first][score] - study.scores[second][score]


# What a claim on a score wants, how many digits it takes, and a factor for display.
FORMS = {
    "fd": (DOWN, 1, 1.0, "fd falls"), "accuracy": (UP, 1, 100.0, "accuracy rises (points)"),
    "recall": (UP, 3, 1.0, "recall rises"), "saturation": (DOWN, 3, 1.0, "saturation falls"),
    "coarse": (DOWN, 2, 1.0, "the distance in coarse pixels falls"),
}  # fmt: skip


def claim(study: Study, text: str, first: str, second: str, *scores: str) -> list[str]:
    """A verdict for each score of ``first`` against ``second``; none where a point was not made."""
    if not {first, second} <= set(study.scores):
        return []
    lines = []
    for score in (name for name in scores if name in study.scores[first]):
        wanted, digits, factor, words = FORMS[score]
        change = against(study, first, second, score)
        lines.append(verdict(f"{text}: {words}", change, wanted, digits, factor))
    return lines


def kept(study: Study, text: str, first: str, second: str, *scores: str) -> list[str]:
    """A verdict that a score is not lower; one that an interval cannot decide counts as kept."""
    if not {first, second} <= set(study.scores):
        return []
    lines = []
    for score in scores:
        change = against(study, first, second, score)
        word = "failed" if change.differs() and change.value < 0 else "held"
        number = f"{change.value:+.3f} ± {1.96 * change.stderr:.3f}"
        lines.append(f"- **{word}**: {text}: {score} is kept: {number}")
    return lines


def apg(study: Study) -> list[str]:
    """(a): better fd, recall and saturation at high scales, at comparable precision."""
    same, matched = [], []
    for scale in HIGH:
        pair, text = (f"apg-{scale}", f"cfg-{scale}"), f"scale {scale}"
        same += claim(study, text, *pair, "fd", "recall", "saturation")
        same += kept(study, text, *pair, "precision")
    for scale in ("4", *HIGH):
        cfg = at_push(study, study.pushes[f"apg-{scale}"])
        if cfg is None:
            matched.append(f"- at APG {scale} no CFG scale here pushes as little; not compared")
            continue
        ours = study.scores[f"apg-{scale}"]
        for score, (wanted, digits, factor, words) in FORMS.items():
            if score not in ours:
                continue
            text = f"the push of APG {scale}: {words}"
            matched.append(verdict(text, ours[score] - cfg[score], wanted, digits, factor))
    return ["APG minus CFG at the same scale:", "\n".join(same), "APG minus CFG at the same "
            "effective push, CFG interpolated between its scales:", "\n".join(matched)]  # fmt: skip


def at_push(study: Study, push: float) -> dict[str, Estimate] | None:
    """CFG's scores at an effective push, linear between its two neighbouring scales."""
    curve = sorted((study.pushes[f.point.name], f.point.name) for f in study.of("CFG"))
    for (low, first), (high, second) in pairwise(curve):
        if low <= push <= high:
            share = (push - low) / (high - low)
            a, b = study.scores[first], study.scores[second]
            return {
                name: Estimate(
                    (1 - share) * a[name].value + share * b[name].value,
                    torch.lerp(a[name].halves, b[name].halves, share),
                )
                for name in a
            }
    return None


def gfcg(study: Study) -> list[str]:
    """(b): more class accuracy, also on top of CFG and autoguidance, without loss of diversity."""
    lines = []
    for s in ("1", "2"):
        lines += claim(study, f"alone, scale {s}, against no guidance", f"gfcg-{s}", "none",
                       "accuracy", "fd")  # fmt: skip
        lines += claim(study, f"alone, scale {s}, against CFG 2 (as many evaluations)",
                       f"gfcg-{s}", "cfg-2", "accuracy", "fd", "recall")  # fmt: skip
    lines += claim(study, "on top of CFG 2, against CFG 2", "cfg2-gfcg-1", "cfg-2",
                   "accuracy", "fd")  # fmt: skip
    lines += claim(study, "on top of CFG 2, against CFG 3, which costs less", "cfg2-gfcg-1",
                   "cfg-3", "accuracy", "fd")  # fmt: skip
    pair = ("auto-gfcg-2", "auto-2")
    lines += claim(study, "in autoguidance 2, no more evaluations", *pair, "accuracy", "fd")
    lines += kept(study, "in autoguidance 2", *pair, "recall", "diversity")
    return ["\n".join(lines)]


def elucd(study: Study) -> list[str]:
    """(c): an off-the-shelf classifier helps, calibrated more than plain; each ingredient does."""
    full, cfg = f"elucd-{ABLATED_AT:g}", best(study, ("CFG",))
    ours = best(study, ("EluCD",))
    lines = [
        *claim(study, f"{full} against no guidance", full, "none", "fd", "accuracy", "coarse"),
        *claim(study, f"{full} against plain classifier guidance of the same scale", full,
               f"plain-{ABLATED_AT:g}", "fd", "accuracy"),
        *claim(study, f"the best EluCD ({ours}) against the best CFG ({cfg})", ours, cfg,
               "fd", "accuracy", "recall", "coarse"),
        *claim(study, "on top of CFG 2, against CFG 2", "cfg2-elucd", "cfg-2", "fd", "accuracy",
               "coarse"),
    ]  # fmt: skip
    for found in study.results:
        if found.point.family.startswith("EluCD, "):
            text = f"{full} against the same with one ingredient gone ({found.point.family[7:]})"
            lines += claim(study, text, full, found.point.name, "fd")
    return ["\n".join(lines)]


def projection(study: Study) -> list[str]:
    """(d): better at equal evaluations, less sensitive to the scale, with a smaller gap."""
    lines = []
    for w in ("2", "4"):
        for name, title in (("mp1", "MP, K=1"), ("mp2", "MP, K=2"), ("mp2plus", "MP+, K=2")):
            pair, text = (f"{name}-{w}", f"cfg30-{w}"), f"{title} against CFG, scale {w}"
            lines += claim(study, text, *pair, "fd", "accuracy")
            lines += kept(study, text, *pair, "recall", "diversity")
    changes = ["How much a score moves from scale 2 to scale 4, less than with CFG is wanted:"]
    rows = []
    for name, title in (("mp1", "MP, K=1"), ("mp2", "MP, K=2"), ("mp2plus", "MP+, K=2")):
        for score in ("accuracy", "recall", "saturation"):
            if f"{name}-4" in study.scores and f"{name}-2" in study.scores:
                change = _sensitivity(study, name, score)
                rows.append(verdict(f"{title}, {score}", change, DOWN, 3))
    return ["\n".join(lines), *changes, "\n".join(rows)]


def _sensitivity(study: Study, name: str, score: str) -> Estimate:
    """|M(4) - M(2)| of a method minus that of CFG; signs from the whole sets."""
    ours = against(study, f"{name}-4", f"{name}-2", score)
    cfg = against(study, "cfg30-4", "cfg30-2", score)

    def size(change: Estimate) -> Estimate:
        sign = 1.0 if change.value >= 0 else -1.0
        return Estimate(sign * change.value, sign * change.halves)

    return size(ours) - size(cfg)


def auto(study: Study) -> list[str]:
    """(e): better than no guidance, and more varied than CFG of the same accuracy."""
    lines = []
    for w in ("1.5", "2", "3"):
        name = f"auto-{w}"
        if name in study.scores:
            partner = _same_accuracy(study, name)
            lines += claim(study, f"scale {w} against no guidance", name, "none", "fd")
            text = f"scale {w} against {partner}, the CFG of nearest accuracy"
            lines += claim(study, text, name, partner, "fd", "recall", "accuracy")
    return ["\n".join(lines)]


def _same_accuracy(study: Study, name: str) -> str:
    goal = study.scores[name]["accuracy"].value
    names = [found.point.name for found in study.of("CFG")]
    return min(names, key=lambda other: abs(study.scores[other]["accuracy"].value - goal))


def composed(study: Study) -> list[str]:
    """(f): the lowest fd of all points, against the lowest of CFG alone and of single methods."""
    order = sorted(study.scores, key=lambda name: study.scores[name]["fd"].value)
    cfg = best(study, ("CFG",))
    first = "\n".join(
        f"- {place}. `{name}`: fd {study.scores[name]['fd'].value:.1f}, accuracy "
        f"{100 * study.scores[name]['accuracy'].value:.1f} %, recall "
        f"{study.scores[name]['recall'].value:.3f}"
        for place, name in enumerate(order[:6], 1)
    )
    text = f"the lowest of all ({order[0]}) against the lowest of CFG ({cfg})"
    lines = claim(study, text, order[0], cfg, "fd", "accuracy", "recall", "coarse")
    return ["The lowest distances of all points:", first, "\n".join(lines)]


def best(study: Study, families: Sequence[str]) -> str:
    """The point of lowest fd among families."""
    names = [found.point.name for family in families for found in study.of(family)]
    return min(names, key=lambda name: study.scores[name]["fd"].value)


def push_table(study: Study) -> str:
    """The effective push of CFG and APG over scales."""
    scales = sorted({f.point.scale for f in study.of("CFG") if f.point.scale is not None})
    lines = ["| scale | " + " | ".join(f"{s:g}" for s in scales) + " |"]
    lines.append("|---" * (len(scales) + 1) + "|")
    for name, prefix in (("CFG", "cfg"), ("APG", "apg")):
        cells = [study.pushes.get(f"{prefix}-{s:g}") for s in scales]
        lines.append(f"| {name} | " + " | ".join("" if c is None else f"{c:.4f}" for c in cells)
                     + " |")  # fmt: skip
    return "\n".join(lines)


def gap_table(study: Study) -> str:
    """The gap of the velocities where the rule mixes them, averaged over the gated steps."""
    lines = ["Prediction gap `||v_c - v_u||` where CFG acts, mean over steps above sigma 0.4:",
             "", "| | " + " | ".join(study.gaps) + " |",
             "|---" * (len(study.gaps) + 1) + "|"]  # fmt: skip
    means = []
    for found in study.gaps.values():
        kept = [g for g, s in zip(found["gap"], found["sigma"], strict=True) if s > 0.4]
        means.append(sum(kept) / len(kept))
    return "\n".join([*lines, "| gap | " + " | ".join(f"{m:.4f}" for m in means) + " |"])


def classifier_times(study: Study, families: Sequence[str]) -> str:
    """Classifier seconds per step."""
    costs = [f.cost for family in families for f in study.of(family)]
    known = [c for c in costs if c.classifier_seconds is not None]
    if not known:
        return ""
    low, high = (pick(c.classifier_seconds for c in known) for pick in (min, max))
    return (f"The classifier takes {low:.2f} to {high:.2f} s a step for {known[0].batch_size} "
            "images.")  # fmt: skip


def calibration_table(study: Study) -> str:
    """Calibration error and accuracy of the guiding classifier, averaged along the trajectory."""
    if study.honesty is None:
        return ""
    lines = ["Calibration error (ECE) of the guiding classifier along unguided trajectories:", "",
             "| input, activation | mean over steps | noisiest third | middle | cleanest third | "
             "mean accuracy |", "|---|---|---|---|---|---|"]  # fmt: skip
    for name, curve in study.honesty["curves"].items():
        ece = torch.tensor(curve["ece"])
        thirds = [float(part.mean()) for part in ece.tensor_split(3)]
        mean = float(torch.tensor(curve["accuracy"]).mean())
        cells = [f"{value:.3f}" for value in (float(ece.mean()), *thirds, mean)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
