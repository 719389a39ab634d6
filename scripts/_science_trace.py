"""What the study of guidance measures along trajectories, kept in JSON beside the images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _science_points import Tools
from torch import Tensor

from diffsteer import steer
from diffsteer.guidance import ClassifierFreeGuidance, smooth_activations
from diffsteer.guidance.calibration import calibrate
from diffsteer.guidance.probe import StageLogits
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


def honesty(pipe: Any, requests: Sequence[ImageRequest], tools: Tools, out: Path) -> dict[str, Any]:
    """How honest the guiding classifier is along unguided trajectories, by input and activation.

    The temperature and the interval that GFCG-style guidance gets are fitted on denoised inputs.
    """
    file, own = out / "calibration.json", tools.classifier
    identity = {"classifier": str(own.id), "images": len(requests), "steps": tools.steps}
    known = _read(file)
    if known.get("identity") == identity:
        return known
    steps = _unguided(pipe, requests, tools.steps)
    networks = {"ReLU": own, "softplus": smooth_activations(own, beta=5.0)}
    curves = {
        f"{given}, {activation}": calibrate(_stages(network, steps, given, requests))
        for activation, network in networks.items()
        for given in ("denoised", "noisy")
    }
    fitted = curves["denoised, ReLU"]
    found: dict[str, Any] = {
        "identity": identity,
        "sigma": [step["sigma"] for step in steps],
        "temperature": round(fitted.temperature, 3),
        "low": round(fitted.low, 4),
        "high": None if math.isinf(fitted.high) else round(fitted.high, 3),
        "curves": {
            name: {
                "ece": [stage.error for stage in curve.stages],
                "accuracy": [stage.accuracy for stage in curve.stages],
                "temperature": curve.temperature,
            }
            for name, curve in curves.items()
        },
    }
    files.write_json(file, found)
    return found


def _stages(
    network: Any, steps: Sequence[dict[str, Any]], given: str, requests: Sequence[ImageRequest]
) -> list[StageLogits]:
    labels = torch.tensor([request.label for request in requests])
    return [StageLogits(step["ratio"], _logits(network, step[given]), labels) for step in steps]


def _unguided(pipe: Any, requests: Sequence[ImageRequest], steps: int) -> list[dict[str, Any]]:
    call = {"num_inference_steps": steps, "guidance_scale": 1.0}
    seeds, labels = [r.seed for r in requests], [r.label for r in requests]
    with steer(pipe, ClassifierFreeGuidance(1.0), keep=True) as run:
        pipe(labels, seeds=seeds, **call)
    return [
        {
            "sigma": record.sigma,
            "ratio": record.ratio,
            "denoised": record.step.cond,
            "noisy": record.step.x,
        }
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
