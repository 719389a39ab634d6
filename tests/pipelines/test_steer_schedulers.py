"""steer() with every scheduler, prediction type and sigma option: bit-exact plain guidance."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from scheduler_configs import CONFIGS, Config
from tiny_pipelines import SCALE, Tiny, build

from diffsteer import AdaptiveProjectedGuidance, ClassifierFreeGuidance, Step, steer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning"),
]

STEPS = 3


@functools.cache
def shared(name: str) -> Tiny:
    return build(name)


def with_scheduler(config: Config) -> Tiny:
    """A U-Net pipeline for diffusion schedulers, Stable Diffusion 3 for those of flow models."""
    tiny = shared("sd3" if config.flow else "sd")
    tiny.pipe.scheduler = config.build()
    return tiny


def steps_of(config: Config) -> int:
    # PNDM's Runge-Kutta start needs three steps of its own, and one more to follow.
    return 4 if "PNDM" in config.scheduler else STEPS


# Mochi's direction of time, which Stable Diffusion 3 cannot run.
RUNNABLE = [config for config in CONFIGS if "invert_sigmas" not in config.name]


@pytest.mark.parametrize("config", RUNNABLE, ids=[config.name for config in RUNNABLE])
def test_plain_guidance_is_bit_exact(config: Config) -> None:
    tiny, steps = with_scheduler(config), steps_of(config)
    torch.manual_seed(0)  # FlowMatchLCM draws from the global generator
    expected = tiny.call(num_inference_steps=steps)
    assert torch.isfinite(expected).all()
    tiny = with_scheduler(config)  # a fresh scheduler: some keep a state between runs
    torch.manual_seed(0)
    with steer(tiny.pipe, ClassifierFreeGuidance(SCALE)) as run:
        steered = tiny.call(num_inference_steps=steps, guidance_scale=2.0)
    assert torch.equal(steered, expected)
    assert {record.index for record in run.steps} == set(range(steps))


@pytest.mark.parametrize(
    "scheduler, stages",
    [
        ("HeunDiscreteScheduler", [0, 1, 0, 1, 0]),
        ("KDPM2DiscreteScheduler", [0, 1, 0, 1, 0]),
        ("KDPM2AncestralDiscreteScheduler", [0, 1, 0, 1, 0]),
        ("EulerDiscreteScheduler", [0, 0, 0]),
    ],
)
def test_rules_see_the_stages_of_a_solver(scheduler: str, stages: list[int]) -> None:
    tiny = with_scheduler(Config(scheduler))
    seen: list[Step] = []

    class Watch:
        def __call__(self, step: Step) -> torch.Tensor:
            assert torch.isfinite(step.cond).all() and torch.isfinite(step.level.ratio)
            seen.append(step)
            return step.cond

    with steer(tiny.pipe, Watch()):
        tiny.call(num_inference_steps=STEPS)
    assert [step.stage for step in seen] == stages
    assert [step.index for step in seen] == [
        sum(s == 0 for s in stages[: i + 1]) - 1 for i in range(len(stages))
    ]
    assert {step.count for step in seen} == {STEPS}
    ratios = [float(step.level.ratio) for step in seen]
    assert ratios == sorted(ratios, reverse=True)


def test_zero_terminal_snr_with_noise_prediction_is_refused_for_denoised_rules() -> None:
    config = Config(
        "DDIMScheduler",
        (("rescale_betas_zero_snr", True), ("timestep_spacing", "trailing")),
    )
    tiny = with_scheduler(config)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        with steer(tiny.pipe, AdaptiveProjectedGuidance(SCALE)):
            tiny.call(num_inference_steps=STEPS)


def test_the_pipelines_scheduler_keeps_its_signature() -> None:
    tiny = with_scheduler(Config("DDIMScheduler"))
    before = inspect.signature(tiny.pipe.scheduler.step)
    with steer(tiny.pipe, ClassifierFreeGuidance(SCALE)):
        assert inspect.signature(tiny.pipe.scheduler.step) == before
