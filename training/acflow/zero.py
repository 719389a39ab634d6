"""DeepSpeed's ZeRO 1 and 2 in the place of the optimizer: its moments are cut over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .config import ACFlowConfig
from .optimise import adam
from .policy import Policy
from .sharding import launch_kind
from .stepper import Stepper

__all__ = ["ZeroStepper", "check_zero", "make_stepper"]

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_stepper(config: ACFlowConfig, policy: Policy, accelerator: Any) -> Stepper:
    """The stepper for the launch: DeepSpeed's or the ordinary one."""
    zero = launch_kind(accelerator) == "DEEPSPEED"
    return (ZeroStepper if zero else Stepper)(config, policy, accelerator)


def check_zero(plugin: Any) -> None:
    """Refuse settings of DeepSpeed that do not go with sampling, averages and checkpoints.

    Raises:
        NotImplementedError: with what to set.
    """
    config = plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    offloaded = [zero.get(f"offload_{what}", {}).get("device") for what in ("optimizer", "param")]
    narrow = [config.get(name, {}).get("enabled") for name in ("bf16", "fp16")]
    wrong = {
        "zero_stage: 1 or 2 (to cut the weights too, use --use_fsdp --fsdp_version 2)": (
            zero.get("stage") in (1, 2)
        ),
        "offload_optimizer_device and offload_param_device: none": all(
            device in (None, "none") for device in offloaded
        ),
        "no bf16 or fp16 in its config: precision here says the arithmetic": True not in narrow,
    }
    for remedy, holds in wrong.items():
        if not holds:
            raise NotImplementedError(f"this DeepSpeed launch cannot be trained with; set {remedy}")


class ZeroStepper(Stepper):
    """`Stepper` whose moments, and with ZeRO 2 whose gradients, are cut over the ranks.

    DeepSpeed clips and steps by itself; its saved state is that of the ordinary optimizer, so runs
    go on with or without it.
    """

    def __init__(self, config: ACFlowConfig, policy: Policy, accelerator: Any) -> None:
        self.config, self.policy, self.accelerator = config, policy, accelerator
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["gradient_clipping"] = config.clip
        settings["gradient_accumulation_steps"] = 1  # passes are counted by `passing`
        settings["train_micro_batch_size_per_gpu"] = 1  # unused, and must be a number
        optimizer = adam(policy.parameters, config.learning_rate, config.weight_decay)
        self.engine, wrapped = accelerator.prepare(policy.module, optimizer)
        policy.module.eval()
        policy.runner, self.optimizer = self.engine, wrapped.optimizer

    @contextmanager
    def passing(self, last: bool) -> Iterator[None]:
        """Around a forward and backward pass; ``last`` says whether a step follows."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's loss, ()."""
        self.engine.backward(loss)

    def step(self, rate: float) -> Tensor:
        """Update the weights; the norm of the gradients before they were clipped, ()."""
        self._set_rate(rate)
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.accelerator.device)

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer without DeepSpeed; every rank calls it together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        inner, parameters = self.optimizer.optimizer, self.policy.parameters
        (group,) = inner.state_dict()["param_groups"]
        group |= {"params": list(range(len(parameters)))}
        steps = [value["step"] for value in inner.state.values() if "step" in value]
        state = {
            index: {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            | {"step": steps[0].clone()}
            for index, parameter in enumerate(parameters if steps else ())
        }
        return {"state": state, "param_groups": [group]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the weights have been loaded before."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.optimizer.refresh_fp32_params()
        if not state["state"]:
            return
        parameters = self.policy.parameters
        # Moments come into being with the first step: one of no size and no gradient.
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(sum(parameter.sum() * 0 for parameter in parameters))
        self.step(0.0)
        zero = torch.zeros((), device=self.accelerator.device)
        for index, parameter in enumerate(parameters):
            saved = state["state"].get(index, {})  # one that never had a gradient has none
            for name in MOMENTS:
                value = saved.get(name, zero.expand(parameter.shape)).to(zero.device)
                safe_set_full_optimizer_state(parameter, value.float(), name)
        step = max(float(saved["step"]) for saved in state["state"].values())
        for value in self.optimizer.optimizer.state.values():
            value["step"].fill_(step)
