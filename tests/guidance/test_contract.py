"""What every public guidance method promises. Adding a method is adding a row to EXAMPLES."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from fake_cuda import FakeCuda
from torch import Tensor

import diffsteer.guidance as guidance
from diffsteer.core import GaussianMixture, Guidance, GuidedDenoiser, Level, Step
from diffsteer.guidance import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    CalibratedClassifierGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    DegradedPassGuidance,
    FrequencyDecoupledGuidance,
    GradientFreeClassifierGuidance,
    GuidanceInterval,
    LinearScale,
    ManifoldProjectedGuidance,
    RescaledGuidance,
)


def logits_of(images: Tensor) -> Tensor:
    """A classifier of three classes."""
    return images.flatten(1)[:, :3]


def unchanged(denoised: Tensor) -> Tensor:
    return denoised


# name: (the rule, the same rule set to do nothing)
EXAMPLES: dict[str, tuple[Guidance, Guidance]] = {
    "ClassifierFreeGuidance": (ClassifierFreeGuidance(3.0), ClassifierFreeGuidance(1.0)),
    "ClassifierFreeGuidance, scheduled": (
        ClassifierFreeGuidance(LinearScale(1.5, 6.0)),
        ClassifierFreeGuidance(LinearScale(1.0, 1.0)),
    ),
    "AdaptiveProjectedGuidance": (
        AdaptiveProjectedGuidance(6.0, latent_std=0.5),
        AdaptiveProjectedGuidance(1.0),
    ),
    "AdaptiveProjectedGuidance, uncond form": (
        AdaptiveProjectedGuidance(
            6.0, eta=0.5, radius=1.0, form="uncond", buffer_policy="per_eval"
        ),
        AdaptiveProjectedGuidance(1.0, form="uncond"),
    ),
    "GuidanceInterval": (
        GuidanceInterval(ClassifierFreeGuidance(3.0), 0.5, 3.0),
        GuidanceInterval(ClassifierFreeGuidance(3.0), 100.0),
    ),
    "GuidanceInterval of APG": (
        GuidanceInterval.flow(AdaptiveProjectedGuidance(6.0), 0.3, 0.8),
        GuidanceInterval.flow(AdaptiveProjectedGuidance(6.0), 0.99, 1.0),
    ),
    "GuidanceInterval between two rules": (
        GuidanceInterval.two_experts(
            AdaptiveProjectedGuidance(6.0), ClassifierFreeGuidance(LinearScale(1.5, 3.0)), 0.6
        ),
        GuidanceInterval.two_experts(ClassifierFreeGuidance(1.0), ClassifierFreeGuidance(1.0), 0.6),
    ),
    "ClassifierFreeZeroStarGuidance": (
        ClassifierFreeZeroStarGuidance(3.0, zero_init_steps=0),
        ClassifierFreeZeroStarGuidance(1.0, zero_init_steps=0),
    ),
    "ClassifierFreeZeroStarGuidance, zero steps": (
        ClassifierFreeZeroStarGuidance(LinearScale(1.5, 3.0), zero_init_steps=2),
        ClassifierFreeZeroStarGuidance(1.0, zero_init_steps=0),
    ),
    "DegradedPassGuidance": (
        DegradedPassGuidance(ClassifierFreeGuidance(3.0), 2.0, start=0.2, stop=0.8),
        DegradedPassGuidance(ClassifierFreeGuidance(1.0), 0.0),
    ),
    "DegradedPassGuidance beside APG, scheduled": (
        DegradedPassGuidance(AdaptiveProjectedGuidance(6.0), LinearScale(0.0, 3.0), 0.0, 1.0),
        DegradedPassGuidance(AdaptiveProjectedGuidance(1.0), LinearScale(0.0, 0.0), 0.0, 1.0),
    ),
    "FrequencyDecoupledGuidance": (
        FrequencyDecoupledGuidance(LinearScale(2.0, 6.0), 2.0),
        FrequencyDecoupledGuidance(1.0, 1.0),
    ),
    "RescaledGuidance": (
        RescaledGuidance(ClassifierFreeGuidance(3.0)),
        RescaledGuidance(ClassifierFreeGuidance(1.0)),
    ),
    "RescaledGuidance of APG, in an interval": (
        GuidanceInterval(RescaledGuidance(AdaptiveProjectedGuidance(6.0), 1.0), 0.5, 3.0),
        GuidanceInterval(RescaledGuidance(AdaptiveProjectedGuidance(6.0), 1.0), 100.0),
    ),
    "AutoGuidance": (AutoGuidance(2.5), AutoGuidance(1.0)),
    "AutoGuidance with projection, in an interval": (
        GuidanceInterval(AutoGuidance(rule=AdaptiveProjectedGuidance(4.0)), 0.5, 3.0),
        GuidanceInterval(AutoGuidance(rule=AdaptiveProjectedGuidance(4.0)), 100.0),
    ),
    "CalibratedClassifierGuidance": (
        CalibratedClassifierGuidance(logits_of, 3.0, condition="labels", decode=unchanged),
        CalibratedClassifierGuidance(logits_of, 0.0, condition="labels", decode=unchanged),
    ),
    "GradientFreeClassifierGuidance": (
        GradientFreeClassifierGuidance(logits_of, 3.0, condition="labels", decode=unchanged),
        GradientFreeClassifierGuidance(logits_of, 0.0, condition="labels", decode=unchanged),
    ),
    "ManifoldProjectedGuidance": (
        ManifoldProjectedGuidance(ClassifierFreeGuidance(3.0), iterations=3, above=0.3),
        ManifoldProjectedGuidance(ClassifierFreeGuidance(1.0), iterations=0),
    ),
}
ALL = pytest.mark.parametrize("name", EXAMPLES)
SIGMAS = (0.9, 0.6, 0.4, 0.2)
SHAPE = (2, 4, 4)


@dataclasses.dataclass
class World:
    """A perfectly trained class-conditional flow model, and noisy samples at each step."""

    mixture: GaussianMixture
    labels: Tensor  # (B,)
    noisy: Tensor  # (steps, B, *SHAPE)

    @classmethod
    def make(cls, batch: int = 4) -> World:
        generator = torch.Generator().manual_seed(1)
        mixture = GaussianMixture.random(3, shape=SHAPE, generator=generator)
        clean, labels = mixture.sample(batch, generator=generator)
        noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
        noisy = torch.stack([Level.flow(s).mix(clean, noise) for s in SIGMAS])
        return cls(mixture, labels, noisy)

    def rows(self, index: Tensor) -> World:
        return World(self.mixture, self.labels[index], self.noisy[:, index])

    def to(self, device: str) -> World:
        return World(self.mixture.to(device), self.labels.to(device), self.noisy.to(device))

    def models(self) -> dict[str, Callable[..., Tensor]]:
        model = self.mixture.denoiser(level=Level.flow)

        def weak(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
            return 0.8 * model(x, sigma, labels) + 0.1

        return {"cond": model, "uncond": model, "weak": weak}

    def without_classes(self) -> dict[str, Callable[..., Tensor]]:
        """Models that say the same whatever the condition: there is nothing to guide."""

        def same(x: Tensor, sigma: Tensor, **_: object) -> Tensor:
            return self.mixture.denoise(x, Level.flow(sigma))

        return {"cond": same, "uncond": same, "weak": same}

    def denoiser(self, rule: Guidance | None, **models: Callable[..., Tensor]) -> GuidedDenoiser:
        return GuidedDenoiser(
            rule, **(models or self.models()), level=Level.flow, arguments={"labels": self.labels}
        )


@pytest.fixture
def world() -> World:
    return World.make()


def follow(denoiser: GuidedDenoiser, noisy: Tensor) -> tuple[Tensor, Tensor]:
    """Guided predictions along the given samples, and the samples they were made at."""
    denoiser.begin(len(SIGMAS))
    guided, at = [], []
    for x, sigma, following in zip(noisy, SIGMAS, (*SIGMAS[1:], 0.0), strict=True):
        denoiser.begin_step(next_sigma=torch.tensor(following))
        guided.append(denoiser(x, torch.tensor(sigma)))
        at.append(x if denoiser.moved is None else denoiser.moved)
    return torch.stack(guided), torch.stack(at)


def run(rule: Guidance | None, world: World) -> Tensor:
    """Guided predictions of all steps, (steps, B, *SHAPE)."""
    return follow(world.denoiser(rule), world.noisy)[0]


def test_every_public_rule_is_in_the_matrix() -> None:
    enrolled = {type(rule).__name__ for rule, _ in EXAMPLES.values()}
    assert enrolled == set(guidance.rules())


def test_everything_exported_exists_and_is_sorted() -> None:
    order = sorted(guidance.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert guidance.__all__ == order
    assert all(hasattr(guidance, name) for name in guidance.__all__)


@ALL
def test_guides(name: str, world: World) -> None:
    assert not torch.allclose(run(EXAMPLES[name][0], world), run(None, world))


@ALL
def test_off_is_exactly_the_conditional_prediction(name: str, world: World) -> None:
    assert torch.equal(run(EXAMPLES[name][1], world), run(None, world))


@ALL
def test_no_cross_talk_in_a_batch(name: str, world: World) -> None:
    rule = EXAMPLES[name][0]
    rows = [run(rule, world.rows(torch.tensor([i]))) for i in range(len(world.labels))]
    torch.testing.assert_close(run(rule, world), torch.cat(rows, 1))


@ALL
def test_follows_a_permutation_of_the_batch(name: str, world: World) -> None:
    rule, order = EXAMPLES[name][0], torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(run(rule, world)[:, order], run(rule, world.rows(order)))


# EluCD's push is the gradient of a classifier: it needs no difference between two predictions, nor
# does a velocity of zero.
WITHOUT = ("CalibratedClassifierGuidance", "ClassifierFreeZeroStarGuidance, zero steps")
DIFFERENCES = [name for name in EXAMPLES if name not in WITHOUT]


@pytest.mark.parametrize("name", DIFFERENCES)
def test_nothing_to_guide_is_the_identity(name: str, world: World) -> None:
    models = world.without_classes()
    denoiser = world.denoiser(EXAMPLES[name][0], **models)
    guided, at = follow(denoiser, world.noisy)
    plain = [models["cond"](x, torch.tensor(s)) for x, s in zip(at, SIGMAS, strict=True)]
    torch.testing.assert_close(guided, torch.stack(plain))


@ALL
def test_memory_ends_with_the_trajectory(name: str, world: World) -> None:
    denoiser = world.denoiser(EXAMPLES[name][0])
    first = follow(denoiser, world.noisy)[0]
    assert torch.equal(first, follow(denoiser, world.noisy)[0])
    assert torch.equal(first, run(EXAMPLES[name][0], world))  # one rule object, two pipelines


@ALL
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 2e-1)],
    ids=str,
)
def test_keeps_the_dtype(name: str, dtype: torch.dtype, tolerance: float, world: World) -> None:
    exact = run(EXAMPLES[name][0], world)
    world.noisy = world.noisy.to(dtype)
    guided = run(EXAMPLES[name][0], world)
    assert guided.dtype == dtype
    assert (guided - exact).abs().max() < tolerance * exact.abs().max()


@ALL
def test_leaves_inputs_as_they_were(name: str, world: World) -> None:
    seen: list[tuple[Tensor, Tensor]] = [(world.noisy, world.noisy.clone())]

    def recorded(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Tensor, **overrides: object) -> Tensor:
            out = model(*args, **overrides)
            seen.append((out, out.clone()))
            return out

        return call

    models = {name: recorded(model) for name, model in world.models().items()}
    follow(world.denoiser(EXAMPLES[name][0], **models), world.noisy)
    assert all(torch.equal(now, then) for now, then in seen)


@ALL
def test_leaves_no_graph_behind(name: str, world: World) -> None:
    denoiser = world.denoiser(EXAMPLES[name][0])
    guided, _ = follow(denoiser, world.noisy.requires_grad_())
    kept = [v for v in _tensors(denoiser.memory) if v.requires_grad]
    assert not kept, "the memory would keep the graphs of all steps alive"
    with torch.no_grad():
        outside = run(EXAMPLES[name][0], world)
    assert not outside.requires_grad
    with torch.inference_mode():
        assert torch.equal(run(EXAMPLES[name][0], world), outside)
    torch.testing.assert_close(guided.detach(), outside)


def _tensors(tree: object) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [t for value in tree.values() for t in _tensors(value)]
    if isinstance(tree, list | tuple):
        return [t for value in tree for t in _tensors(value)]
    return []


@ALL
def test_is_a_frozen_value(name: str) -> None:
    rule = EXAMPLES[name][0]
    assert dataclasses.is_dataclass(rule) and not isinstance(rule, type)
    copies = dataclasses.replace(rule), pickle.loads(pickle.dumps(rule))
    if type(rule).__eq__ is not object.__eq__:  # rules that hold tensors compare by identity
        assert all(copy == rule and hash(copy) == hash(rule) for copy in copies)
    assert all(repr(copy) == repr(rule) for copy in copies)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(rule, dataclasses.fields(rule)[0].name, 2.0)  # type: ignore[arg-type]


def on_no_device(step: int, memory: dict[object, object]) -> Step:
    """A step whose tensors hold nothing: to read a value of them, or wait for one, is an error."""
    x, cond, uncond, weak = (torch.empty(4, *SHAPE, device="meta") for _ in range(4))
    labels = torch.empty(4, dtype=torch.long, device="meta")
    return Step(
        x=x, level=Level.flow(SIGMAS[step]), index=step, count=len(SIGMAS), timestep=0.0,
        cond=cond, uncond=uncond, memory=memory, recorded=lambda name, branch: labels,
        evaluate=lambda at, branch, **_: cond if branch == "cond" else uncond,
        evaluate_weak=lambda model, branch, **_: weak, next_level=Level.flow(SIGMAS[step] - 0.1),
    )  # fmt: skip


@ALL
def test_nothing_waits_for_the_device(name: str) -> None:
    rule, memory = EXAMPLES[name][0], {}
    # What a first step has checked, once a trajectory: labels and logits.
    reference = torch.empty(4, dtype=torch.long, device="meta")
    if isinstance(rule, GradientFreeClassifierGuidance):
        memory[id(rule)] = {"verdict": (reference, torch.empty(4, device="meta"))}
    if isinstance(rule, CalibratedClassifierGuidance):
        memory["seen", id(rule)] = True
    for step in range(len(SIGMAS)):
        assert rule(on_no_device(step, memory)).device.type == "meta"


class Strictly:
    """A rule, after whose first step nothing may wait for the device."""

    def __init__(self, rule: Guidance, gpu: FakeCuda) -> None:
        self.rule, self.gpu = rule, gpu

    def __getattr__(self, name: str) -> object:
        return getattr(self.rule, name)

    def __call__(self, step: Step) -> Tensor:
        guided = self.rule(step)
        self.gpu.waits = False
        return guided


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bits_of_the_cpu_on_a_device_that_never_waits(
    name: str, dtype: torch.dtype, world: World
) -> None:
    m, noisy = world.mixture, world.noisy.to(dtype)
    mixture = GaussianMixture(
        m.means.float(), m.std.float(), m.weights.float(), m.classes, shape=m.shape
    )
    expected = run(EXAMPLES[name][0], World(mixture.to("cpu"), world.labels, noisy))
    with FakeCuda(waits=True) as gpu:
        there = World(mixture.to("cuda"), gpu.put(world.labels), gpu.put(noisy))
        guided = run(Strictly(EXAMPLES[name][0], gpu), there)
        assert torch.equal(gpu.fetch(guided), expected)


@ALL
@pytest.mark.gpu
def test_same_on_the_gpu(name: str, world: World) -> None:
    world.noisy = world.noisy.float()
    on_gpu = run(EXAMPLES[name][0], world.to("cuda")).cpu()
    torch.testing.assert_close(on_gpu, run(EXAMPLES[name][0], world), rtol=1e-4, atol=1e-4)


NUMBERS = [
    (ClassifierFreeZeroStarGuidance, "scale"),
    (ClassifierFreeZeroStarGuidance, "zero_init_steps"),
    (DegradedPassGuidance, "scale"),
    (DegradedPassGuidance, "start"),
    (DegradedPassGuidance, "stop"),
    (FrequencyDecoupledGuidance, "halvings"),
    (FrequencyDecoupledGuidance, "scale_high"),
    (FrequencyDecoupledGuidance, "scale_low"),
    (RescaledGuidance, "rescale"),
    (AdaptiveProjectedGuidance, "eta"),
    (AdaptiveProjectedGuidance, "radius"),
    (AdaptiveProjectedGuidance, "relative_radius"),
    (AdaptiveProjectedGuidance, "momentum"),
    (AdaptiveProjectedGuidance, "latent_std"),
    (AdaptiveProjectedGuidance, "scale"),
    (ClassifierFreeGuidance, "scale"),
    (LinearScale, "end"),
]


@pytest.mark.parametrize("value", [math.nan, -math.inf, "4", None, True, [1.0]], ids=repr)
@pytest.mark.parametrize("cls, field", NUMBERS)
def test_refuses_what_is_no_number(cls: type, field: str, value: object) -> None:
    if value is None and field in ("radius", "relative_radius"):
        pytest.skip("None means: the other one")
    given = {"start": 1.0} if cls is LinearScale else {}
    if "rule" in {item.name for item in dataclasses.fields(cls)}:
        given = {"rule": ClassifierFreeGuidance()}
    wrong_type = not isinstance(value, float)
    with pytest.raises(TypeError if wrong_type else ValueError, match=field):
        cls(**given, **{field: value})
