"""The average of several trainings of one classifier, with BatchNorm statistics measured anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..eval.classifiers import CifarClassifier

__all__ = ["average_classifiers", "measure_statistics"]


def average_classifiers(
    networks: Sequence[CifarClassifier],
    shares: Sequence[float] | None = None,
    *,
    mirrored: bool | None = None,
) -> CifarClassifier:
    """A network whose weights are the (weighted) mean of those of ``networks``, in eval mode.

    After Izmailov et al. 2018 (arXiv 1803.05407): it helps where the trainings started from the
    same weights. The BatchNorm statistics of a mean of networks are not the mean of theirs: call
    `measure_statistics` next. ``mirrored`` changes that option of the result.

    Raises:
        ValueError: no networks, networks of different kinds, or shares that do not sum to one.
    """
    if not networks:
        raise ValueError("there is nothing to average: give at least one network")
    shares = [1 / len(networks)] * len(networks) if shares is None else list(shares)
    if len(shares) != len(networks) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"expected {len(networks)} shares that sum to 1, got {shares}")
    kinds = {(type(network).__name__, network.config) for network in networks}
    if len(kinds) > 1:
        raise ValueError(f"only networks of one family and size can be averaged, got {kinds}")
    states = [network.state_dict() for network in networks]
    mean = {
        name: sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
        for name in states[0]
    }
    config = networks[0].config
    result = type(networks[0])(config if mirrored is None else replace(config, mirrored=mirrored))
    result.load_state_dict(mean)
    return result.eval()


@torch.no_grad()
def measure_statistics(network: nn.Module, images: Tensor, *, batch_size: int = 250) -> None:
    """Set the BatchNorm statistics of ``network`` to their mean over uint8 ``images``, in place."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    device, was_training = next(network.parameters()).device, network.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    network.train()
    for rows in images.split(batch_size):
        network(rows.to(device).float() / 255)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.train(was_training)
