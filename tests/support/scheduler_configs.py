"""Schedulers, prediction types and sigma options that steer must read: one row a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
from diffusers.utils import is_torchsde_available

EPS, V, SAMPLE, FLOW = "epsilon", "v_prediction", "sample", "flow_prediction"
KARRAS = {"use_karras_sigmas": True}
UNCLIPPED = {"clip_sample": False}
FLOW_SIGMAS = {"use_flow_sigmas": True, "flow_shift": 3.0}


@dataclass(frozen=True)
class Config:
    """A scheduler to build; ``flow`` says whether it is one for flow models."""

    scheduler: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def flow(self) -> bool:
        return "FlowMatch" in self.scheduler or ("prediction_type", FLOW) in self.options

    @property
    def name(self) -> str:
        told = [str(value) if isinstance(value, str) else key for key, value in self.options]
        return "-".join([self.scheduler.removesuffix("Scheduler"), *told])

    def build(self) -> Any:
        # A short table: KDPM2 and others build a row of it in Python at a time.
        return getattr(diffusers, self.scheduler)(num_train_timesteps=200, **dict(self.options))


def _rows(scheduler: str, kinds: tuple[str, ...], *options: dict[str, Any]) -> list[Config]:
    return [
        Config(scheduler + "Scheduler", tuple({"prediction_type": kind, **option}.items()))
        for option in (options or ({},))
        for kind in kinds
    ]


CONFIGS = [
    *_rows("DDIM", (EPS, V, SAMPLE), UNCLIPPED),
    *_rows("DDPM", (EPS, V, SAMPLE), UNCLIPPED),
    *_rows("DDIM", (V,), {**UNCLIPPED, "rescale_betas_zero_snr": True}),
    *_rows("PNDM", (EPS, V), {"skip_prk_steps": True}),
    *_rows("PNDM", (EPS,), {"skip_prk_steps": False}),
    *_rows("EulerDiscrete", (EPS, V, SAMPLE), {}),
    *_rows("EulerDiscrete", (EPS, V), KARRAS),
    *_rows("EulerDiscrete", (EPS,), {"use_exponential_sigmas": True}),
    *_rows("EulerAncestralDiscrete", (EPS, V)),
    *_rows("HeunDiscrete", (EPS, V, SAMPLE), {}),
    *_rows("HeunDiscrete", (EPS,), KARRAS),
    *_rows("LMSDiscrete", (EPS, V, SAMPLE), {}),
    *_rows("LMSDiscrete", (EPS,), KARRAS),
    *_rows("KDPM2Discrete", (EPS, V), {}),
    *_rows("KDPM2Discrete", (EPS,), KARRAS),
    *_rows("KDPM2AncestralDiscrete", (EPS, V), {}),
    *_rows("KDPM2AncestralDiscrete", (EPS,), KARRAS),
    *_rows("DPMSolverMultistep", (EPS, V, SAMPLE), {}),
    *_rows("DPMSolverMultistep", (EPS, V), KARRAS),
    *_rows("DPMSolverMultistep", (FLOW,), FLOW_SIGMAS),
    *_rows("DPMSolverMultistep", (EPS,), {"algorithm_type": "sde-dpmsolver++"}),
    *_rows("DPMSolverSinglestep", (EPS, V, SAMPLE), {}),
    *_rows("DPMSolverSinglestep", (FLOW,), FLOW_SIGMAS),
    *_rows("UniPCMultistep", (EPS, V, SAMPLE), {}),
    *_rows("UniPCMultistep", (EPS,), KARRAS),
    *_rows("UniPCMultistep", (FLOW,), FLOW_SIGMAS),
    *_rows("DEISMultistep", (EPS, V, SAMPLE), {}),
    *_rows("DEISMultistep", (FLOW,), FLOW_SIGMAS),
    *_rows("SASolver", (EPS, V, SAMPLE), {}),
    *_rows("SASolver", (FLOW,), FLOW_SIGMAS),
    *_rows("LCM", (EPS, V), {}),
    *_rows("TCD", (EPS, V), {}),
    *_rows("EDMEuler", (EPS, V)),
    *_rows("EDMDPMSolverMultistep", (EPS, V)),
    Config("FlowMatchEulerDiscreteScheduler"),
    Config("FlowMatchEulerDiscreteScheduler", (("shift", 3.0),)),
    Config("FlowMatchEulerDiscreteScheduler", (("use_karras_sigmas", True),)),
    Config("FlowMatchEulerDiscreteScheduler", (("invert_sigmas", True),)),
    Config("FlowMatchHeunDiscreteScheduler"),
    Config("FlowMatchLCMScheduler"),
]
if is_torchsde_available():
    CONFIGS += [
        *_rows("DPMSolverSDE", (EPS, V), {}),
        *_rows("DPMSolverSDE", (EPS,), KARRAS),
        *_rows("CosineDPMSolverMultistep", (EPS, V), {}),
    ]
