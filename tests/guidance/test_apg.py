"""The theorems on adaptive projected guidance, and parity with what diffusers ships."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffsteer.core import (
    GaussianMixture,
    GuidedDenoiser,
    Kind,
    Level,
    MissingPrediction,
    Step,
    from_denoised,
    sample_dot,
    sample_norm,
    to_denoised,
)
from diffsteer.guidance import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    adaptive_projected,
    classifier_free,
)

KINDS = [Kind.DENOISED, Kind.NOISE, Kind.V, Kind.VELOCITY, Kind.VELOCITY_TO_DATA]
SHAPES = [(3, 7), (3, 4, 6), (3, 2, 5, 4), (3, 2, 3, 4, 5)]  # vectors, tokens, images, video
Pair = tuple[Tensor, Tensor]


def pair(shape: tuple[int, ...] = (3, 2, 5, 4), dtype: torch.dtype = torch.float64) -> Pair:
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def apg(cond: Tensor, uncond: Tensor, scale: float | Tensor = 5.0, **settings: object) -> Tensor:
    return adaptive_projected(cond, uncond, scale, **settings)[0]  # type: ignore[arg-type]


def parts(cond: Tensor, uncond: Tensor) -> Pair:
    """The difference split along ``cond`` and across it, by the textbook formula."""
    difference = cond - uncond
    share = sample_dot(difference, cond) / sample_dot(cond, cond)
    along = share.reshape(-1, *[1] * (cond.ndim - 1)) * cond
    return along, difference - along


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_a1_neutral_settings_are_cfg_in_every_space(kind: Kind) -> None:
    (cond, uncond), x, level = pair(), torch.randn(3, 2, 5, 4).double(), Level.flow(0.7)
    raw = [from_denoised(p, kind, x, level) for p in (cond, uncond)]
    guided = to_denoised(apg(*raw, eta=1.0), kind, x, level)
    torch.testing.assert_close(guided, classifier_free(cond, uncond, 5.0))


@pytest.mark.parametrize("eta, radius, momentum", [(0.0, math.inf, 0.0), (0.3, 0.5, -0.5)])
def test_a2_scale_one_is_exactly_cond(eta: float, radius: float, momentum: float) -> None:
    cond, uncond = pair()
    previous = torch.randn_like(cond)
    settings = {"eta": eta, "radius": radius, "momentum": momentum, "previous": previous}
    assert torch.equal(apg(cond, uncond, 1.0, **settings), cond)


@pytest.mark.parametrize("shape", SHAPES)
def test_a3_splits_along_and_across(shape: tuple[int, ...]) -> None:
    cond, uncond = pair(shape)
    along, across = parts(cond, uncond)
    update = apg(cond, uncond, 2.0) - cond  # scale 2, eta 0: the orthogonal part itself
    torch.testing.assert_close(update, across)
    torch.testing.assert_close(sample_dot(update, cond), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(apg(cond, uncond, 2.0, eta=1.0) - cond, along + across)


def test_a4_energy_grows_by_the_orthogonal_part_only() -> None:
    cond, uncond = pair()
    guided, (_, across) = apg(cond, uncond, 6.0), parts(cond, uncond)
    energy = sample_dot(cond, cond) + 25 * sample_dot(across, across)
    torch.testing.assert_close(sample_dot(guided, guided), energy)


@pytest.mark.parametrize("eta", [0.0, 0.5, -2.0])
def test_a5_push_is_bounded_by_the_radius(eta: float) -> None:
    cond, uncond = pair()
    pushed = sample_norm(apg(cond, uncond, 6.0, eta=eta, radius=0.7) - cond)
    assert (pushed <= 5 * max(1, abs(eta)) * 0.7 * (1 + 1e-12)).all()


def test_a5_a_radius_that_is_not_reached_does_nothing() -> None:
    cond, uncond = pair()
    radius = float(sample_norm(cond - uncond).max())
    assert torch.equal(apg(cond, uncond, radius=radius * 1.01), apg(cond, uncond))


@pytest.mark.parametrize("shape", SHAPES)
def test_a6_rotations_commute(shape: tuple[int, ...]) -> None:
    cond, uncond = pair(shape)
    size = math.prod(shape[1:])
    rotation = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q

    def rotate(x: Tensor) -> Tensor:
        return (x.flatten(1) @ rotation.T).reshape(shape)

    settings = {"eta": 0.3, "radius": 2.0}
    torch.testing.assert_close(
        apg(rotate(cond), rotate(uncond), **settings), rotate(apg(cond, uncond, **settings))
    )


def test_a7_scaling_everything_scales_the_result() -> None:
    cond, uncond = pair()
    torch.testing.assert_close(
        apg(3 * cond, 3 * uncond, eta=0.2, radius=6.0), 3 * apg(cond, uncond, eta=0.2, radius=2.0)
    )


@pytest.mark.parametrize("factor", [2.0, -0.5])
def test_a8_only_the_direction_of_the_axis_matters(factor: float) -> None:
    cond, uncond = pair()
    update = apg(cond, uncond, 2.0) - cond
    scaled = factor * cond
    other = apg(scaled, scaled - (cond - uncond), 2.0) - scaled  # same difference, other axis
    torch.testing.assert_close(update, other)


@pytest.mark.parametrize("what", ["eta", "scale"])
def test_a9_affine_in_eta_and_in_scale(what: str) -> None:
    (cond, uncond), previous = pair(), torch.randn(3, 2, 5, 4, dtype=torch.float64)

    def at(value: float) -> Tensor:
        settings = {"eta": 0.4, "scale": 5.0} | {what: value}
        return apg(cond, uncond, radius=2.0, momentum=-0.5, previous=previous, **settings)

    torch.testing.assert_close(at(0.25), 0.75 * at(0.0) + 0.25 * at(1.0))
    torch.testing.assert_close(at(3.0), 3 * at(1.0) - 2 * at(0.0))


def test_a10_samples_of_a_batch_do_not_meet() -> None:
    (cond, uncond), previous = pair(), torch.randn(3, 2, 5, 4, dtype=torch.float64)
    settings = {"eta": 0.1, "radius": 1.0, "momentum": -0.7}
    whole, memory = adaptive_projected(cond, uncond, 4.0, previous=previous, **settings)
    for i in ([2], [0, 1], [1, 2, 0]):
        some, kept = adaptive_projected(cond[i], uncond[i], 4.0, previous=previous[i], **settings)
        torch.testing.assert_close(some, whole[i])
        torch.testing.assert_close(kept, memory[i])


@pytest.mark.parametrize("momentum", [-0.5, -0.75, 0.3])
def test_a11_momentum_is_a_geometric_sum(momentum: float) -> None:
    cond, uncond = pair()
    constant = alternating = None
    for n in range(1, 8):
        sign = (-1) ** n
        _, constant = adaptive_projected(cond, uncond, 2.0, momentum=momentum, previous=constant)
        factor = (1 - momentum**n) / (1 - momentum)
        torch.testing.assert_close(constant, factor * (cond - uncond))
        _, alternating = adaptive_projected(
            sign * cond, sign * uncond, 2.0, momentum=momentum, previous=alternating
        )
        factor = (1 - (-momentum) ** n) / (1 + momentum)
        torch.testing.assert_close(alternating, sign * factor * (cond - uncond))


def test_a12_the_memory_holds_what_was_not_clipped() -> None:
    cond, uncond = pair()
    tight = adaptive_projected(cond, uncond, 5.0, radius=1e-3)[1]
    loose = adaptive_projected(cond, uncond, 5.0)[1]
    assert torch.equal(tight, loose)
    torch.testing.assert_close(tight, cond - uncond)


def test_a13_memory_in_velocity_units_needs_the_ratio_of_sigmas() -> None:
    x, sigmas = torch.randn(3, 2, 5, 4, dtype=torch.float64), (0.9, 0.6, 0.25)
    clean = velocity = None
    for before, sigma in pairwise((1.0, *sigmas)):
        cond, uncond = pair()
        level = Level.flow(torch.tensor(sigma, dtype=torch.float64))
        raw = [from_denoised(p, Kind.VELOCITY, x, level) for p in (cond, uncond)]
        _, clean = adaptive_projected(cond, uncond, 2.0, momentum=-0.5, previous=clean)
        carried = None if velocity is None else velocity * (before / sigma)
        _, velocity = adaptive_projected(*raw, 2.0, momentum=-0.5, previous=carried)
        torch.testing.assert_close(clean, -sigma * velocity)


def test_a14_the_uncond_form_also_deletes_the_first_unit_of_parallel_guidance() -> None:
    cond, uncond = pair()
    along, _ = parts(cond, uncond)
    torch.testing.assert_close(
        apg(cond, uncond, 5.0, form="uncond") - apg(cond, uncond, 5.0), -along
    )


def test_a15_in_one_dimension_nothing_is_orthogonal() -> None:
    cond, uncond = pair((6, 1))
    torch.testing.assert_close(apg(cond, uncond, 9.0), cond)


@pytest.mark.parametrize("rule", [ClassifierFreeGuidance(3.0), AdaptiveProjectedGuidance(3.0)])
@pytest.mark.parametrize("kind", KINDS[1:], ids=lambda k: k.name)
def test_which_rules_may_skip_the_denoised_space(rule: Callable[..., Tensor], kind: Kind) -> None:
    (cond, uncond), x, level = pair(), torch.randn(3, 2, 5, 4).double(), Level.flow(0.6)

    def guided(cond: Tensor, uncond: Tensor) -> Tensor:
        return rule(Step(x, level, 0, 1, 0.6, cond, uncond))

    raw = [from_denoised(p, kind, x, level) for p in (cond, uncond)]
    through = to_denoised(guided(*raw), kind, x, level)
    assert torch.allclose(guided(cond, uncond), through) is rule.commutes  # type: ignore[attr-defined]


def relative_error(guided: Tensor, exact: Tensor) -> float:
    return float((guided.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (1, 3, 5, 77, 61)])
def test_no_less_exact_than_float64_projection(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cond, uncond = pair(shape, dtype)
    radius = 0.05 * math.sqrt(math.prod(shape[1:]))
    exact = apg(cond.double(), uncond.double(), 8.0, radius=radius)
    theirs = normalized_guidance(cond, uncond, 7.0, None, 0.0, radius, True)
    ours = apg(cond, uncond, 8.0, radius=radius)
    assert ours.dtype == dtype
    assert relative_error(ours, exact) <= 1.05 * relative_error(theirs, exact) + 1e-7


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize(
    "eta, rescale, momentum", [(1.0, 15.0, None), (0.0, 2.5, -0.5), (0.3, 0, -0.75)]
)
def test_repeats_the_guider_of_diffusers(
    original: bool, eta: float, rescale: float, momentum: float | None
) -> None:
    rule = AdaptiveProjectedGuidance.from_diffusers(
        guidance_scale=7.5,
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_rescale=rescale,
        eta=eta,
        use_original_formulation=original,
    )
    buffer = None if momentum is None else MomentumBuffer(momentum)
    memory: dict[object, object] = {}
    assert rule.commutes  # adapters hand it raw outputs, as the guider gets them
    for index in range(3):
        cond, uncond = pair()
        theirs = normalized_guidance(cond, uncond, 7.5, buffer, eta, rescale, original)
        step = Step(cond, Level.flow(0.5), index, 3, 0.5, cond, uncond, memory=memory)
        torch.testing.assert_close(rule(step), theirs)


def test_masked_tokens_take_no_part() -> None:
    cond, uncond = pair((2, 5, 3))
    weight = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1.0]], dtype=torch.float64)[..., None]
    settings = {"eta": 0.2, "radius": 0.5}
    guided = apg(cond, uncond, weight=weight, **settings)
    short = apg(cond[:1, :3], uncond[:1, :3], **settings)
    torch.testing.assert_close(guided[:1, :3], short)
    torch.testing.assert_close(guided[1:], apg(cond[1:], uncond[1:], **settings))


def test_a_scale_for_each_sample() -> None:
    cond, uncond = pair()
    scale = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    rows = [apg(cond[i : i + 1], uncond[i : i + 1], float(s)) for i, s in enumerate(scale)]
    torch.testing.assert_close(apg(cond, uncond, scale), torch.cat(rows))
    with pytest.raises(ValueError, match="one value per sample"):
        apg(cond, uncond, torch.ones(5))


def test_a_zero_axis_is_no_direction() -> None:
    uncond = torch.randn(1, 8)
    guided = apg(torch.zeros(1, 8), uncond, 3.0)
    torch.testing.assert_close(guided, -2 * uncond)


def test_inputs_are_left_as_they_were() -> None:
    (cond, uncond), previous = pair(), torch.randn(3, 2, 5, 4, dtype=torch.float64)
    given = [t.clone() for t in (cond, uncond, previous)]
    _, memory = adaptive_projected(cond, uncond, 4.0, momentum=-0.5, radius=1.0, previous=previous)
    kept = memory.clone()
    adaptive_projected(cond, uncond, 4.0, momentum=-0.5, previous=memory)
    then, now = [*given, kept], [cond, uncond, previous, memory]
    assert all(torch.equal(a, b) for a, b in zip(then, now, strict=True))


class Reads(TorchDispatchMode):
    """Counts the operations that read a tensor which begins with ``values``, in any dtype."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values, self.count = values.flatten().float(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            given = [a for a in args if isinstance(a, Tensor) and a is not out]
            self.count += any(map(self._carries, given))
        return out

    def _carries(self, tensor: Tensor) -> bool:
        return torch.equal(tensor.flatten()[: len(self.values)].float(), self.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_read_of_each_prediction_and_three_of_its_copy(dtype: torch.dtype) -> None:
    (cond, uncond), previous = pair(dtype=dtype), torch.randn(3, 2, 5, 4)
    for prediction, copied in ((cond, 3), (uncond, int(dtype != torch.float32))):
        with torch.no_grad(), Reads(prediction) as reads:
            adaptive_projected(cond, uncond, 5.0, radius=1.0, momentum=-0.5, previous=previous)
        assert reads.count == 1 + copied


def test_predictions_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="same shape"):
        apg(torch.randn(2, 3, 4), torch.randn(2, 1, 4))


