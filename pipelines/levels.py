"""Scheduler algebra: what a diffusers scheduler is about to be given, and at which noise level.

``noise_level(scheduler, timestep)`` answers for the evaluation that the next ``scheduler.step``
consumes. Schedulers say it in five ways:

- EDM: has ``precondition_outputs``; ``x = clean + s * noise``, the raw EDM output.
- DPM++, UniPC, DEIS, SA: have ``_sigma_to_alpha_sigma_t``; VP, or flow from sigma; any kind.
- DDPM, DDIM, PNDM, LCM, TCD: ``alphas_cumprod`` without ``sigmas``; VP, any kind.
- Euler, Heun, LMS, KDPM2: ``alphas_cumprod`` and ``sigmas``; ``x = clean + s * noise``, any kind.
- Flow matching: class name ``FlowMatch...``; ``x = (1 - s) * clean + s * noise``, the velocity.

A scheduler of your own joins by a method ``noise_level(timestep) -> (Kind, Level)``; one of these
that takes another prediction (``samplers.kdiff_schedulers``) by an attribute ``raw_kind``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.prediction import Kind, Level

KINDS = {
    "epsilon": Kind.NOISE,
    "sample": Kind.DENOISED,
    "original_sample": Kind.DENOISED,
    "v_prediction": Kind.V,
    "flow_prediction": Kind.VELOCITY,
}
_FLOW = ("FlowMatchEuler", "FlowMatchHeun", "FlowMatchLCM", "LTXEulerAncestralRF")
_VP_WITH_SIGMAS = ("LCMScheduler", "TCDScheduler")
_STOCHASTIC = ("Ancestral", "DDPM", "SDE", "SASolver", "LCM", "TCD", "UnCLIP")
_BETWEEN = ("sigmas_interpol", "mid_point_sigma", "prk_timesteps")
_TELLING = (
    *("noise_level", "raw_kind", "_init_step_index", "precondition_outputs"),
    *("_sigma_to_alpha_sigma_t", "_alpha_cumprod", "alphas_cumprod", "sigmas"),
    *("state_in_first_order", *_BETWEEN),
)
_REFUSED = ("DDIMInverse", "DPMSolverMultistepInverse", "ConsistencyModel", "CMStochastic", "SCM")


class LevelReading(NamedTuple):
    """What ``scheduler.step`` takes: ``sign * prediction`` is of ``kind`` at ``level``."""

    kind: Kind
    level: Level
    sign: int = 1


def noise_level(scheduler: Any, timestep: Tensor | float) -> LevelReading:
    """The kind and level of the prediction that the next ``scheduler.step`` takes.

    Args:
        scheduler: a diffusers scheduler after ``set_timesteps``.
        timestep: the timestep about to be passed to ``step``.

    Returns:
        A ``LevelReading``: kind, level (() float32 tensors on the CPU) and sign (-1 for EDM
        schedulers that expect a v-prediction, whose output scale is negative).

    Raises:
        NotImplementedError: if the scheduler, or its ``prediction_type``, is none of the known
            ones.
    """
    return LevelReader(scheduler).read(timestep)


class LevelReader:
    """``noise_level`` for one scheduler, which keeps its tables on the CPU.

    Schedulers hold their sigmas on the accelerator or on the CPU as they please. The tables are
    copied once a trajectory, so that reading a level during sampling never waits for the device.
    Make a new reader for every trajectory, after ``set_timesteps``.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._copies: dict[str, tuple[Any, Tensor]] = {}
        self._time = torch.zeros(1)
        # Asked once: for what is not there diffusers searches the configuration every time.
        self._has = {name for name in _TELLING if hasattr(scheduler, name)}

    def table(self, name: str) -> Tensor:
        """A tensor of the scheduler as float32 on the CPU; copied anew when it was replaced."""
        source = getattr(self.scheduler, name)
        kept = self._copies.get(name)
        if kept is None or kept[0] is not source:
            copy = torch.as_tensor(source).detach().to(device="cpu", dtype=torch.float32)
            kept = self._copies[name] = (source, copy)
        return kept[1]

    def read(self, timestep: Tensor | float) -> LevelReading:
        """See ``noise_level``."""
        reading = self._read(timestep)
        if "raw_kind" in self._has:  # k-Diff in a stock solver
            return reading._replace(kind=self.scheduler.raw_kind)
        return reading

    def _read(self, timestep: Tensor | float) -> LevelReading:
        s, has = self.scheduler, self._has
        name = type(s).__name__
        if "noise_level" in has:
            return LevelReading(*s.noise_level(timestep))
        if any(part in name for part in _REFUSED):
            raise NotImplementedError(_unknown(s))
        if "_init_step_index" in has and s.step_index is None:
            s._init_step_index(timestep)  # what step() would do first
        if "precondition_outputs" in has:
            kind = Kind.edm(s.config.sigma_data)
            sign = -1 if s.config.prediction_type == "v_prediction" else 1
            return LevelReading(kind, Level.ve(self._sigma()), sign)
        if "_sigma_to_alpha_sigma_t" in has:
            return self._solver()
        if "_alpha_cumprod" in has:  # Wuerstchen: continuous, one time for the batch
            return LevelReading(self._kind(), Level.vp(s._alpha_cumprod(_flat(timestep), "cpu")[0]))
        if "alphas_cumprod" in has:
            if self._tabled():
                self._time = _flat(timestep)  # of an accelerator: read once a step
                level = Level.vp(self.table("alphas_cumprod")[int(self._time)])
                return LevelReading(self._kind(), level)
            kind = self._kind()
            return LevelReading(Kind.V_VE if kind == Kind.V else kind, Level.ve(self._sigma()))
        if "IPNDM" in name:  # ets = beta * x + alpha * output: a v-prediction
            index = s.step_index
            return LevelReading(
                Kind.V, Level(self.table("alphas")[index], self.table("betas")[index])
            )
        if any(part in name for part in _FLOW):
            return self._flow()
        raise NotImplementedError(_unknown(s))

    def following(self, timestep: Tensor | float) -> Level | None:
        """The level that this ``scheduler.step`` leads to; call after ``read``.

        None for later stages and for solvers whose steps do not end at an entry of their tables
        (KDPM2, DPM-Solver SDE, PNDM, schedulers of your own).
        """
        s = self.scheduler
        if self._has & {"noise_level", "_alpha_cumprod", *_BETWEEN} or self.stage():
            return None
        if self._tabled():
            times = self.table("timesteps")
            here = (times == self._time).nonzero()
            if not len(here):
                return None
            after = int(here[-1]) + 1
            if after < len(times):
                return Level.vp(self.table("alphas_cumprod")[int(times[after])])
            return Level.vp(torch.as_tensor(getattr(s, "final_alpha_cumprod", 1.0)).float().cpu())
        if "sigmas" not in self._has or s.sigmas is None:
            return None
        sigmas = self.table("sigmas")
        after = s.step_index + 1
        return self._level_at(sigmas[after]) if after < len(sigmas) else None

    def remaining(self, timestep: Tensor | float) -> Tensor | None:
        """The noise-to-signal ratios of this step and the later ones, (n,); call after ``read``.

        None where the scheduler keeps no table of them.
        """
        s = self.scheduler
        if self._has & {"noise_level", "_alpha_cumprod"}:
            return None
        if self._tabled():
            times = self.table("timesteps")
            here = (times == _flat(timestep)).nonzero()
            left = times[int(here[0]) :].long() if len(here) else None
            return None if left is None else Level.vp(self.table("alphas_cumprod")[left]).ratio
        if "sigmas" not in self._has or s.sigmas is None or s.step_index is None:
            return None
        sigmas = self.table("sigmas")
        return self._level_at(sigmas[s.step_index : max(len(sigmas) - 1, s.step_index + 1)]).ratio

    def stage(self) -> int:
        """0 if the next evaluation opens a solver step, 1, 2, 3 for later ones (Heun, PNDM)."""
        s = self.scheduler
        if "prk_timesteps" in self._has:  # three Runge-Kutta steps of four evaluations, or a pair
            counter = s.counter
            if not s.config.skip_prk_steps and counter < len(s.prk_timesteps):
                return int(counter % 4)
            return int(s.config.skip_prk_steps and counter == 1)
        return 0 if "state_in_first_order" not in self._has or s.state_in_first_order else 1

    def steps(self, timestep: Tensor | float) -> int:
        """How many solver steps are left, asked before the first ``step`` of a trajectory.

        Image-to-image starts in the middle of ``timesteps``, and solvers with two stages list most
        of them twice; both are taken into account.
        """
        s = self.scheduler
        if getattr(s, "timesteps", None) is None:
            return 1
        times = self.table("timesteps")
        start = getattr(s, "step_index", None)
        if start is None:
            here = (times == _flat(timestep)).nonzero()
            start = int(here[0]) if len(here) else 0
        left = len(times) - start
        if "prk_timesteps" in self._has:
            extra = 1 if s.config.skip_prk_steps else len(s.prk_timesteps) * 3 // 4
            return max(1, left - extra)
        return max(1, (left + 1) // 2 if "state_in_first_order" in self._has else left)

    def _tabled(self) -> bool:
        """Whether levels are looked up by timestep in ``alphas_cumprod``."""
        s, has = self.scheduler, self._has
        if "alphas_cumprod" not in has or "_sigma_to_alpha_sigma_t" in has:
            return False
        return "sigmas" not in has or s.sigmas is None or type(s).__name__ in _VP_WITH_SIGMAS

    def _level_at(self, sigma: Tensor) -> Level:
        """What an entry of ``sigmas`` means."""
        s, has = self.scheduler, self._has
        if "_sigma_to_alpha_sigma_t" in has and "precondition_outputs" not in has:
            if s.config.get("use_flow_sigmas", False):
                return Level(1 - sigma, sigma)
            return Level(*s._sigma_to_alpha_sigma_t(sigma))
        if any(part in type(s).__name__ for part in _FLOW):
            inverted = s.config.get("invert_sigmas", False)
            return Level(sigma, 1 - sigma) if inverted else Level(1 - sigma, sigma)
        return Level.ve(sigma)

    def _kind(self) -> Kind:
        name = self.scheduler.config.get("prediction_type") or "epsilon"
        if name not in KINDS:
            raise NotImplementedError(
                f"{type(self.scheduler).__name__} has prediction_type={name!r}; steer knows "
                f"{', '.join(KINDS)}"
            )
        return KINDS[name]

    def _sigma(self) -> Tensor:
        s, index = self.scheduler, self.scheduler.step_index
        if self.stage():
            # Second stages that are evaluated between two entries of ``sigmas``.
            if "sigmas_interpol" in self._has:
                ancestral = "Ancestral" in type(s).__name__
                return self.table("sigmas_interpol")[index - 1 if ancestral else index]
            if getattr(s, "mid_point_sigma", None) is not None:
                return torch.as_tensor(s.mid_point_sigma, dtype=torch.float32, device="cpu")
        return self.table("sigmas")[index]

    def _solver(self) -> LevelReading:
        s, kind = self.scheduler, self._kind()
        flow = bool(s.config.get("use_flow_sigmas", False))
        if flow != (kind == Kind.VELOCITY) and kind in (Kind.VELOCITY, Kind.V):
            raise NotImplementedError(
                f"{type(s).__name__} has prediction_type={s.config.prediction_type!r} with "
                f"use_flow_sigmas={flow}, which describes no consistent noise level; "
                "flow_prediction and use_flow_sigmas=True belong together"
            )
        return LevelReading(kind, self._level_at(self._sigma()))

    def _flow(self) -> LevelReading:
        level = self._level_at(self._sigma())
        if self.scheduler.config.get("invert_sigmas", False):  # Mochi: sigma grows towards the data
            return LevelReading(Kind.VELOCITY_TO_DATA, level)
        return LevelReading(Kind.VELOCITY, level)


def _flat(timestep: Tensor | float) -> Tensor:
    return torch.as_tensor(timestep).detach().to("cpu", torch.float32).reshape(-1)[:1]


def _unknown(scheduler: Any) -> str:
    return (
        f"steer does not know the noise levels of {type(scheduler).__name__}. Use a DDPM/DDIM, "
        "DPM-Solver, UniPC, Euler, Heun, LCM, EDM or FlowMatch scheduler, or give yours a "
        "method noise_level(timestep) that returns (Kind, Level)"
    )


def adds_noise(scheduler: Any, **options: Any) -> bool:
    """Whether ``scheduler.step(..., **options)`` draws noise, as far as its class name tells."""
    config = scheduler.config
    return (
        any(part in type(scheduler).__name__ for part in _STOCHASTIC)
        or str(config.get("algorithm_type", "")).startswith("sde-")
        or bool(config.get("stochastic_sampling", False))
        or any(float(options.get(name) or 0) > 0 for name in ("eta", "s_churn"))
    )
