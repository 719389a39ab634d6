"""Adaptive projected guidance (Sadat, Hilliges and Weber, ICLR 2025, arXiv 2410.02416)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.step import Step
from ..core.tensors import per_sample, sample_norm, widen
from .checks import check_choice, check_number, check_pair
from .schedule import Scale, check_scale, scale_at

Form = Literal["paper", "uncond"]
_TINY = 1e-30  # keeps 0 / 0 out; far below any norm that float32 can tell from 0
BufferPolicy = Literal["per_step", "per_eval"]
Space = Literal["denoised", "output"]


def adaptive_projected(
    cond: Tensor,
    uncond: Tensor,
    scale: float | Tensor,
    *,
    eta: float = 0.0,
    radius: float = math.inf,
    momentum: float = 0.0,
    previous: Tensor | None = None,
    weight: Tensor | None = None,
    form: Form = "paper",
) -> tuple[Tensor, Tensor]:
    """Guidance whose update is averaged over steps, clipped in norm, and damped along ``cond``.

    In the order of the paper's Algorithm 1: ``m = cond - uncond + momentum * previous``; ``m`` is
    scaled down to norm ``radius`` if it is longer; its part along ``cond`` is multiplied by
    ``eta``; the result times ``scale - 1`` is added to ``cond``. The method is defined on
    *denoised* predictions: a projection does not commute with a change of parameterization. Norms
    and dot products run over all dimensions but the first.

    Args:
        cond: denoised prediction under the condition, (B, ...); also the axis of the projection.
        uncond: denoised prediction without it (or of a weak model), same shape.
        scale: 1 is no guidance; a number, or one value a sample, () or (B,).
        eta: how much of the part along ``cond`` is kept; 0 is the paper's method, 1 leaves it
            whole.
        radius: longest update, in units of the prediction; infinity for no clipping.
        momentum: weight of ``previous``; negative in the paper.
        previous: the second result of the last call, or None at the start of a trajectory.
        weight: optional mask that broadcasts over ``cond``; padded tokens with weight 0 take no
            part in norms and products.
        form: ``"paper"``, or ``"uncond"`` to add ``scale`` times the update to ``uncond``, as
            diffusers' guider does by default and as CFG++ needs it.

    Returns:
        The guided prediction, shape and dtype of ``cond``, and the running difference ``m``
        (unclipped, float32 or wider) to be given as ``previous`` to the next call.

    Where we differ: float32 sums in blocks instead of float64, in delta form, so that one pass over
    the data follows the products. Each prediction is read once, and the float32 copy of ``cond``
    three times: difference, both products at once, result. With ``form="paper"``, ``eta=1``, no
    radius and no momentum this is classifier-free guidance up to rounding.
    """
    check_pair(cond, uncond)
    start = widen(uncond).flatten(1)  # (B, d) from here on
    rows = _axis_and_difference(cond, start)
    axis, difference = rows[0], rows[1]
    weight = None if weight is None else weight.expand(cond.shape).flatten(1)
    if previous is not None and momentum != 0:
        difference.add_(previous.flatten(1), alpha=momentum)
    push = _push(scale - 1 if form == "paper" else scale, radius, difference, weight)
    guided = axis if form == "paper" else start
    if eta != 1:
        weighted = axis if weight is None else axis * weight
        square, along = (rows * weighted).sum(-1, keepdim=True).unbind()
        guided = torch.addcmul(guided, axis, push * (eta - 1) * (along / square.clamp_min(_TINY)))
        guided.addcmul_(difference, push)
    else:
        guided = torch.addcmul(guided, difference, push)
    return guided.to(cond.dtype).view(cond.shape), difference.view(cond.shape)


def _axis_and_difference(cond: Tensor, start: Tensor) -> Tensor:
    """``cond`` and ``cond - start`` as two rows, (2, B, d): one pass then gives both products."""
    if torch.is_grad_enabled():  # autograd cannot write into a given place
        axis = widen(cond).flatten(1)
        return torch.stack([axis, axis - start])
    rows = start.new_empty(2, *start.shape)
    rows[0].copy_(cond.flatten(1))
    torch.sub(rows[0], start, out=rows[1])
    return rows


def _push(
    amount: float | Tensor, radius: float, difference: Tensor, weight: Tensor | None
) -> Tensor:
    """``amount``, lowered where the difference is longer than the radius; (1, 1) or (B, 1)."""
    if isinstance(amount, Tensor):
        amount = per_sample(amount.to(difference), difference)
    if radius < math.inf:
        radius = max(radius, _TINY)
        norm = sample_norm(difference, weight)[:, None]
        return norm.clamp_min(radius).reciprocal() * (amount * radius)
    if isinstance(amount, Tensor):
        return amount
    return difference.new_full((1, 1), amount)  # filled on the device: a copied scalar would sync


@dataclass(frozen=True)
class AdaptiveProjectedGuidance:
    """Classifier-free guidance for high scales: clipped, and without the part that only saturates.

    Args:
        scale: as in classifier-free guidance; 1 is no guidance. A number or a schedule.
        eta: how much of the update along the conditional prediction is kept; 0 recommended.
        radius: longest update as an absolute norm, as papers and other programs give it. It belongs
            to one latent size: never carry it to another. ``math.inf`` for no clipping.
        relative_radius: longest update in units of ``latent_std * sqrt(elements of a sample)``.
            Exactly one of both counts: giving ``radius`` replaces the default of this one.
        momentum: weight of the earlier updates, -0.75 to -0.25 recommended; 0 for few-step models.
        latent_std: standard deviation of clean samples: 1 for most latents, 0.5 for EDM2's latents
            and about 0.5 for pixels in [-1, 1]. Used with ``relative_radius`` only.
        buffer_policy: ``"per_step"``: in a multi-stage solver (Heun, Runge-Kutta) the first stage
            of a step commits to the memory and later stages only read it. ``"per_eval"``: every
            model call commits, which is the paper's listing to the letter.
        form: see ``adaptive_projected``.
        space: ``"denoised"`` (the paper's method) or ``"output"``: act on the network's raw output,
            whatever it means; only to repeat what other programs do.

    Raises:
        TypeError: if a number is something else.
        ValueError: if a number is NaN or out of range, or two radii are given.

    Source: arXiv 2410.02416, Algorithm 1. The relative radius, its default of 0.05 and ``per_step``
    are ours: 2.5 for EDM2-512 is 0.039 and 15 for SDXL-1024 is 0.059 in these units.
    """

    scale: Scale = 8.0
    eta: float = 0.0
    radius: float | None = None
    relative_radius: float | None = 0.05
    momentum: float = -0.5
    latent_std: float = 1.0
    buffer_policy: BufferPolicy = "per_step"
    form: Form = "paper"
    space: Space = "denoised"

    def __post_init__(self) -> None:
        """Refuse numbers out of range; an explicit radius takes the place of the default one."""
        check_scale(self.scale)
        check_number("eta", self.eta, remedy="0 drops the parallel part, 1 keeps it")
        if self.radius is not None and self.relative_radius == 0.05:
            object.__setattr__(self, "relative_radius", None)
        if (self.radius is None) == (self.relative_radius is None):
            raise ValueError(
                "give exactly one of radius and relative_radius, got "
                f"radius={self.radius} and relative_radius={self.relative_radius}; "
                "set the other to None"
            )
        for name in ("radius", "relative_radius"):
            if getattr(self, name) is not None:
                check_number(
                    name,
                    getattr(self, name),
                    low=0.0,
                    open_low=True,
                    infinite=True,
                    remedy="use math.inf for no clipping",
                )
        check_number(
            "momentum",
            self.momentum,
            low=-1.0,
            high=1.0,
            open_low=True,
            open_high=True,
            remedy="-0.75 to -0.25 is usual, 0 is off, and outside the sum diverges",
        )
        check_number(
            "latent_std",
            self.latent_std,
            low=0.0,
            open_low=True,
            remedy="1 for most latents, 0.5 for EDM2 and for pixels in [-1, 1]",
        )
        check_choice("buffer_policy", self.buffer_policy, ("per_step", "per_eval"))
        check_choice("form", self.form, ("paper", "uncond"))
        check_choice("space", self.space, ("denoised", "output"))

    @classmethod
    def from_diffusers(
        cls,
        guidance_scale: float = 7.5,
        adaptive_projected_guidance_momentum: float | None = None,
        adaptive_projected_guidance_rescale: float = 15.0,
        eta: float = 1.0,
        use_original_formulation: bool = False,
    ) -> AdaptiveProjectedGuidance:
        """What diffusers' ``AdaptiveProjectedGuidance`` guider does with these arguments.

        The guider acts on raw outputs, so the result has ``space="output"``. To go on to the
        paper's method, ``replace(rule, space="denoised", form="paper", radius=None,
        relative_radius=0.05)`` and choose the scale anew. The guider's ``guidance_rescale``,
        ``norm_dim``, ``start`` and ``stop`` have no counterpart here; for the last two see
        ``GuidanceInterval``.

        Args:
            guidance_scale: the weight W of the update; with ``use_original_formulation`` the scale
                is W + 1.
            adaptive_projected_guidance_momentum: None is no momentum.
            adaptive_projected_guidance_rescale: the radius; 0 is none.
            eta: weight of the parallel part.
            use_original_formulation: whether the update is added to the conditional prediction.

        Raises:
            TypeError: if a number is something else.
            ValueError: if a number is NaN or out of range.
        """
        rescale = adaptive_projected_guidance_rescale
        return cls(
            scale=guidance_scale + 1 if use_original_formulation else guidance_scale,
            eta=eta,
            radius=rescale if rescale > 0 else math.inf,
            momentum=adaptive_projected_guidance_momentum or 0.0,
            buffer_policy="per_eval",
            form="paper" if use_original_formulation else "uncond",
            space="output",
        )

    @property
    def commutes(self) -> bool:
        """Whether adapters should hand over raw outputs: only to repeat other programs."""
        return self.space == "output"

    def radius_for(self, sample: Tensor) -> float:
        """The absolute radius for predictions of this shape, (B, ...)."""
        if self.relative_radius is not None:
            return self.relative_radius * self.latent_std * math.sqrt(math.prod(sample.shape[1:]))
        return math.inf if self.radius is None else self.radius

    @property
    def needs_uncond(self) -> bool:
        """Whether the unconditional prediction is read: not at a constant scale of 1."""
        return self.scale != 1

    def __call__(self, step: Step) -> Tensor:
        """The guided prediction, shape of ``step.cond``; exactly ``step.cond`` at scale 1.

        Raises:
            MissingPrediction: if the scale is not 1 and the step has no unconditional prediction.
        """
        scale = scale_at(self.scale, step)
        if scale == 1:  # nothing to add; what the memory holds is left as it is
            return step.cond
        return self.update(step, step.need_uncond(type(self).__name__), scale)

    def update(self, step: Step, reference: Tensor, scale: float) -> Tensor:
        """Push away from ``reference``, keeping the running difference in ``step.memory``."""
        before, latest = step.memory.get(id(self), (None, None))
        if step.stage == 0 or self.buffer_policy == "per_eval":
            before = latest
        if before is not None and before.shape != step.cond.shape:
            before = None  # another resolution: what was seen there has no place here
        guided, difference = adaptive_projected(
            step.cond,
            reference,
            scale,
            eta=self.eta,
            radius=self.radius_for(step.cond),
            momentum=self.momentum,
            previous=before,
            form=self.form,
        )
        if self.momentum != 0:
            commits = step.stage == 0 or self.buffer_policy == "per_eval"
            step.memory[id(self)] = (before, difference.detach() if commits else latest)
        return guided