def test_compiles_without_a_graph_break() -> None:
    cond, uncond = pair()
    compiled = torch.compile(adaptive_projected, backend="eager", fullgraph=True)
    settings = {"radius": 1.0, "momentum": -0.5, "previous": torch.randn_like(cond)}
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            guided = compiled(cond, uncond, 4.0, **settings)[0]
            torch.testing.assert_close(guided, apg(cond, uncond, 4.0, **settings))


# The rule: radius, memory, and what it asks for.


def test_the_relative_radius_is_in_units_of_the_latent() -> None:
    rule = AdaptiveProjectedGuidance(8.0, relative_radius=0.05, latent_std=0.5)
    assert rule.radius_for(torch.empty(2, 16, 128, 128)) == pytest.approx(0.05 * 0.5 * 512)
    assert replace(rule, radius=2.5, relative_radius=None).radius_for(torch.empty(2, 9)) == 2.5
    assert AdaptiveProjectedGuidance(8.0, radius=15.0).radius_for(torch.empty(2, 9)) == 15.0


def test_exactly_one_radius() -> None:
    with pytest.raises(ValueError, match="exactly one of radius and relative_radius"):
        AdaptiveProjectedGuidance(8.0, radius=2.5, relative_radius=0.1)
    with pytest.raises(ValueError, match="exactly one of radius and relative_radius"):
        AdaptiveProjectedGuidance(8.0, relative_radius=None)


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"radius": -1.0}, r"radius must be in \(0, inf\], got -1.0; use math.inf"),
        ({"radius": 0.0}, "radius"),
        ({"relative_radius": -0.1}, "relative_radius"),
        ({"momentum": 1.0}, r"momentum must be in \(-1, 1\), got 1.0"),
        ({"momentum": -1.5}, "diverges"),
        ({"latent_std": 0.0}, "latent_std"),
        ({"form": "comfy"}, "form must be one of 'paper', 'uncond', got 'comfy'"),
        ({"buffer_policy": "never"}, "buffer_policy must be one of"),
        ({"space": "noise"}, "space must be one of"),
    ],
)
def test_bad_settings_say_what_to_do(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        AdaptiveProjectedGuidance(8.0, **settings)  # type: ignore[arg-type]


def step_of(cond: Tensor, uncond: Tensor | None, memory: dict[object, object], **more: int) -> Step:
    return Step(
        cond, Level.ve(1.0), more.pop("index", 0), 4, 1.0, cond, uncond, memory=memory, **more
    )


def test_without_uncond_only_scale_one_works_and_leaves_the_memory() -> None:
    cond, memory = torch.randn(2, 3), {}
    assert AdaptiveProjectedGuidance(1.0)(step_of(cond, None, memory)) is cond and not memory
    with pytest.raises(
        MissingPrediction, match="AdaptiveProjectedGuidance needs the unconditional"
    ):
        AdaptiveProjectedGuidance(2.0)(step_of(cond, None, memory))


@pytest.mark.parametrize("policy", ["per_step", "per_eval"])
def test_stages_of_a_solver_step_follow_the_policy(policy: str) -> None:
    """Heun: the second stage reads the memory of the step before; only per_eval commits it."""
    rule = AdaptiveProjectedGuidance(
        3.0,
        radius=math.inf,
        momentum=-0.5,
        eta=1.0,
        buffer_policy=policy,  # type: ignore[arg-type]
    )
    memory: dict[object, object] = {}
    differences, seen = [], []
    for index in range(3):
        for stage in range(2):
            cond, uncond = pair((2, 3))
            differences.append(cond - uncond)
            guided = rule(step_of(cond, uncond, memory, index=index, stage=stage))
            seen.append((guided - cond) / 2)  # the running difference that was used
    committed = torch.zeros(2, 3, dtype=torch.float64)
    for i, (difference, used) in enumerate(zip(differences, seen, strict=True)):
        torch.testing.assert_close(used, difference - 0.5 * committed)
        last_of_its_step = i % 2 == 1
        if policy == "per_eval":
            committed = used
        elif last_of_its_step:  # what the first stage of this step had used
            committed = seen[i - 1]


def test_another_resolution_starts_afresh() -> None:
    rule, memory = AdaptiveProjectedGuidance(3.0), {}
    rule(step_of(*pair((2, 8)), memory))
    cond, uncond = pair((2, 32))
    afresh = rule(step_of(cond, uncond, {}))
    assert torch.equal(rule(step_of(cond, uncond, memory, index=1)), afresh)


def test_two_rules_do_not_share_their_memory() -> None:
    first, second = AdaptiveProjectedGuidance(3.0), AdaptiveProjectedGuidance(3.0)
    (cond, uncond), memory = pair((2, 8)), {}
    assert torch.equal(first(step_of(cond, uncond, memory)), second(step_of(cond, uncond, memory)))


def test_holds_the_amplitude_that_cfg_loses_at_a_high_scale() -> None:
    """What the method is for, on exact denoisers: less overshoot at the same scale."""
    mixture = GaussianMixture.random(3, shape=(32,), generator=torch.Generator().manual_seed(3))
    labels = torch.arange(3).repeat(8)
    x = 1.5 * torch.randn(24, 32, dtype=torch.float64)
    cond, uncond = mixture.denoiser(labels), mixture.denoiser()

    def overshoot(rule: Callable[[Step], Tensor]) -> Tensor:
        denoise = GuidedDenoiser(rule, cond, uncond)
        return sample_norm(denoise(x, torch.tensor(1.5))).mean()

    plain = sample_norm(cond(x, torch.tensor(1.5))).mean()
    cfg, projected = (
        overshoot(ClassifierFreeGuidance(12.0)),
        overshoot(AdaptiveProjectedGuidance(12.0)),
    )
    assert plain < projected < cfg
