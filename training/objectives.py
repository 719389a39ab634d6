"""From the settings of a run to its objective, with the k that it starts at."""

from __future__ import annotations

from typing import Any

import torch

from .config import K_WORDS, TrainConfig
from .data import EpochOrder, Images
from .dimension import suggest_k
from .draws import Objective
from .flow import FlowMatching
from .kdiff import KDiffObjective, LearnedK
from .pfgmpp import PFGMPPObjective
from .warm_start import initial_kind, start_of_k

__all__ = ["estimated_k", "k_frozen_from", "make_objective", "starting_k"]

LOOKED_AT = 4096  # images; the spread of patches is known to a percent from far fewer


def make_objective(config: TrainConfig, k: float | None = None) -> Objective:
    """The objective that the config names.

    Args:
        config: the settings.
        k: of kdiff, where the config leaves it open: the start of a learned k, the value of "auto".

    Raises:
        ValueError: the config says k="auto" and ``k`` is not given.
    """
    law: dict[str, Any] = {"augment_dim": config.dimension, "stable_targets": config.stable_targets}
    logit: dict[str, Any] = {"mean": config.sigma_mean, "std": config.sigma_std}
    if config.objective == "pfgmpp":
        log: dict[str, Any] = {"mean": config.log_sigma_mean, "std": config.log_sigma_std}
        return PFGMPPObjective(sigma_data=config.sigma_data, **log, **law)
    if config.objective == "flow":
        return FlowMatching(config.prediction, **logit, **law)
    if config.k == "learned":
        return KDiffObjective(LearnedK(config.k_start if k is None else k), **logit, **law)
    if config.k == "auto" and k is None:
        raise ValueError("k='auto' needs the data: pass k=estimated_k(config, images)")
    return KDiffObjective(float(config.k if k is None else k), **logit, **law)


def starting_k(config: TrainConfig, images: Images, saved: dict[str, Any] | None) -> float | None:
    """The k that ``make_objective`` is to be given.

    Args:
        config: the settings.
        images: the data, looked at for "auto".
        saved: the checkpoint that a run goes on from, which knows its k, or None.
    """
    if config.objective != "kdiff" or config.k not in K_WORDS:
        return None
    if config.k == "auto":
        return estimated_k(config, images) if saved is None else float(saved["target"]["k"])
    return start_of_k(initial_kind(config.init)) if config.init and saved is None else None


def estimated_k(config: TrainConfig, images: Images) -> float:
    """What ``--k auto`` stands for: ``suggest_k`` on patches of images of the training data."""
    count = min(LOOKED_AT, len(images))
    chosen = EpochOrder(len(images), config.seed).stretch(0, count)
    pixels, _ = images.take(chosen, torch.zeros(count, dtype=torch.bool))
    return suggest_k(pixels, patch_size=config.patch_size, augment_dim=config.dimension)


def k_frozen_from(config: TrainConfig) -> int:
    """The update from which a learned k stays as it is.

    The average of the weights starts anew there: averaged over a drifting k they would predict a
    mix of targets.
    """
    if config.k_freeze:
        return config.steps - config.k_freeze
    half_life = 0.6931 / max(1 - config.ema, 1e-9)
    return config.steps - min(round(10 * half_life), config.steps // 2)
