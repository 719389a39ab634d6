"""CFG-MP and CFG-MP+: move the sample to where both branches agree more (arXiv 2601.21892).

Written from the authors' released code (order, step, gates); the safeguards of the acceleration are
ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..core.prediction import Level
from ..core.step import Guidance, Step, needs_uncond
from ..core.tensors import widen
from .anderson import Anderson
from .checks import check_choice, check_number, check_reached, check_rule

Velocity = Callable[[Tensor], Tensor]
Order = Literal["code", "paper"]


def manifold_operator(
    uncond: Velocity,
    cond: Velocity,
    x: Tensor,
    step_size: Tensor | float,
    *,
    twin: bool = False,
    first: Tensor | None = None,
) -> Tensor:
    """``G(x) = z + a v_cond(z)`` with ``z = x - a v_uncond(x)``, at one frozen noise level.

    A step against the unconditional flow, then a step along the conditional one: to first order an
    ascent on ``log p(class | x)`` by the gap of the two velocities. It is no projection: where both
    agree on ``v = r x`` it still scales x by ``1 - (a r)^2``.

    Args:
        uncond: the unconditional velocity, *towards the data*, at this level.
        cond: the conditional one.
        x: the sample in flow coordinates, ``(1 - sigma) * clean + sigma * noise``, (B, ...).
        step_size: a, () or (B,) or broadcastable.
        twin: use ``H(x) = z - a v_uncond(z)`` with ``z = x + a v_cond(x)`` instead.
        first: the first of the two velocities at ``x``, if it is known already.

    Returns:
        Shape of ``x``; two evaluations, one if ``first`` is given.
    """
    if twin:
        z = x + step_size * (cond(x) if first is None else first)
        return z - step_size * uncond(z)
    z = x - step_size * (uncond(x) if first is None else first)
    return z + step_size * cond(z)


def flow_sigma(level: Level) -> Tensor:
    """Sigma of the same sample rescaled to the straight path: ``sigma / (alpha + sigma)``.

    Any sample ``alpha * clean + sigma * noise`` divided by ``alpha + sigma`` lies on the straight
    path; on it Euler steps are DDIM steps. So this is the one noise level for all schedulers: 1 is
    pure noise, 0 is clean, and the t of the paper is 1 minus it.
    """
    return level.sigma / (level.alpha + level.sigma)


@dataclass(frozen=True)
class ManifoldProjectedGuidance:
    """Before each step, iterate the sample towards agreement of both branches; then apply ``rule``.

    CFG-MP is ``anderson=0`` (plain iteration), CFG-MP+ is ``anderson=1``. Each iteration costs two
    network evaluations, and one pair more re-evaluates the moved sample: ``2 + (2 K - 1) + 2``
    evaluations at a gated step with K iterations, ``2`` elsewhere (the authors' loop: ``2 K + 2``;
    it does not have a pipeline's prediction at the unmoved sample).

    Args:
        rule: the guidance applied at the moved sample; any that does not move it itself.
        iterations: K; 0 is off.
        anderson: window m of the acceleration; 0 for none. With one iteration it has no effect.
        above: iterate at steps whose flow sigma (see ``flow_sigma``) is greater than this. The
            paper's gates are ``t < 0.6`` for DiT, that is 0.4 here, and 0.6 for SD3.5.
        twin_above: use the twin operator H above this flow sigma; 1 never does.
        step_share: lambda; the operator's step as a share of the solver step.
        damping: beta of the acceleration.
        order: ``"code"``: before each step, with the share of the step to come. ``"paper"``: after
            each step, hence from the second on, with the share of the step just taken.

    Raises:
        TypeError: if ``rule`` is no guidance method, or a number is something else.
        ValueError: if a number is out of range, or ``rule`` moves the sample itself.

    Source: arXiv 2601.21892, with the operator and presets of the released code. Where we differ:
    relative ridge, clamp and fallback in the acceleration, per sample; any scheduler through
    ``flow_sigma``; in multi-stage solvers the sample moves at the first stage only.
    """

    rule: Guidance
    iterations: int = 2
    anderson: int = 1
    above: float = 0.4
    twin_above: float = 1.0
    step_share: float = 0.5
    damping: float = 1.0
    order: Order = "code"

    commutes = False
    moves = True

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_rule("rule", self.rule)
        if getattr(self.rule, "moves", False):
            raise ValueError(
                "rule moves the sample itself, so its prediction would be at another sample; "
                "put ManifoldProjectedGuidance outermost and only once"
            )
        for name in ("iterations", "anderson"):
            check_number(name, getattr(self, name), low=0, whole=True, remedy="0 is off")
        for name in ("above", "twin_above"):
            remedy = (
                "the gate is a flow sigma for every scheduler, 0 for clean samples, 1 for noise: "
                "give 1 - t for a flow time t, sigma / (alpha + sigma) for any other noise level"
            )
            check_number(name, getattr(self, name), low=0.0, high=1.0, remedy=remedy)
        check_number("step_share", self.step_share, low=0.0, open_low=True, remedy="0.5 is usual")
        check_number("damping", self.damping, low=0.0, open_low=True, high=1.0, remedy="1 is none")
        check_choice("order", self.order, ("code", "paper"))

    @classmethod
    def dit(cls, rule: Guidance, *, anderson: int = 1) -> ManifoldProjectedGuidance:
        """The released DiT script: K = 2 where t < 0.6."""
        return cls(rule, iterations=2, anderson=anderson, above=0.4)

    @classmethod
    def sd3(cls, rule: Guidance, *, anderson: int = 1) -> ManifoldProjectedGuidance:
        """The released SD3.5 script: K = 3 where sigma > 0.6, twin operator where sigma >= 0.95.

        Its operator steps to the middle of a grid of twice as many points, 0.46 to 0.48 of a step;
        this one 0.5.
        """
        return cls(rule, iterations=3, anderson=anderson, above=0.6, twin_above=0.95)

    @property
    def needs_uncond(self) -> bool:
        """Whether the unconditional prediction is read: by the iterations, or by ``rule``."""
        return self.iterations > 0 or needs_uncond(self.rule)

    def __call__(self, step: Step) -> Tensor:
        """The guided prediction at the moved sample; exactly ``rule``'s where nothing is moved.

        Raises:
            MissingPrediction: without an unconditional prediction, or without a way to evaluate.
            ValueError: if the adapter does not tell the size of the solver step, levels differ
                within the batch, no step of the run is above the gate, or the acceleration meets a
                solver that adds noise.
        """
        self._check_run(step)
        size = self._step_size(step)
        if size is None:
            return self.rule(step)
        moved = self._iterate(step, size)
        guided = self.rule(step.at(moved)).to(step.cond.dtype)
        step.move(moved)
        return guided

    def _check_run(self, step: Step) -> None:
        if self.iterations == 0 or self.above == 1:
            return
        check_reached(step.ratios, self.above / (1 - self.above), math.inf)
        if step.stochastic and self.anderson > 0 and self.iterations > 1:
            raise ValueError(
                "the scheduler adds noise at its steps, but the acceleration (anderson > 0) is "
                "made for a deterministic flow: use anderson=0 (CFG-MP), or a deterministic "
                "scheduler (DDIM with eta 0, Euler, DPM-Solver)"
            )

    def _step_size(self, step: Step) -> Tensor | None:
        """The operator's step in flow sigma, or None where nothing is to be moved."""
        if step.level.sigma.ndim:
            raise ValueError(
                "ManifoldProjectedGuidance needs one noise level for the whole batch, got "
                f"{tuple(step.level.sigma.shape)}"
            )
        now = flow_sigma(step.level)
        before = step.memory.get(id(self))
        if step.stage == 0:
            step.memory[id(self)] = now
        if self.iterations == 0 or step.stage != 0 or not bool(now > self.above):
            return None
        step.need_uncond(type(self).__name__)
        if self.order == "paper":
            return None if before is None else self.step_share * (before - now)
        if step.next_level is None:
            raise ValueError(
                "this scheduler does not tell where its next step leads, which order='code' needs; "
                "use order='paper'"
            )
        return self.step_share * (now - flow_sigma(step.next_level))

    def _iterate(self, step: Step, size: Tensor) -> Tensor:
        alpha, sigma = step.level.over(step.x)
        total = alpha + sigma
        noise_share = sigma / total

        def velocity(branch: Literal["cond", "uncond"]) -> Velocity:
            def at(y: Tensor) -> Tensor:
                return (step.predict(y * total, branch) - y) / noise_share

            return at

        twin = bool(flow_sigma(step.level) >= self.twin_above) and self.twin_above < 1
        y = widen(step.x) / total
        known = step.cond if twin else step.need_uncond(type(self).__name__)
        first: Tensor | None = (widen(known) - y) / noise_share
        advance = Anderson(window=self.anderson, damping=self.damping)
        a = size.to(y.dtype)  # (), on the CPU: a scalar mixes with any device
        for _ in range(int(self.iterations)):
            image = manifold_operator(
                velocity("uncond"), velocity("cond"), y, a, twin=twin, first=first
            )
            y, first = advance(y, image), None
        return y * total
