"""Frequency-decoupled guidance: the bands of a Laplacian pyramid, and diffusers' guider."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from diffsteer.core import Kind, Level, Step, from_denoised, to_denoised
from diffsteer.guidance import (
    ClassifierFreeGuidance,
    FrequencyDecoupledGuidance,
    LinearScale,
    classifier_free,
    frequency_decoupled,
    low_frequencies,
)

SIZES = [(16, 16), (8, 32), (24, 16), (9, 14)]


def pair(*size: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 3, *size, generator=draw, dtype=torch.float64)


def blurred(x: Tensor) -> Tensor:
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=x.dtype) / 16
    kernel = torch.outer(row, row).expand(x.shape[1], 1, 5, 5)
    return functional.conv2d(functional.pad(x, [2] * 4, "reflect"), kernel, groups=x.shape[1])


def enlarged(x: Tensor, like: Tensor) -> Tensor:
    return blurred(functional.interpolate(x, like.shape[-2:], mode="bilinear"))


def pyramid(image: Tensor, levels: int) -> list[Tensor]:
    """The textbook's: what each level has above the next, the finest first; then the coarsest."""
    bands = []
    for _ in range(levels - 1):
        half = [side // 2 for side in image.shape[-2:]]
        coarse = functional.interpolate(blurred(image), half, mode="bilinear")
        bands.append(image - enlarged(coarse, image))
        image = coarse
    return [*bands, image]


@pytest.mark.parametrize("halvings", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_is_guidance_of_each_band_of_a_pyramid(size: tuple[int, int], halvings: int) -> None:
    cond, uncond = pair(*size)
    scales = [6.0] * halvings + [2.0]
    both = zip(pyramid(cond, halvings + 1), pyramid(uncond, halvings + 1), strict=True)
    bands = [classifier_free(c, u, w) for (c, u), w in zip(both, scales, strict=True)]
    guided = bands.pop()
    while bands:
        finer = bands.pop()
        guided = finer + enlarged(guided, finer)
    ours = frequency_decoupled(cond, uncond, 6.0, 2.0, halvings=halvings)
    torch.testing.assert_close(ours, guided)


@pytest.mark.parametrize("halvings", [1, 2])
def test_is_the_guider_of_diffusers(halvings: int) -> None:
    pytest.importorskip("kornia")
    from diffusers.guiders import FrequencyDecoupledGuidance as Guider

    cond, uncond = pair(16, 24)
    guider = Guider(guidance_scales=[6.0] * halvings + [2.0])
    guider.set_state(1, 9, torch.tensor(500))
    ours = frequency_decoupled(cond, uncond, 6.0, 2.0, halvings=halvings)
    torch.testing.assert_close(ours, guider.forward(cond, uncond).pred)


def test_what_is_low_and_what_is_high() -> None:
    flat = torch.full((1, 1, 8, 8), 3.0, dtype=torch.float64)
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).repeat(1, 1, 8, 8)
    torch.testing.assert_close(low_frequencies(flat, 2), flat)
    torch.testing.assert_close(low_frequencies(board), torch.zeros_like(board))
    video = pair(8, 8)  # (2, B, C, H, W): the frames are filtered one by one
    frames = torch.stack([low_frequencies(frame) for frame in video.unbind(2)], 2)
    torch.testing.assert_close(low_frequencies(video), frames)


def test_equal_scales_are_plain_guidance() -> None:
    cond, uncond = pair(8, 8)
    step = Step(cond, Level.flow(0.5), 2, 5, 0.5, cond, uncond)
    equal = FrequencyDecoupledGuidance(4.0, 4.0)(step)
    torch.testing.assert_close(equal, ClassifierFreeGuidance(4.0)(step))
    ramp = FrequencyDecoupledGuidance(LinearScale(1.0, 11.0), LinearScale(1.0, 5.0))
    assert torch.equal(ramp(step), FrequencyDecoupledGuidance(6.0, 3.0)(step))
    assert FrequencyDecoupledGuidance(1.0, 1.0)(step) is cond
    assert not FrequencyDecoupledGuidance(1.0, 1.0).needs_uncond
    assert FrequencyDecoupledGuidance(1.0, 2.0).needs_uncond


@pytest.mark.parametrize("kind", [Kind.NOISE, Kind.V, Kind.VELOCITY], ids=lambda kind: kind.name)
def test_the_same_in_every_parameterization(kind: Kind) -> None:
    cond, uncond = pair(8, 8)
    x, level, rule = cond + uncond, Level.vp(0.3), FrequencyDecoupledGuidance(6.0, 2.0)
    raw = (from_denoised(denoised, kind, x, level) for denoised in (cond, uncond))
    guided = to_denoised(rule(Step(x, level, 0, 5, 0.5, *raw)), kind, x, level)
    torch.testing.assert_close(guided, rule(Step(x, level, 0, 5, 0.5, cond, uncond)))


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"rows and columns.*got \(2, 64, 16\); packed tokens"):
        low_frequencies(torch.zeros(2, 64, 16))
    with pytest.raises(ValueError, match=r"\(4, 8\) are too small for 2 halvings"):
        low_frequencies(torch.zeros(1, 1, 4, 8), 2)
    with pytest.raises(ValueError, match=r"halvings must be a whole number, got 1\.5"):
        FrequencyDecoupledGuidance(halvings=1.5)  # type: ignore[arg-type]
