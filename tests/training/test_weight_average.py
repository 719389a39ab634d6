"""Averaging classifiers: the mean of the weights, and statistics that fit it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffsteer.eval.classifiers import CifarResNet, ResNetConfig
from diffsteer.training.weight_average import average_classifiers, measure_statistics


def networks(count: int, width: int = 3) -> list[CifarResNet]:
    return [CifarResNet(ResNetConfig(width=width)) for _ in range(count)]


def test_weights_are_the_weighted_mean():
    first, second = networks(2)
    mean = average_classifiers([first, second], [0.25, 0.75])
    for name, value in mean.named_parameters():
        parts = [dict(network.named_parameters())[name] for network in (first, second)]
        torch.testing.assert_close(value, 0.25 * parts[0] + 0.75 * parts[1])
    torch.testing.assert_close(
        average_classifiers([first, second]).head.weight,
        (first.head.weight + second.head.weight) / 2,
    )


def test_the_mean_of_one_network_is_itself():
    (network,) = networks(1)
    assert average_classifiers([network]).id == network.id


def test_the_mean_can_look_at_mirror_images_too():
    first, second = networks(2)
    mean = average_classifiers([first, second], mirrored=True)
    assert mean.config.mirrored and not first.config.mirrored
    assert mean.digest == average_classifiers([first, second]).digest


def test_statistics_are_those_of_the_images():
    (network,) = networks(1)
    network.eval()
    pixels = torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8)
    measure_statistics(network, pixels, batch_size=30)
    conv, norm = network.trunk[0]
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    answers = conv((pixels.float() / 255 - network.mean) / network.std).transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean, answers.mean(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, answers.var(1), atol=1e-5, rtol=1e-4)
    assert norm.momentum == 0.1 and not network.training


@pytest.mark.parametrize(
    "parts, shares, message",
    [
        ([], None, "nothing to average"),
        (networks(2), [0.5, 0.6], "sum to 1"),
        (networks(2), [1.0], "2 shares"),
        ([*networks(1), *networks(1, width=4)], None, "one family and size"),
    ],
)
def test_what_cannot_be_averaged(parts, shares, message):
    with pytest.raises(ValueError, match=message):
        average_classifiers(parts, shares)
