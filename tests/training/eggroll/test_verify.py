"""Models that reorder or mix the rows of their batch are found out in the first generation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffsteer.training.eggroll import Eggroll


class Turning(nn.Module):
    """Two layers; what ``turn`` does to the rows between them is undone before the end."""

    def __init__(self, turn=lambda x: x, back=lambda x: x) -> None:
        super().__init__()
        self.first, self.last, self.turn, self.back = nn.Linear(4, 4), nn.Linear(4, 4), turn, back

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.last(self.turn(self.first(x))))


TRICKS = {
    "turned round": (lambda x: x.flip(0), lambda x: x.flip(0)),
    "rolled": (lambda x: x.roll(1, 0), lambda x: x.roll(-1, 0)),
    "swapped copies": (lambda x: torch.cat([x[1::2], x[::2]]), lambda x: x),
    "mixed": (lambda x: x + 2 * x.mean(0, keepdim=True), lambda x: x),
}


def score(model: nn.Module, count: int) -> Tensor:
    rows = (torch.arange(24.0).view(6, 4).sin() + 1).repeat(count, 1)
    return model(rows).view(count, -1).mean(1)


@pytest.mark.parametrize("trick", TRICKS)
def test_rows_that_do_not_stay_with_their_member_are_refused(trick: str) -> None:
    torch.manual_seed(0)
    model = Turning(*TRICKS[trick]).eval()
    es = Eggroll(model, sigma=0.01, population_size=8)
    before = es.weights_hash()
    with pytest.raises(ValueError, match=r"Turning does not keep the rows .*mode='materialize'"):
        es.step(score)
    assert es.generation == 0 and es.weights_hash() == before
    assert Eggroll(model, sigma=0.01, population_size=8, mode="materialize").step(score).count == 8


@pytest.mark.parametrize("sigma", [1e-6, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd3", "dit", "unet"])
def test_networks_of_pipelines_pass(name: str, dtype: torch.dtype, sigma: float, network) -> None:
    net = network(name, dtype)
    es = Eggroll(net.model, sigma=sigma, population_size=4)
    for members in es.groups():  # with guidance: two copies
        with es.perturbed(members, rows_per_member=3):
            net(net.model, net.arguments(24))
    assert es.tell(torch.randn(4)).generation == 1


def test_it_is_looked_at_once() -> None:
    model, calls = Turning().eval(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    es = Eggroll(model, sigma=0.1, population_size=8, member_batch_size=4)
    es.step(score)
    assert len(calls) == 2 + 3  # the batches, and the first again with three choices of members
    es.step(score)
    assert len(calls) == 4 + 3


def test_outputs_without_rows_are_not_looked_at() -> None:
    class Mean(Turning):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": super().forward(x).mean(), "rows": torch.zeros(2)}

    es = Eggroll(Mean().eval(), sigma=0.1, population_size=4)
    es.step(lambda model, count: [float(model(torch.randn(8, 4))["loss"])] * count)
    assert es.generation == 1
