"""The trained network and its reference: LoRA on one base, or all weights and a frozen copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .lora import add_lora, lora_layers, merged_state
from .sharding import whole

__all__ = ["Policy", "weights_digest"]


class Policy:
    """A denoiser under training, in evaluation mode throughout (no dropout, no label dropout).

    Args:
        module: the denoiser, changed in place.
        tune: "lora" or "full".
        rank: of the adapters.
        lora_alpha: their scale is ``lora_alpha / rank``.
        targets: names of the linear layers that get adapters, see `add_lora`.
        with_reference: whether the reference is needed; "full" then keeps a frozen copy.
        seed: of the adapters' first weights.

    Attributes:
        module: the denoiser.
        runner: what a forward pass with gradients is called through (DDP's wrapper, say).
        parameters: the trained ones, float32.
        dtype: of the base model.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        tune: str = "lora",
        rank: int = 16,
        lora_alpha: float = 16.0,
        targets: Sequence[str] = (),
        with_reference: bool = True,
        seed: int = 0,
    ) -> None:
        self.tune, self.module = tune, module.eval()
        self.dtype = next(module.parameters()).dtype
        self._frozen: nn.Module | None = None
        if tune == "lora":
            module.requires_grad_(False)
            self.targets = add_lora(module, rank=rank, alpha=lora_alpha, targets=targets, seed=seed)
        else:
            module.requires_grad_(True)
            if with_reference:
                self._frozen = copy.deepcopy(module).requires_grad_(False)
            nn.Module.float(module)
        self.runner: Callable[..., Any] = module

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [p for p in self.module.parameters() if p.requires_grad]

    @property
    def modules(self) -> list[nn.Module]:
        """The networks that run: the trained one, and the frozen copy if there is one."""
        return [self.module] if self._frozen is None else [self.module, self._frozen]

    @contextmanager
    def reference(self) -> Iterator[Callable[..., Any]]:
        """The reference model inside the block, without gradients.

        With LoRA it is the module itself with its adapters off, so no second copy is held.
        """
        with torch.no_grad():
            if self.tune == "full":
                if self._frozen is None:
                    raise RuntimeError("this policy was made without a reference")
                yield self._frozen
                return
            layers = lora_layers(self.module)
            wanted = {id(p): p.requires_grad for p in self.module.parameters()}
            for layer in layers:
                layer.enable_adapters(False)
            try:
                yield self.module
            finally:
                for layer in layers:
                    layer.enable_adapters(True)
                for parameter in self.module.parameters():  # switching adapters may change these
                    parameter.requires_grad_(wanted[id(parameter)])

    def state_dict(self) -> dict[str, Tensor]:
        """The trained parameters by name."""
        return {n: p.detach() for n, p in self.module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over trained parameters.

        Raises:
            ValueError: they are of another model or other LoRA targets.
        """
        mine = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        if mine.keys() != state.keys():
            odd = sorted(mine.keys() ^ state.keys())[:3]
            raise ValueError(f"the saved weights are of another model; differing: {odd}")
        for name, value in state.items():
            mine[name].copy_(value)

    @contextmanager
    def holding(self, state: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Other trained weights inside the block (averaged ones, say); None changes nothing."""
        if state is None:
            yield
            return
        before = {name: value.clone() for name, value in self.state_dict().items()}
        self.load_state_dict(state)
        try:
            yield
        finally:
            self.load_state_dict(before)

    def merged(self, *, keep: bool = True) -> dict[str, Tensor]:
        """The state dict of the bare network with the adapters added to its weights.

        Where the network is cut over ranks they call this together, and ``keep`` says which of them
        want it; the others get nothing.
        """
        if self.tune == "lora":
            return merged_state(self.module, keep=keep)
        state: dict[str, Tensor] = whole(self.module.state_dict(), keep=keep)
        return state if keep else {}


def weights_digest(module: nn.Module, *, samples: int = 64) -> str:
    """A fingerprint of a network: names, shapes and up to ``samples`` values of each parameter.

    It tells base models apart at the cost of a small read, and is no proof against tampering.
    """
    import hashlib

    digest = hashlib.blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        stride = max(1, value.numel() // samples)
        some = value.detach().reshape(-1)[::stride].double().cpu().contiguous()
        digest.update(f"{name}:{tuple(value.shape)};".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()
