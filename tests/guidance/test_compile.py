"""The mathematics of every rule is one graph: nothing in it asks for a value or falls back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffsteer.guidance import adaptive_projected, calibrated_energy, classifier_free
from diffsteer.guidance.anderson import anderson_mix
from diffsteer.guidance.cfgmp import manifold_operator
from diffsteer.guidance.cfgzero import zero_star
from diffsteer.guidance.degraded_pass import away_from_degraded
from diffsteer.guidance.elucd import clipped_pixels
from diffsteer.guidance.frequency import frequency_decoupled
from diffsteer.guidance.gfcg import confusion, pixels, reference_class
from diffsteer.guidance.rescale import rescaled

SHAPE = (2, 4, 8, 8)
LABELS = torch.tensor([1, 2])


def logits_of(x: Tensor) -> Tensor:
    return 3 * x.flatten(1)[:, :5]


def judged(cond: Tensor, uncond: Tensor) -> Tensor:
    logits = logits_of(pixels(cond))
    return confusion(logits, LABELS, reference_class(logits, LABELS), mode="pair")


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "anderson_mix": lambda c, u: anderson_mix([c, u, c + 0.1 * u], [u, c, c - u]),
    "apg": lambda c, u: adaptive_projected(c, u, 4.0, radius=1.0, momentum=-0.5, previous=u)[0],
    "cfg": lambda c, u: classifier_free(c, u, 4.0),
    "cfg, one scale a sample": lambda c, u: classifier_free(c, u, torch.tensor([2.0, 4.0])),
    "cfg-mp": lambda c, u: manifold_operator(lambda x: x * u, lambda x: x * c, c, 0.1),
    "cfg-zero": lambda c, u: zero_star(c, u, 4.0),
    "degraded pass": lambda c, u: away_from_degraded(c, c, u, 2.0),
    "elucd": lambda c, u: calibrated_energy(logits_of(clipped_pixels(c)), LABELS, marginal=0.5),
    "frequency": lambda c, u: frequency_decoupled(c, u, 2.0, 6.0),
    "gfcg": judged,
    "rescale": lambda c, u: rescaled(u, c, 0.7),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_without_a_graph_break(name: str) -> None:
    cond, uncond = torch.randn(2, *SHAPE)
    compiled = torch.compile(FUNCTIONS[name], backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(cond, uncond), FUNCTIONS[name](cond, uncond))
