"""The networks of the benchmark of EGGROLL, and the ways to evaluate a population by them."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from _real_size import SD3_MEDIUM
from torch import Tensor, nn

from diffsteer import load_embedded
from diffsteer.training.eggroll import NoiseFormat, find_layers, member_noise, perturbed

SIGMA = 5e-3
Arguments = dict[str, Any]


@dataclass
class Case:
    """A network, and the arguments of a call with as many rows as asked."""

    model: nn.Module
    inputs: Callable[[int], Arguments]
    tokens: int
    excluded: tuple[str, ...] = ()


def embedded(options: argparse.Namespace) -> Case:
    model = load_embedded(device=options.device).transformer
    nn.Module.to(model, options.dtype)

    def inputs(rows: int) -> Arguments:
        where = {"device": options.device}
        return {
            "hidden_states": torch.randn(rows, 3, 32, 32, dtype=options.dtype, **where),
            "timestep": torch.linspace(50, 950, rows, **where),
            "class_labels": torch.arange(rows, **where) % 10,
        }

    return Case(model, inputs, tokens=64)


def sd3(options: argparse.Namespace) -> Case:
    import diffusers

    with torch.device(options.device):
        model = diffusers.SD3Transformer2DModel(**SD3_MEDIUM, num_layers=options.layers)
    model = model.to(options.dtype).eval().requires_grad_(False)
    side, where = options.pixels // 8, {"device": options.device, "dtype": options.dtype}

    def inputs(rows: int) -> Arguments:
        return {
            "hidden_states": torch.randn(rows, 16, side, side, **where),
            "timestep": torch.linspace(50, 950, rows, device=options.device),
            "encoder_hidden_states": torch.randn(rows, options.text_tokens, 4096, **where),
            "pooled_projections": torch.randn(rows, 2048, **where),
        }

    # The last block drops its text stream: what only feeds that has no effect.
    return Case(model, inputs, tokens=(side // 2) ** 2 + options.text_tokens)


def call(model: nn.Module, arguments: Arguments, **more: Any) -> Tensor:
    return model(**arguments, **more, return_dict=False)[0]


def part(arguments: Arguments, rows: slice) -> Arguments:
    return {name: value[rows] for name, value in arguments.items()}


# -- variants: each evaluates one generation and gives the output of its last call -----------------


class Variants:
    """One generation of M members by K rows, in every way."""

    def __init__(self, case: Case, options: argparse.Namespace) -> None:
        self.case, self.options = case, options
        self.members, self.rows = options.members, options.rows
        self.arguments = case.inputs(self.members * self.rows)
        self.layers = find_layers(case.model, exclude=case.excluded)
        self.runner = torch.compile(case.model) if options.compile else case.model
        self.peft: Any = None

    def plain(self) -> Tensor:
        """The network without noise."""
        for _ in range(self.options.calls):
            output = call(self.runner, self.arguments)
        return output

    def low_rank(self, rank: int) -> Tensor:
        """All members in one batch."""
        with self.noisy(list(range(self.members)), rank, self.rows):
            return self.plain()

    def sequential(self) -> Tensor:
        """Explicit weights, member after member."""
        outputs = []
        for member in range(self.members):
            mine = part(self.arguments, slice(member * self.rows, (member + 1) * self.rows))
            with self.noisy([member], 1, self.rows, mode="materialize"):
                for _ in range(self.options.calls):
                    output = call(self.runner, mine)
            outputs.append(output)
        return torch.cat(outputs)

    def vmap(self) -> Tensor:
        """Explicit weights of all members at once."""
        model = self.case.model
        weights = {}
        for layer in self.layers.values():
            deltas = [self.delta(layer, member) for member in range(self.members)]
            base = layer.module.weight
            weights[f"{layer.name}.weight"] = torch.stack([(base + d).to(base) for d in deltas])
        rows = {
            name: value.view(self.members, self.rows, *value.shape[1:])
            for name, value in self.arguments.items()
        }

        def one(changed: dict[str, Tensor], arguments: Arguments) -> Tensor:
            output = torch.func.functional_call(
                model, changed, (), {**arguments, "return_dict": False}
            )
            return output[0]

        for _ in range(self.options.calls):
            output = torch.func.vmap(one)(weights, rows)
        return output.flatten(0, 1)

    def mixed_adapters(self) -> Tensor:
        """A LoRA adapter a member in one batch."""
        if self.peft is None:
            self.peft = self.make_adapters()
        names = [f"member{m}" for m in range(self.members) for _ in range(self.rows)]
        for _ in range(self.options.calls):
            output = call(self.peft, self.arguments, adapter_names=names)
        return output

    def make_adapters(self) -> nn.Module:
        """A copy of the network with an adapter a member."""
        from peft import LoraConfig, get_peft_model

        linear = [n for n, layer in self.layers.items() if isinstance(layer.module, nn.Linear)]
        config = LoraConfig(r=1, lora_alpha=1, target_modules=linear, init_lora_weights=False)
        model = get_peft_model(copy.deepcopy(self.case.model), config, adapter_name="member0")
        for member in range(1, self.members):
            model.add_adapter(f"member{member}", config)
        return model.to(self.options.dtype).eval()

    def delta(self, layer: Any, member: int) -> Tensor:
        """The explicit perturbation of a weight."""
        noise = NoiseFormat(0)
        pair, sign = noise.source(member)
        a, b = member_noise(noise, layer, pair, 0, device=layer.module.weight.device)
        return (sign * SIGMA * a @ b.T).view(layer.module.weight.shape)

    @contextmanager
    def noisy(self, members: Sequence[int], rank: int, rows: int, mode: str = "lowrank") -> Any:
        """Members of the first generation."""
        with perturbed(
            self.runner,
            members,
            noise=NoiseFormat(0, rank=rank),
            step=0,
            sigma=SIGMA,
            rows_per_member=rows,
            layers=self.layers,
            mode=mode,
        ):
            yield


def variants_of(v: Variants, names: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
    every: dict[str, Callable[[], Tensor]] = {"plain": v.plain}
    for rank in v.options.ranks:
        every[f"low-rank, rank {rank}"] = lambda rank=rank: v.low_rank(rank)
    every |= {"sequential": v.sequential, "vmap": v.vmap, "peft": v.mixed_adapters}
    return {name: run for name, run in every.items() if name.split(",")[0] in names}
