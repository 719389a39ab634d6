"""Conversions between prediction kinds: round trips, definitions, limits, broadcasting."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffsteer.core import Kind, Level, denoised_affine, from_denoised, to_denoised

KINDS = [
    Kind.DENOISED,
    Kind.NOISE,
    Kind.V,
    Kind.V_VE,
    Kind.VELOCITY,
    Kind.VELOCITY_TO_DATA,
    Kind.INTERPOLANT,
    Kind.edm(0.5),
    Kind.edm(1.7),
    Kind.kdiff(0.05),  # below it: see the test of the clamp
    Kind.kdiff(0.3),
    Kind.kdiff(1.0),
]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=str)


def trigonometric(t: Tensor) -> Level:
    """The GVP interpolant of SiT, with its rates."""
    angle = t * math.pi / 2
    half = math.pi / 2
    return Level(angle.cos(), angle.sin(), -half * angle.sin(), half * angle.cos())


def level_of(schedule: str, t: Tensor) -> Level:
    """A level for t in (0, 1), with rates where the schedule has none of its own."""
    if schedule == "flow":
        return Level.flow(t)
    if schedule == "gvp":
        return trigonometric(t)
    plain = Level.ve(80 * t**3) if schedule in ("ve", "edm") else Level.vp(1 - t)
    return Level(plain.alpha, plain.sigma, torch.full_like(t, -0.3), torch.ones_like(t))


EVERY_SCHEDULE = pytest.mark.parametrize("schedule", ["flow", "gvp", "ve", "vp"])


def clean_and_noise(batch: int = 3) -> tuple[Tensor, Tensor]:
    shape = (batch, 2, 4, 3)
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


@EVERY_KIND
@EVERY_SCHEDULE
def test_an_exact_output_gives_back_the_clean_sample(kind: Kind, schedule: str) -> None:
    clean, noise = clean_and_noise()
    level = level_of(schedule, torch.tensor([0.1, 0.5, 0.97], dtype=torch.float64))
    x = level.mix(clean, noise)
    a, b = kind.mix(level, x)
    output = a * clean + b * noise
    torch.testing.assert_close(to_denoised(output, kind, x, level), clean)
    torch.testing.assert_close(from_denoised(clean, kind, x, level), output)


def test_a_k_diff_output_is_clamped_where_it_says_nothing_and_exact_elsewhere() -> None:
    clean, noise = clean_and_noise(4)
    kind, level = Kind.kdiff(0.0), Level.flow(torch.tensor([0.1, 0.9, 0.98, 1.0]).double())
    x, wrong = level.mix(clean, noise), 0.01 * torch.randn_like(clean)
    found = to_denoised(-noise, kind, x, level)
    torch.testing.assert_close(found[:2], clean[:2])  # q = 0.9 and 0.1
    off = to_denoised(wrong - noise, kind, x, level) - found
    torch.testing.assert_close(off[2:], torch.tensor([0.98, 1.0]).double().view(2, 1, 1, 1)
                               * wrong[2:] / 0.05)  # fmt: skip
    assert found.isfinite().all()


@EVERY_KIND
@EVERY_SCHEDULE
def test_round_trips_from_any_output(kind: Kind, schedule: str) -> None:
    output, x = clean_and_noise()  # a network's output need not be consistent with x
    level = level_of(schedule, torch.tensor([0.1, 0.5, 0.97], dtype=torch.float64))
    back = from_denoised(to_denoised(output, kind, x, level), kind, x, level)
    torch.testing.assert_close(back, output)


@EVERY_KIND
@settings(max_examples=25, deadline=None)
@given(t=st.floats(0.01, 0.99), schedule=st.sampled_from(["flow", "gvp", "ve", "vp"]))
def test_round_trips_in_float32_at_any_level(kind: Kind, t: float, schedule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, generator=generator)
    denoised = torch.randn(2, 8, generator=generator)
    level = level_of(schedule, torch.tensor(t))
    back = to_denoised(from_denoised(denoised, kind, x, level), kind, x, level)
    scale = 1 + float(level.ratio) + 1 / float(level.ratio)  # how badly posed the level is
    torch.testing.assert_close(back, denoised, rtol=1e-5 * scale, atol=1e-5 * scale)


@EVERY_KIND
def test_the_affine_pair_is_the_conversion(kind: Kind) -> None:
    output, x = clean_and_noise()
    level = level_of("gvp", torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64))
    scale_x, scale_output = denoised_affine(kind, level, x)
    torch.testing.assert_close(
        scale_x * x + scale_output * output, to_denoised(output, kind, x, level)
    )
    raised = to_denoised(output + 1, kind, x, level) - to_denoised(output, kind, x, level)
    torch.testing.assert_close(raised, scale_output.expand_as(x))  # the delta form of the adapters


# Formulas as papers and schedulers write them, not derived from the table.
S = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
COLUMN = S.reshape(3, 1, 1, 1)


def test_noise_of_a_vp_model() -> None:
    output, x = clean_and_noise()
    expected = (x - COLUMN.sqrt() * output) / (1 - COLUMN).sqrt()  # DDPM, eq. 15
    torch.testing.assert_close(to_denoised(output, Kind.NOISE, x, Level.vp(1 - S)), expected)


def test_v_of_a_vp_model() -> None:
    output, x = clean_and_noise()
    expected = (1 - COLUMN).sqrt() * x - COLUMN.sqrt() * output  # Salimans and Ho 2022, app. D
    torch.testing.assert_close(to_denoised(output, Kind.V, x, Level.vp(1 - S)), expected)


def test_v_of_a_k_diffusion_scheduler() -> None:
    output, x = clean_and_noise()
    sigma = 10 * COLUMN
    expected = output * (-sigma / (sigma**2 + 1).sqrt()) + x / (sigma**2 + 1)
    torch.testing.assert_close(to_denoised(output, Kind.V_VE, x, Level.ve(10 * S)), expected)


def test_both_signs_of_velocity() -> None:
    output, x = clean_and_noise()
    there = to_denoised(output, Kind.VELOCITY, x, Level.flow(S))
    torch.testing.assert_close(there, x - COLUMN * output)
    torch.testing.assert_close(to_denoised(-output, Kind.VELOCITY_TO_DATA, x, Level.flow(S)), there)
    torch.testing.assert_close(to_denoised(output, Kind.INTERPOLANT, x, Level.flow(S)), there)


@pytest.mark.parametrize("data", [0.5, 1.3])
def test_edm_preconditioning(data: float) -> None:
    output, x = clean_and_noise()
    sigma = 10 * COLUMN
    skip = data**2 / (sigma**2 + data**2)  # Karras et al. 2022, table 1
    out = sigma * data / (sigma**2 + data**2).sqrt()
    level = Level.ve(10 * S)
    torch.testing.assert_close(
        to_denoised(output, Kind.edm(data), x, level), skip * x + out * output
    )
    rescaled = Level(level.alpha * 0.3, level.sigma * 0.3)
    torch.testing.assert_close(
        to_denoised(output, Kind.edm(data), 0.3 * x, rescaled), skip * x + out * output
    )


def test_v_is_v_ve_after_rescaling() -> None:
    output, x = clean_and_noise()
    level = Level.ve(10 * S)
    to_vp = (1 + level.sigma**2).rsqrt()
    vp = Level(to_vp, level.sigma * to_vp)
    torch.testing.assert_close(
        to_denoised(output, Kind.V, to_vp.reshape(3, 1, 1, 1) * x, vp),
        to_denoised(output, Kind.V_VE, x, level),
    )


@pytest.mark.parametrize(
    "k, factor, kind",
    [(1.0, 1, Kind.DENOISED), (0.5, 2, Kind.VELOCITY_TO_DATA), (0.0, -1, Kind.NOISE)],
)
def test_kdiff_passes_through_known_kinds(k: float, factor: int, kind: Kind) -> None:
    output, x = clean_and_noise()
    level = Level.flow(S)
    torch.testing.assert_close(
        to_denoised(output, Kind.kdiff(k), x, level), to_denoised(factor * output, kind, x, level)
    )


@EVERY_KIND
def test_pure_noise(kind: Kind) -> None:
    """At alpha = 0 every kind but the noise itself still tells the clean sample."""
    x, output = torch.randn(2, 3), torch.randn(2, 3)
    denoised = to_denoised(output, kind, x, Level(0.0, 1.0, -1.0, 1.0))
    tells = kind not in (Kind.NOISE, Kind.kdiff(0.0))
    assert bool(denoised.isfinite().all()) is tells


@EVERY_KIND
def test_no_noise(kind: Kind) -> None:
    """At sigma = 0 the sample is the clean sample, whatever the network says, unless it says it."""
    x, output = torch.randn(2, 3), torch.randn(2, 3)
    denoised = to_denoised(output, kind, x, Level(1.0, 0.0, -1.0, 1.0))
    says_it = kind in (Kind.DENOISED, Kind.kdiff(1.0))
    torch.testing.assert_close(denoised, output if says_it else x)
    scale_x, scale_output = denoised_affine(kind, Level(1.0, 0.0, -1.0, 1.0), x)
    assert (float(scale_x), float(scale_output)) == ((0.0, 1.0) if says_it else (1.0, 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_are_computed_in_float32_and_cast_once(dtype: torch.dtype) -> None:
    output, x = torch.randn(2, 64).to(dtype), (80 * torch.randn(2, 64)).to(dtype)
    level = Level.ve(80.0)
    exact = to_denoised(output.double(), Kind.NOISE, x.double(), level)
    found = to_denoised(output, Kind.NOISE, x, level)
    assert found.dtype == dtype and torch.equal(found, exact.float().to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_so_are_mixtures_and_the_way_back(dtype: torch.dtype) -> None:
    clean, noise = (tensor.to(dtype) for tensor in clean_and_noise())
    level = Level.flow(0.3)
    mixed = level.mix(clean, noise)
    assert torch.equal(mixed, level.mix(clean.float(), noise.float()).to(dtype))
    velocity = from_denoised(clean, Kind.VELOCITY, mixed, level)
    exact = from_denoised(clean.float(), Kind.VELOCITY, mixed.float(), level)
    assert torch.equal(velocity, exact.to(dtype))


def test_levels_keep_their_digits_in_narrow_dtypes() -> None:
    level = Level.flow(torch.tensor(0.999, dtype=torch.bfloat16))
    assert level.alpha.dtype == torch.float32 and level.sigma + level.alpha == 1


def test_levels_take_numbers_and_stay_on_the_cpu() -> None:
    with torch.device("meta"):
        levels = [Level.flow(0.25), Level.ve(2), Level.vp(0.3), Level(1, 0.5)]
    assert all(level.alpha.device.type == "cpu" for level in levels)
    ratios = [float(level.ratio) for level in levels]
    assert ratios == pytest.approx([1 / 3, 2.0, math.sqrt(0.7 / 0.3), 0.5])


@EVERY_KIND
def test_one_level_for_all_or_one_for_each(kind: Kind) -> None:
    """The trap: with as many samples as columns, PyTorch would broadcast (B,) over the width."""
    batch = 3
    output, x = torch.randn(batch, 2, batch, batch), torch.randn(batch, 2, batch, batch)
    sigmas = torch.tensor([0.2, 0.5, 0.9])
    rows = [
        to_denoised(output[i : i + 1], kind, x[i : i + 1], level_of("gvp", s))
        for i, s in enumerate(sigmas)
    ]
    together = to_denoised(output, kind, x, level_of("gvp", sigmas))
    torch.testing.assert_close(together, torch.cat(rows))


@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (4,), (1, 3)])
def test_levels_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    x = torch.randn(3, 2, 4, 4)
    with pytest.raises(ValueError, match=r"one value per sample, shape \(\) or \(3,\)"):
        to_denoised(x, Kind.NOISE, x, Level.ve(torch.ones(shape)))


def test_an_interpolant_needs_its_rates() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="alpha_rate and sigma_rate"):
        to_denoised(x, Kind.INTERPOLANT, x, Level.ve(1.0))


@pytest.mark.parametrize(
    "name, parameter, text",
    [
        ("epsilon", None, "unknown prediction kind 'epsilon'; the kinds are denoised, noise"),
        ("kdiff", 1.5, r"must be in \[0.0, 1.0\], got 1.5"),
        ("kdiff", math.nan, "got nan"),
        ("edm", 0.0, "parameter of kind 'edm'"),
        ("edm", None, "takes one parameter"),
        ("noise", 0.5, "takes no parameter"),
    ],
)
def test_bad_kinds_say_what_is_known(name: str, parameter: float | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Kind(name, parameter)


def test_kinds_are_values() -> None:
    assert Kind.edm(0.5) == Kind("edm", 0.5) != Kind.edm(0.6)
    assert len({Kind.NOISE, Kind("noise"), Kind.V}) == 2
