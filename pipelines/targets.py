"""What a class-conditional network predicts and on which noise, and what may sample it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..core.prediction import Kind
from ..core.student import check_augment_dim, student_noise
from .levels import adds_noise

PREDICTIONS = ("velocity", "denoised", "kdiff", "edm")
FLOW_REMEDY = (
    "use FlowMatchEulerDiscreteScheduler, or one built with use_flow_sigmas=True and "
    "prediction_type='flow_prediction'"
)


def check_prediction(prediction: str, k: float | None, augment_dim: float | None) -> None:
    """Refuse a description of a network that does not hold together.

    Raises:
        ValueError: if ``prediction`` is unknown, ``k`` is missing, out of range or stands beside
            another prediction, or ``augment_dim`` is not positive.
        TypeError: if ``augment_dim`` is no number.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    if (k is not None) != (prediction == "kdiff"):
        raise ValueError(
            f"k: prediction='kdiff' needs the k it was trained at and no other has one, got "
            f"prediction={prediction!r} with k={k}"
        )
    if k is not None and not 0 <= k <= 1:
        raise ValueError(f"k must be in [0, 1], got {k}")
    if augment_dim is not None and math.isinf(check_augment_dim(augment_dim)):
        raise ValueError("augment_dim: write the Gaussian limit as None, not as infinity")


def kind_of(prediction: str, k: float | None, scheduler: Any) -> Kind:
    """What the network's raw output means."""
    if prediction == "kdiff":
        return Kind.kdiff(0.5 if k is None else k)
    if prediction == "edm":
        return Kind.edm(scheduler.config.sigma_data)
    return Kind(prediction)


def check_overrides(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse to read saved weights as something else than they were trained as.

    Args:
        saved: the configuration beside the weights.
        given: the arguments that would replace it.

    Raises:
        ValueError: if ``prediction``, ``k`` or ``augment_dim`` differs.
    """
    before = {"prediction": "velocity", "k": None, "augment_dim": None, **saved}
    for name in ("prediction", "k", "augment_dim"):
        if name in given and given[name] != before[name]:
            raise ValueError(
                f"{name}: the network was trained with {name}={before[name]!r} and cannot be "
                f"sampled with {given[name]!r}: its output would mean something else. Leave "
                f"{name} out, or train a network for it (scripts/train.py --init)"
            )


def check_scheduler(
    scheduler: Any, prediction: str, k: float | None, augment_dim: float | None
) -> bool:
    """Refuse schedulers that cannot sample this network; True for diffusers' FlowMatch family.

    Raises:
        ValueError: if the scheduler belongs to another process, says another k or D than the
            network was trained with, or adds Gaussian noise where D is finite.
    """
    for name, trained in (("k", k), ("augment_dim", augment_dim)):
        if name in scheduler.config and scheduler.config[name] != trained:
            raise ValueError(
                f"scheduler: its {name} is {scheduler.config[name]}, but the network was trained "
                f"with {name}={trained}; take the scheduler that was saved with the network"
            )
    if augment_dim is not None and adds_noise(scheduler):
        raise ValueError(
            f"scheduler: {type(scheduler).__name__} adds Gaussian noise on the way, but this "
            f"network knows Student-t noise (augment_dim={augment_dim:g}) and the sum of the two "
            "has another law; use a deterministic scheduler"
        )
    if prediction == "edm":
        _check_edm(scheduler, augment_dim)
        return False
    return _check_flow(scheduler)


def _check_edm(scheduler: Any, augment_dim: float | None) -> None:
    name = type(scheduler).__name__
    if not hasattr(scheduler, "precondition_outputs"):
        raise ValueError(
            f"scheduler: {name} does not precondition; prediction='edm' needs EDMEulerScheduler, "
            "EDMDPMSolverMultistepScheduler, PFGMPPEulerScheduler or PFGMPPHeunScheduler"
        )
    if scheduler.config.prediction_type != "epsilon":
        raise ValueError(
            "scheduler: prediction='edm' is the raw output that EDM schedulers call 'epsilon', got "
            f"prediction_type={scheduler.config.prediction_type!r}"
        )
    if augment_dim is not None and augment_dim <= 2 and "augment_dim" not in scheduler.config:
        raise ValueError(
            f"scheduler: at augment_dim={augment_dim:g} the noise has no variance and {name} would "
            "let the network's input explode; use PFGMPPEulerScheduler or PFGMPPHeunScheduler"
        )


def _check_flow(scheduler: Any) -> bool:
    name = type(scheduler).__name__
    flow_match = "FlowMatch" in name
    if not flow_match and not scheduler.config.get("use_flow_sigmas", False):
        raise ValueError(f"scheduler: {name} has no flow sigmas; {FLOW_REMEDY}")
    if scheduler.config.get("use_dynamic_shifting", False):
        raise ValueError(
            "scheduler: use_dynamic_shifting follows an image size that is fixed here; build it "
            "with use_dynamic_shifting=False and a fixed shift"
        )
    return flow_match


def starting_noise(
    shape: Sequence[int],
    generator: torch.Generator | list[torch.Generator] | None,
    augment_dim: float | None,
    device: torch.device,
) -> Tensor:
    """Unit noise of the network's law, float32, (B, ...): Gaussian, or Student-t at a finite D.

    With one generator a sample, a sample's noise depends on its generator alone.
    """
    if augment_dim is None:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    if isinstance(generator, list | tuple):
        return student_noise(generator, shape[1:], augment_dim, device=device)
    return student_noise(generator, shape, augment_dim, device=device)
