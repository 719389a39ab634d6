"""Calibrate a classifier along the trajectories of a pipeline: run, resume, report."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.step import needs_uncond
from ..guidance.calibration import Calibration
from ..guidance.probe import ClassifierProbe, StageLogits
from .files import write_bytes
from .generation import batch_inputs, check_call
from .image_folder import ImageRequest
from .steer import steer

FORMAT = "diffsteer-calibration-1"


def record_stages(
    pipe: Any,
    requests: Sequence[ImageRequest],
    probe: Callable[[Tensor], ClassifierProbe],
    *,
    labels: Sequence[int],
    parts: Path,
    weak: Any = None,
    steps: int = 20,
    batch_size: int = 16,
    call: dict[str, Any] | None = None,
    progress: bool | None = None,
) -> list[StageLogits]:
    """Sample, and keep what a classifier says of every stage.

    Args:
        pipe: a diffusers pipeline that makes images from prompts or class labels.
        requests: what to sample, see ``plan_images``.
        probe: makes the probe for a batch from its labels, (B,).
        labels: of each request, in the numbering that the probe expects.
        parts: folder for one file a batch; those that are there are read and not made again.
        weak: a second model for the probe's rule, see ``steer``.
        steps: solver steps.
        batch_size: images a call.
        call: further arguments of the pipeline's call.
        progress: show a progress bar; by default if standard error is a terminal.

    Returns:
        One entry a stage, from noise to data.

    Raises:
        ValueError: if the pipeline cannot do what is asked, or a part is damaged.
        OSError: if a part cannot be written.
    """
    joined: list[StageLogits] = []
    shown = sys.stderr.isatty() if progress is None else progress
    with tqdm(total=len(requests), unit="image", desc="calibrate", disable=not shown) as bar:
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            path = parts / f"{start:06d}.npz"
            if path.is_file():
                stages = _read(path)
            else:
                watch = probe(torch.tensor(labels[start : start + len(batch)]))
                stages = _sample(pipe, batch, watch, weak, steps, call or {})
                _write(path, stages)
            if joined and len(stages) != len(joined):
                raise ValueError(f"{path} is of another run: remove the folder, or use --overwrite")
            pairs = zip(joined, stages, strict=True) if joined else ()
            joined = [a.joined(b) for a, b in pairs] or stages
            bar.update(len(batch))
    return joined


def _sample(
    pipe: Any,
    batch: Sequence[ImageRequest],
    probe: ClassifierProbe,
    weak: Any,
    steps: int,
    call: dict[str, Any],
) -> list[StageLogits]:
    extra = check_call(pipe, batch, guided=needs_uncond(probe), call=call)
    with steer(pipe, probe, weak=weak):
        pipe(**{**extra, "num_inference_steps": steps, **batch_inputs(batch, extra)})
    return probe.stages


def _write(path: Path, stages: Sequence[StageLogits]) -> None:
    arrays: dict[str, Any] = {
        "ratios": np.array([stage.ratio for stage in stages]),
        "logits": torch.stack([stage.logits for stage in stages]).numpy(),
        "labels": stages[0].labels.numpy(),
    }
    if stages[0].contrast is not None:
        arrays["contrast"] = np.stack([s.contrast for s in stages if s.contrast is not None])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def _read(path: Path) -> list[StageLogits]:
    try:
        with np.load(path) as part:
            labels, logits = torch.from_numpy(part["labels"]), torch.from_numpy(part["logits"])
            contrast = torch.from_numpy(part["contrast"]) if "contrast" in part else None
            ratios = part["ratios"].tolist()
    except Exception as error:  # numpy raises everything from BadZipFile to KeyError
        raise ValueError(f"{path} is damaged ({error}); remove it and run again") from error
    return [
        StageLogits(ratio, logits[i], labels, None if contrast is None else contrast[i])
        for i, ratio in enumerate(ratios)
    ]


def summary(result: Calibration) -> dict[str, Any]:
    """The result as plain values for JSON; ``"settings"`` is what ``generate.py`` reads."""
    stages = [
        {
            "sigma": _plain(stage.ratio),
            "count": stage.count,
            "accuracy": stage.accuracy,
            "confidence": stage.confidence,
            "ece": stage.error,
            "ece_fitted": stage.error_fitted,
            "temperature": stage.temperature,
            "doubt": stage.doubt,
            "contrast": stage.contrast,
        }
        for stage in result.stages
    ]
    return {
        "format": FORMAT,
        "ece": result.error,
        "ece_fitted": result.error_fitted,
        "settings": settings(result),
        "stages": stages,
    }


def settings(result: Calibration) -> dict[str, dict[str, Any]]:
    """What follows for each method, by the name of its file.

    For ``elucd`` both temperatures are ``1 / T``; half of that for the marginal one, as in the
    released preset, is a matter of taste and not of calibration.
    """
    high = _plain(result.high)
    inverse = 1 / result.temperature
    return {
        "gfcg": {"temperature": result.temperature, "low": result.low, "high": high},
        "elucd": {"joint": inverse, "marginal": inverse},
    }


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"
