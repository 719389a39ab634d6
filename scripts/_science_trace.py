"""What the study of guidance measures along trajectories, kept in JSON beside the images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _science_points import Tools
from torch import Tensor

from diffsteer import steer
from diffsteer.guidance import ClassifierFreeGuidance, smooth_activations
from diffsteer.guidance.calibration import calibration_error, fit_temperature
from diffsteer.pipelines import ImageRequest, SweepPoint, files, trace_rule
from diffsteer.pipelines.image_folder import plain
from diffsteer.pipelines.trace import mean_push


def pushes(
    pipe: Any, requests: Sequence[ImageRequest], points: Sequence[SweepPoint], weak: Any, out: Path
) -> dict[str, float]:
    """The effective push ``||guided - cond||``, root mean square over pixels, steps and images."""
    wanted = [point for point in points if point.family in ("CFG", "APG")]
    traces = {
        point.name: _remembered(out, "push", point, len(requests), lambda p=point: {
            "push": mean_push(_trace(pipe, requests, p, weak))
        })
        for point in wanted
    }  # fmt: skip
    return {name: found["push"] for name, found in traces.items()}


def gaps(
    pipe: Any, requests: Sequence[ImageRequest], points: Sequence[SweepPoint], weak: Any, out: Path
) -> dict[str, dict[str, list[float]]]:
    """The gap of both velocities where the rule mixes them, step by step, for part d."""

    def measure(point: SweepPoint) -> dict[str, list[float]]:
        steps = _trace(pipe, requests, point, weak)
        return {
            "sigma": [step.sigma for step in steps],
            "gap": [float(step.gap.mean()) for step in steps if step.gap is not None],
        }

    wanted = [point for point in points if point.name.startswith(("cfg30", "mp"))]
    return {
        point.name: _remembered(out, "gap", point, len(requests), lambda p=point: measure(p))
        for point in wanted
    }


def calibrate(
    pipe: Any, requests: Sequence[ImageRequest], tools: Tools, out: Path
) -> dict[str, Any]:
    """How honest the guiding classifier is along unguided trajectories, by input and activation.

    Fits the temperature of GFCG-style guidance on the steps where the classifier is right about at
    least half as often as at the last one, and guides up to the noise of the first of these.
    """
    file = out / "calibration.json"
    identity = {
        "classifier": str(tools.classifier.id),
        "images": len(requests),
        "steps": tools.steps,
    }
    known = _read(file)
    if known.get("identity") == identity:
        return known
    steps = _unguided(pipe, requests, tools.steps)
    labels = torch.tensor([request.label for request in requests])
    networks = {
        "ReLU": tools.classifier,
        "softplus": smooth_activations(tools.classifier, beta=5.0),
    }
    curves: dict[str, Any] = {}
    for activation, network in networks.items():
        for given in ("denoised", "noisy"):
            logits = [_logits(network, step[given]) for step in steps]
            curves[f"{given}, {activation}"] = {
                "ece": [calibration_error(part, labels) for part in logits],
                "accuracy": [float((part.argmax(1) == labels).double().mean()) for part in logits],
            }
            if (given, activation) == ("denoised", "ReLU"):
                own = logits
    accuracy = curves["denoised, ReLU"]["accuracy"]
    first = next(index for index, value in enumerate(accuracy) if value >= accuracy[-1] / 2)
    pooled = torch.cat(own[first:]), labels.repeat(len(own) - first)
    found = {
        "identity": identity,
        "sigma": [step["sigma"] for step in steps],
        "curves": curves,
        "temperature": round(fit_temperature(*pooled), 3),
        # No upper end if the classifier can be trusted from the start.
        "high": None if first == 0 else _between(steps, first),
    }
    files.write_json(file, plain(found))
    return found


def _between(steps: Sequence[dict[str, Any]], first: int) -> float | None:
    """A noise-to-signal ratio just above that of step ``first``."""
    sigma = (steps[first]["sigma"] + steps[first - 1]["sigma"]) / 2
    return sigma / (1 - sigma) if sigma < 1 else None


def _unguided(pipe: Any, requests: Sequence[ImageRequest], steps: int) -> list[dict[str, Any]]:
    call = {"num_inference_steps": steps, "guidance_scale": 1.0}
    seeds, labels = [r.seed for r in requests], [r.label for r in requests]
    with steer(pipe, ClassifierFreeGuidance(1.0), keep=True) as run:
        pipe(labels, seeds=seeds, **call)
    return [
        {"sigma": record.sigma, "denoised": record.step.cond, "noisy": record.step.x}
        for record in run.steps
    ]


@torch.no_grad()
def _logits(network: Any, sample: Tensor) -> Tensor:
    return network((sample.float().clamp(-1, 1) + 1) / 2).float().cpu()


def _trace(pipe: Any, requests: Sequence[ImageRequest], point: SweepPoint, weak: Any) -> Any:
    return trace_rule(pipe, requests, point.rule, steps=point.steps, weak=weak)


def _remembered(
    out: Path, what: str, point: SweepPoint, count: int, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A measurement of a point, from its file if it was made under the same settings."""
    file = out / "traces" / f"{what}-{point.name}.json"
    identity = {"rule": plain(point.rule), "steps": point.steps, "images": count}
    known = _read(file)
    if known.get("identity") != identity:
        known = {"identity": identity, **measure()}
        files.write_json(file, known)
    return known


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError):
        return {}
