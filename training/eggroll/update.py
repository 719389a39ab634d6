"""The step: a gradient for each layer, and the float32 offsets that any torch optimizer moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.tensors import send
from .layers import Layer
from .noise import NoiseFormat, bias_noise, pair_factors
from .shaping import Shaped

__all__ = ["MakeOptimizer", "Offsets", "es_gradient", "make_optimizer", "weights_hash"]

MakeOptimizer = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
_OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr),
}
CHUNK = 256  # rows of stacked factors in one product; part of what makes results reproducible


def es_gradient(
    noise: NoiseFormat, layer: Layer, step: int, sigma: float, shaped: Shaped
) -> dict[str, Tensor]:
    """What evolution strategies know of the gradient of the fitness with respect to a layer.

    ``sigma / sqrt(count) * sum_i values_i E_i``: with uninformative weights of deviation 1 each
    entry has deviation sigma, so that the rate of plain SGD is a step size in units of sigma (the
    convention of the authors' code; its paper's equation 6 has ``1 / N`` instead). The sum is a
    product of stacked factors, in chunks of fixed size and order: the same bits on every rank of
    one kind of machine.

    Args:
        noise: as in the forward pass.
        layer: whose gradient.
        step: as in the forward pass.
        sigma: as in the forward pass.
        shaped: from ``shape_fitness``, one value a member.

    Returns:
        Gradients by name of the parameter, each in its shape, float32 (float64 where it is).
    """
    weight = layer.module.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    where: dict[str, Any] = {"device": weight.device, "dtype": dtype}
    scale = sigma / max(1, shaped.count) ** 0.5
    weights = send(pair_weights(shaped.values, noise) * scale, **where)
    total = torch.zeros(layer.rows, layer.columns, **where)
    bias = torch.zeros(layer.rows, **where) if layer.bias else None
    for pairs in chunks(len(weights), noise.rank):
        part = weights[pairs.start : pairs.stop] / noise.rank**0.5
        a, b = pair_factors(noise, layer, pairs, step, **where)
        total.addmm_((a * part[:, None, None]).flatten(0, 1).T, b.flatten(0, 1))
        if bias is not None:
            rows = bias_noise(noise, layer, pairs, step, **where)
            bias.addmv_(rows.T, weights[pairs.start : pairs.stop])
    found = {f"{layer.name}.weight": total.view(weight.shape)}
    if bias is not None:
        found[f"{layer.name}.bias"] = bias
    return found


def pair_weights(values: Tensor, noise: NoiseFormat) -> Tensor:
    """The weight of each pair's noise: the difference of its members' values."""
    return values[0::2] - values[1::2] if noise.antithetic else values


def chunks(pairs: int, rank: int) -> Iterator[range]:
    """Ranges of pairs, CHUNK stacked factors at most each."""
    size = max(1, CHUNK // rank)
    for start in range(0, pairs, size):
        yield range(start, min(start + size, pairs))


class Offsets:
    """What evolution has added to each weight: ``weight = base + offset``, in float32.

    The offsets are what optimizers move, so their weight decay pulls towards the pretrained
    weights. A half-precision model would lose small steps; its float32 offsets keep them.

    Args:
        layers: what evolves; the weights as they are now are the base.
        offload: keep base and offsets in main memory and not where the weights are.
    """

    def __init__(self, layers: Mapping[str, Layer], *, offload: bool = False) -> None:
        self._weights = dict(p for layer in layers.values() for p in layer.parameters())
        self.base = {
            name: weight.detach().to("cpu" if offload else weight.device, copy=True)
            for name, weight in self._weights.items()
        }
        self.parameters = {
            name: nn.Parameter(torch.zeros_like(base, dtype=_wide(base)))
            for name, base in self.base.items()
        }

    @torch.no_grad()
    def write_back(self) -> None:
        """Put ``base + offset`` into the model, in its dtype."""
        for name, weight in self._weights.items():
            new = self.base[name].to(self.parameters[name].dtype) + self.parameters[name]
            weight.copy_(new, non_blocking=not weight.is_cpu)  # of an offloaded one: not waited for

    def base_hash(self) -> int:
        """The hash of the weights that the offsets belong to."""
        return weights_hash(self.base.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The offsets by name of the parameter."""
        return {name: offset.detach().clone() for name, offset in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the offsets and write the weights.

        Raises:
            ValueError: a name or a shape does not fit; nothing has been changed then.
        """
        have = {name: tuple(offset.shape) for name, offset in self.parameters.items()}
        given = {name: tuple(offset.shape) for name, offset in state.items()}
        if have != given:
            odd = next(n for n in {**given, **have} if have.get(n) != given.get(n))
            raise ValueError(
                f"the saved offsets are not those of this model: {odd} is {given.get(odd)} there "
                f"and {have.get(odd)} here (None: not among the layers that evolve)"
            )
        for name, offset in self.parameters.items():
            offset.copy_(state[name])
        self.write_back()

    @torch.no_grad()
    def decay(self, amount: float, names: Iterable[str] | None = None) -> None:
        """Shrink these offsets, or all, by ``amount`` of themselves."""
        for name in self.parameters if names is None else names:
            self.parameters[name].mul_(1 - amount)

    @torch.no_grad()
    def limit(self, norm: float) -> None:
        """Shrink all offsets together so that their norm is at most ``norm``."""
        now = total_norm(self.parameters.values())
        if now > norm:
            for offset in self.parameters.values():
                offset.mul_(norm / now)


def make_optimizer(
    which: str | MakeOptimizer, parameters: Iterable[nn.Parameter], lr: float
) -> torch.optim.Optimizer:
    """A torch optimizer by its name, or by a callable (parameters, lr).

    Raises:
        ValueError: the name is unknown.
    """
    if not isinstance(which, str):
        return which(parameters, lr)
    if which not in _OPTIMIZERS:
        raise ValueError(
            f"optimizer must be one of {', '.join(_OPTIMIZERS)}, or a callable (parameters, lr), "
            f"got {which!r}"
        )
    return _OPTIMIZERS[which](parameters, lr)


@torch.no_grad()
def total_norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all entries together; reading it waits for the device."""
    return float(norm_of(tensors))


@torch.no_grad()
def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """The same where the tensors are, (), float64."""
    squares = [tensor.detach().float().square().sum() for tensor in tensors]
    return torch.stack(squares or [torch.zeros(())]).double().sum().sqrt()


def weights_hash(tensors: Iterable[Tensor]) -> int:
    """64 bits that tell whether tensors are bit for bit the same on two machines.

    A sum of integers that wraps around: it does not depend on the device or the order of addition,
    but on every bit and its place.
    """
    sums = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().flatten()
        size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        bits = flat.view(size).long()
        places = torch.arange(1, len(bits) + 1, device=bits.device)
        # Odd multipliers that differ by place: a swap of two entries changes the sum.
        mixed = (bits + 0x632BE5AB) * (places * 0x1E3779B97F4A7C15 | 1)
        mixed = mixed ^ (mixed >> 29)
        sums.append(mixed.sum())
    total = 0
    for number, found in enumerate(sums, 1):  # read when all is under way: one wait
        total = (total * 0x100000001B3 + int(found) * (2 * number + 1)) % 2**64
    return total


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
