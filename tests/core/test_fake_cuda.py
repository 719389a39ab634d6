"""The device that is none refuses what CUDA refuses, and what makes the host wait."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fake_cuda import DeviceMismatch, FakeCuda, Refused
from torch import Tensor, nn

REFUSED: dict[str, tuple[type[Exception], Callable[[Tensor], object]]] = {
    "item": (Refused, lambda x: x.sum().item()),
    "bool": (Refused, lambda x: bool((x > 0).all())),
    "float": (Refused, lambda x: float(x[0, 0])),
    "tolist": (Refused, lambda x: x.tolist()),
    "cpu": (Refused, lambda x: x.cpu()),
    "to the host, unwaited for": (Refused, lambda x: x.to("cpu", non_blocking=True)),
    "boolean indices": (Refused, lambda x: x[x > 0]),
    "indices of the host": (Refused, lambda x: x[torch.tensor([0, 1])]),
    "nonzero": (Refused, lambda x: x.nonzero()),
    "a new tensor": (Refused, lambda x: torch.tensor([1.0], device=x.device)),
    "a new scalar": (Refused, lambda x: x.new_tensor(1.0)),
    "a copy to the device": (Refused, lambda x: torch.ones(3).to(x.device)),
    "eigh": (Refused, lambda x: torch.linalg.eigh(x @ x.T)),
    "float64": (Refused, lambda x: x.double()),
    "two devices": (DeviceMismatch, lambda x: x + torch.ones(4)),
    "a stack of two devices": (DeviceMismatch, lambda x: torch.stack([x[0, 0], torch.ones(())])),
    "written on the host": (DeviceMismatch, lambda x: torch.ones(()).mul_(x[0, 0])),
    "a generator of the host": (
        DeviceMismatch,
        lambda x: torch.randn(3, device=x.device, generator=torch.Generator()),
    ),
    "a generator of the device": (
        DeviceMismatch,
        lambda x: torch.randn(3, generator=torch.Generator("cuda")),
    ),
    "numpy": (TypeError, lambda x: x.numpy()),
    "integer products": (NotImplementedError, lambda x: x.long() @ x.long().T),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    error, call = REFUSED[name]
    with FakeCuda() as gpu, pytest.raises(error):
        call(gpu.put(torch.randn(3, 4)))


ALLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "a scalar of the host": lambda x: x * torch.tensor(2.0),
    "a copy to the device, unwaited for": lambda x: x + torch.ones(4).to("cuda", non_blocking=True),
    "full": lambda x: x + torch.full((4,), 2.0, device=x.device),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 1.0),
    "its own device": lambda x: x.to("cuda").to(x.device).cuda(),
    "indices of the device": lambda x: x[torch.arange(2, device="cuda")],
    "in place": lambda x: x.clone().mul_(2).squeeze_(),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_computes_the_rest(name: str) -> None:
    x = torch.randn(3, 4)
    with FakeCuda() as gpu:
        result = ALLOWED[name](gpu.put(x.clone()))
        assert result.is_cuda and result.device == torch.device("cuda", 0)
        held = gpu.fetch(result)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "cuda", lambda self: self)
        patch.setattr(Tensor, "to", lambda self, *_, **__: self)
        patch.setattr(torch, "arange", lambda n, device: torch.tensor(range(n)))
        patch.setattr(torch, "full", lambda size, value, device: torch.ones(size) * value)
        assert torch.equal(held, ALLOWED[name](x))


def test_says_where_the_host_waited_and_ends() -> None:
    with FakeCuda(waits=True) as gpu:
        assert gpu.put(torch.ones(3)).sum().item() == 3
    assert "test_fake_cuda.py" in gpu.events[0].where
    assert torch.ones(1).to("cpu").device.type == "cpu" and not torch.cuda.is_initialized()


def test_trains_a_module() -> None:
    with FakeCuda() as gpu:
        model = gpu.put(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)))
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        x = torch.randn(8, 4, device="cuda")
        before = gpu.fetch(model(x).detach())
        model(x).square().mean().backward()
        optimizer.step()
        assert not torch.equal(gpu.fetch(model(x).detach()), before)
