"""Whether each claim held: differences over the same seeds, with intervals, and a word."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from diffsteer.eval.half_samples import Estimate

if TYPE_CHECKING:
    from _science_page import Study

HIGH = ("6", "8", "12")
DOWN, UP = -1, 1


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


def apg(study: Study) -> list[str]:
    """(a): better fd, recall and saturation at high scales, at comparable precision."""
    same = []
    for scale in HIGH:
        pair = (f"apg-{scale}", f"cfg-{scale}")
        at = f"at scale {scale}, APG minus CFG"
        same += [
            verdict(f"fd falls {at}", against(study, *pair, "fd"), DOWN),
            verdict(f"recall rises {at}", against(study, *pair, "recall"), UP, 3),
            verdict(f"saturation falls {at}", against(study, *pair, "saturation"), DOWN, 3),
            _comparable(f"precision is comparable {at}", against(study, *pair, "precision")),
        ]
    matched = []
    for scale in ("4", *HIGH):
        cfg = at_push(study, study.pushes[f"apg-{scale}"])
        if cfg is None:
            matched.append(f"- at APG {scale} no CFG scale here pushes as little; not compared")
            continue
        ours, at = study.scores[f"apg-{scale}"], f"at the push of APG {scale}, APG minus CFG"
        matched += [
            verdict(f"fd falls {at}", ours["fd"] - cfg["fd"], DOWN),
            verdict(f"recall rises {at}", ours["recall"] - cfg["recall"], UP, 3),
            verdict(f"saturation falls {at}", ours["saturation"] - cfg["saturation"], DOWN, 3),
            verdict(f"accuracy rises {at}, points", ours["accuracy"] - cfg["accuracy"], UP, 1, 100),
        ]
    return ["At the same scale:", "\n".join(same), "At the same effective push, CFG interpolated "
            "between its scales:", "\n".join(matched)]  # fmt: skip


def _comparable(text: str, change: Estimate) -> str:
    word = "failed" if change.differs() and change.value < 0 else "held"
    return f"- **{word}**: {text}: {change.value:+.3f} ± {1.96 * change.stderr:.3f}"


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
    lines = [
        verdict(f"accuracy rises over no guidance at scale {s}, points",
                against(study, f"gfcg-{s}", "none", "accuracy"), UP, 1, 100)
        for s in ("1", "2", "4")
    ]  # fmt: skip
    for s in ("1",):
        name = f"cfg2-gfcg-{s}"
        lines += [
            verdict(f"on top of CFG 2, scale {s}: accuracy rises, points",
                    against(study, name, "cfg-2", "accuracy"), UP, 1, 100),
            verdict(f"on top of CFG 2, scale {s}: fd falls",
                    against(study, name, "cfg-2", "fd"), DOWN),
            verdict(f"on top of CFG 2, scale {s}: fd is below that of CFG 3, which costs less",
                    against(study, name, "cfg-3", "fd"), DOWN),
        ]  # fmt: skip
    if "auto-2" in study.scores:
        for w in ("2", "3"):
            name, base = f"auto-gfcg-{w}", f"auto-{w}"
            lines += [
                verdict(f"in autoguidance {w}, no more evaluations: accuracy rises, points",
                        against(study, name, base, "accuracy"), UP, 1, 100),
                verdict(f"in autoguidance {w}: fd falls", against(study, name, base, "fd"), DOWN),
                _kept(f"in autoguidance {w}: recall is kept", against(study, name, base, "recall")),
            ]  # fmt: skip
    return ["\n".join(lines)]


def _kept(text: str, change: Estimate) -> str:
    return _comparable(text, change)


def elucd(study: Study) -> list[str]:
    """(c): an off-the-shelf classifier helps, calibrated more than plain; each ingredient does."""
    full = "elucd-0.05"
    lines = [verdict("fd falls below no guidance", against(study, full, "none", "fd"), DOWN)]
    for s in ("0.02", "0.05"):
        lines.append(
            verdict(f"fd is below that of plain classifier guidance at scale {s}",
                    against(study, f"elucd-{s}", f"plain-{s}", "fd"), DOWN)
        )  # fmt: skip
    ours, cfg = best(study, ("EluCD",)), best(study, ("CFG",))
    lines += [
        verdict(f"the best EluCD ({ours}) has lower fd than the best CFG ({cfg})",
                against(study, ours, cfg, "fd"), DOWN),
        verdict("on top of CFG 2: fd falls", against(study, "cfg2-elucd", "cfg-2", "fd"), DOWN),
    ]  # fmt: skip
    for found in study.results:
        if found.point.family.startswith("EluCD, "):
            change = against(study, found.point.name, full, "fd")
            text = f"fd rises when one ingredient goes ({found.point.family[7:]})"
            lines.append(verdict(text, change, UP))
    return ["\n".join(lines)]


def projection(study: Study) -> list[str]:
    """(d): better at equal evaluations, less sensitive to the scale, with a smaller gap."""
    lines = []
    for w in ("2", "4"):
        base = f"cfg30-{w}"
        for name, title in (("mp1", "MP, K=1"), ("mp2", "MP, K=2"), ("mp2plus", "MP+, K=2")):
            point = f"{name}-{w}"
            at = f"{title} against CFG at scale {w}, {_budget(study)} evaluations"
            lines += [
                verdict(f"fd falls, {at}", against(study, point, base, "fd"), DOWN),
                verdict(f"accuracy rises, {at}, points",
                        against(study, point, base, "accuracy"), UP, 1, 100),
                _kept(f"recall is kept, {at}", against(study, point, base, "recall")),
                _kept(f"diversity is kept, {at}", against(study, point, base, "diversity")),
            ]  # fmt: skip
    for name, title in (("mp2", "MP, K=2"), ("mp2plus", "MP+, K=2")):
        for score, digits in (("accuracy", 3), ("recall", 3), ("saturation", 3)):
            change = _sensitivity(study, name, score)
            text = f"{score} changes less from scale 2 to 4 than with CFG, {title}"
            lines.append(verdict(text, change, DOWN, digits))
    return ["\n".join(lines)]


def _budget(study: Study) -> int:
    return study.point("cfg30-2").cost.nfe


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
        lines.append(verdict(f"fd falls below no guidance at scale {w}",
                             against(study, name, "none", "fd"), DOWN))  # fmt: skip
        partner = _same_accuracy(study, name)
        lines += [
            verdict(f"recall at scale {w} is above that of {partner}, CFG of the nearest accuracy",
                    against(study, name, partner, "recall"), UP, 3),
            verdict(f"fd at scale {w} is below that of {partner}",
                    against(study, name, partner, "fd"), DOWN),
        ]  # fmt: skip
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
    lines = [
        verdict(f"the lowest fd of all ({order[0]}) is below the lowest of CFG ({cfg})",
                against(study, order[0], cfg, "fd"), DOWN),
        verdict(f"with recall above it ({order[0]} minus {cfg})",
                against(study, order[0], cfg, "recall"), UP, 3),
    ]  # fmt: skip
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
