"""The noise level that steer reads off a scheduler, against what the scheduler makes of it."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from scheduler_configs import CONFIGS, Config
from torch import Tensor

from diffsteer.core import Kind, Level, from_denoised, to_denoised
from diffsteer.pipelines import LevelReading, noise_level
from diffsteer.pipelines.levels import LevelReader
from diffsteer.pipelines.spaces import Space

pytestmark = [  # of diffusers (KDPM2) and of torchsde
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning"),
]

STEPS = 6
ids = [config.name for config in CONFIGS]


class Walk:
    """A run of a scheduler, step by step: ``t`` and ``x`` are what the next ``step`` takes."""

    def __init__(self, config: Config, steps: int = STEPS) -> None:
        self.scheduler = config.build()
        self.scheduler.set_timesteps(steps)
        noise = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
        self.x = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        self.times = list(self.scheduler.timesteps)
        self._scale()

    @property
    def t(self) -> Tensor:
        return self.times[0]

    def step(self, output: Tensor) -> Any:
        """Take a step and return what the scheduler says of it."""
        taken = self.scheduler.step(output, self.t, self.x)
        self.x = taken.prev_sample
        self.times.pop(0)
        self._scale()
        return taken

    def _scale(self) -> None:
        if self.times and hasattr(self.scheduler, "scale_model_input"):
            self.scheduler.scale_model_input(self.x, self.t)


@pytest.mark.parametrize("config", CONFIGS, ids=ids)
def test_denoised_is_the_schedulers_own(config: Config) -> None:
    run, generator = Walk(config), torch.Generator().manual_seed(1)
    compared = 0
    while run.times:
        x, reading = run.x, noise_level(run.scheduler, run.t)
        output = torch.randn(x.shape, generator=generator)
        ours = Space(reading, x).denoised(output)
        theirs = own_denoised(run, output)
        if theirs is None:
            continue
        if config.scheduler.startswith("DEIS"):  # it integrates the noise instead
            alpha, sigma = reading.level.over(x)
            ours = (x - alpha * ours) / sigma
        compared += 1
        # Both are sums that nearly cancel at high noise: to rounding of the larger term.
        scale = max(float(theirs.norm()), float(x.norm()))
        assert float((ours - theirs).norm()) <= 1e-6 * scale
    assert compared or config.scheduler.startswith(("PNDM", "FlowMatch"))


def own_denoised(run: Walk, output: Tensor) -> Tensor | None:
    """Take the step; what the scheduler takes for the clean sample (DEIS: for the noise)."""
    scheduler, t, x = run.scheduler, run.t, run.x
    name, converted = type(scheduler).__name__, None
    if hasattr(scheduler, "convert_model_output"):
        converted = scheduler.convert_model_output(output, sample=x)
    index = getattr(scheduler, "step_index", None)
    taken = run.step(output)
    if name == "LCMScheduler":
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        return (taken.denoised - skip * x) / out
    if name == "TCDScheduler":
        return _out_of_tcd(scheduler, taken.pred_noised_sample, output, t, x, index)
    return getattr(taken, "pred_original_sample", None) if converted is None else converted


def _out_of_tcd(
    scheduler: Any, noised: Tensor, output: Tensor, t: Tensor, x: Tensor, index: int
) -> Tensor:
    # noised = sqrt(a_s) * clean + sqrt(1 - a_s) * noise at the timestep s that TCD looks ahead to.
    times = scheduler.timesteps
    ahead = times[index + 1] if index + 1 < len(times) else torch.tensor(0)
    a_s = scheduler.alphas_cumprod[int((1 - 0.3) * ahead)]
    a_t = scheduler.alphas_cumprod[t]
    eps = scheduler.config.prediction_type == "epsilon"
    noise = output if eps else a_t.sqrt() * output + (1 - a_t).sqrt() * x
    return (noised - (1 - a_s).sqrt() * noise) / a_s.sqrt()


# DEIS, SASolver and TCD end at a small noise level; they are compared above.
TO_ZERO = [c for c in CONFIGS if not c.scheduler.startswith(("DEIS", "SASolver", "TCD"))]


@pytest.mark.parametrize("config", TO_ZERO, ids=[config.name for config in TO_ZERO])
def test_a_perfect_model_of_one_point_ends_there(config: Config) -> None:
    """With all data in one point the denoised sample is that point at every level, and every solver
    ends on it: a wrong level at the last evaluations would miss."""
    run = Walk(config)
    point = torch.linspace(-1, 1, run.x.numel()).reshape(run.x.shape)
    while run.times:
        kind, level, sign = noise_level(run.scheduler, run.t)
        run.step(sign * from_denoised(point, kind, run.x, level))
    # PNDM stops at the smallest level of its table.
    assert float((run.x - point).abs().max()) < (0.2 if "PNDM" in config.scheduler else 1e-3)


@pytest.mark.parametrize("config", CONFIGS, ids=ids)
def test_steps_and_stages_are_counted(config: Config) -> None:
    run = Walk(config)
    noise_level(run.scheduler, run.t)
    reader = LevelReader(run.scheduler)
    count, opened = reader.steps(run.t), 0
    while run.times:
        opened += reader.stage() == 0
        run.step(torch.zeros_like(run.x))
    assert count == opened == STEPS


def test_image_to_image_counts_the_steps_that_are_left() -> None:
    for name, begin in (("HeunDiscreteScheduler", 4), ("EulerDiscreteScheduler", 2)):
        scheduler = getattr(diffusers, name)()
        scheduler.set_timesteps(STEPS)
        scheduler.set_begin_index(begin)
        t, reader = scheduler.timesteps[begin], LevelReader(scheduler)
        now = reader.read(t).level
        assert reader.steps(t) == STEPS - 2
        ratios = reader.remaining(t)
        assert ratios[0] == now.ratio and torch.equal(ratios, scheduler.sigmas[begin:-1])
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    t, reader = scheduler.timesteps[2], LevelReader(scheduler)
    assert reader.steps(t) == len(reader.remaining(t)) == STEPS - 2
    assert reader.remaining(t)[0] == reader.read(t).level.ratio


@pytest.mark.parametrize("to_one", [True, False])
def test_the_last_step_leads_where_the_scheduler_says(to_one: bool) -> None:
    scheduler = diffusers.DDIMScheduler(set_alpha_to_one=to_one)
    scheduler.set_timesteps(STEPS)
    after = LevelReader(scheduler).following(scheduler.timesteps[-1])
    assert after is not None and after.alpha**2 == pytest.approx(
        1.0 if to_one else float(scheduler.alphas_cumprod[0])
    )


def test_levels_are_scalars_on_the_cpu_and_tables_follow_the_scheduler() -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    reader = LevelReader(scheduler)
    for steps in (3, 5):
        scheduler.set_timesteps(steps)
        level = reader.read(scheduler.timesteps[0]).level
        assert level.sigma.shape == () and level.sigma.device.type == "cpu"
        assert float(level.sigma) == float(scheduler.sigmas[0])
        assert len(reader.table("sigmas")) == steps + 1


def test_a_scheduler_of_ones_own_says_its_level() -> None:
    class Own:
        def noise_level(self, timestep: float) -> tuple[Kind, Level]:
            return Kind.DENOISED, Level.ve(timestep)

    reading = noise_level(Own(), 3.0)
    assert reading.kind == Kind.DENOISED and float(reading.level.sigma) == 3.0 and reading.sign == 1


@pytest.mark.parametrize(
    "scheduler, text",
    [
        (lambda: diffusers.DDIMInverseScheduler(), "noise_level"),
        (lambda: diffusers.CMStochasticIterativeScheduler(), "does not know"),
        (
            lambda: diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"),
            "use_flow_sigmas",
        ),
        (lambda: diffusers.DDIMScheduler(prediction_type="other"), "prediction_type='other'"),
    ],
)
def test_unknown_schedulers_are_refused(scheduler: Any, text: str) -> None:
    made = scheduler()
    made.set_timesteps(4)
    with pytest.raises(NotImplementedError, match=text):
        noise_level(made, made.timesteps[0])


def test_noise_without_signal_is_refused_by_the_conversion() -> None:
    level = Level(0.0, 1.0)
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        Space(LevelReading(Kind.NOISE, level), x).check()
    Space(LevelReading(Kind.V, level), x).check()


@pytest.mark.parametrize(
    "kind, level",
    [
        (Kind.NOISE, Level.vp(0.3)),
        (Kind.V, Level.vp(0.7)),
        (Kind.V_VE, Level.ve(2.0)),
        (Kind.VELOCITY, Level.flow(0.4)),
        (Kind.VELOCITY, Level.flow(torch.tensor([0.2, 0.9]))),
        (Kind.DENOISED, Level.ve(2.0)),
        (Kind.edm(0.5), Level.ve(0.01)),
    ],
)
@pytest.mark.parametrize("moved", [False, True])
def test_space_and_core_agree(kind: Kind, level: Level, moved: bool) -> None:
    x, out, guided = torch.randn(3, 2, 4, 4).unbind(0)
    space = Space(LevelReading(kind, level), x)
    cond = space.denoised(out)
    torch.testing.assert_close(cond, to_denoised(out, kind, x, level))
    other = x + 0.1 * torch.randn_like(x) if moved else None
    made = space.output(guided, out, cond, other)
    torch.testing.assert_close(
        made,
        from_denoised(guided, kind, x if other is None else other, level),
        rtol=1e-4,
        atol=1e-4,
    )
