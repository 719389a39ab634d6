"""Calibrated guidance by an off-the-shelf classifier: EluCD (arXiv 2310.11311).

Formulas and presets are those of the authors' released code. The code shifts the mean of an
ancestral sampler, or the sample before a Heun step; here the same push is a shift of the *denoised*
prediction, so that every scheduler takes it. The form for deterministic samplers is a
reconstruction: the released one does not run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.step import Guidance, Step, needs_uncond
from ..core.tensors import per_sample, sample_norm, send, widen
from .checks import (
    check_choice,
    check_classifier,
    check_number,
    check_rule,
    one_label_a_sample,
)
from .elucd_schedule import direction_size, posterior_variance, sine_boost
from .labels import check_classes, check_table, classify, own_labels, require_sound

Form = Literal["score", "posterior", "direction"]


def clipped_pixels(denoised: Tensor) -> Tensor:
    """A pixel model's denoised sample as images in [0, 1], with the gradient of no clipping.

    Differentiated as it is, the clamp would give no gradient where a prediction leaves [-1, 1]; the
    released code clamps first and differentiates from there.
    """
    return (denoised + (denoised.clamp(-1, 1) - denoised).detach() + 1) / 2


def unit_pixels(sample: Tensor) -> Tensor:
    """``(x + 1) / 2`` without clipping: the noisy input of ``form="direction"``."""
    return (sample + 1) / 2


def calibrated_energy(
    logits: Tensor, labels: Tensor, *, joint: float = 1.0, marginal: float = 1.0
) -> Tensor:
    """``joint * f_y - logsumexp_i(marginal * f_i)``, shape (B,): what guidance climbs (spec E1).

    Equal temperatures of 1 are ``log p(y | x)``, plain classifier guidance; ``marginal`` = 0 climbs
    the logit of the class alone.

    Args:
        logits: *raw* classifier outputs f, (B, K). Log-softmax outputs give another method: with
            unequal temperatures a common offset of the logits counts.
        labels: (B,).
        joint: tau_1.
        marginal: tau_2.
    """
    wanted = logits.gather(1, labels[:, None])[:, 0]
    return joint * wanted - (marginal * logits).logsumexp(1)


def smooth_activations(module: nn.Module, beta: float) -> nn.Module:
    """A copy of ``module`` with every ReLU replaced by ``softplus(beta * z) / beta``.

    Args:
        module: any module tree; one ReLU that is used in several places stays one module.
            Functional calls of relu inside ``forward`` cannot be seen.
        beta: sharpness; the released presets use 3 and 5. Infinity returns a plain copy.

    Returns:
        A copy in evaluation mode, whose weights are frozen. The activation of z = 0 is log(2) /
        beta, so small values of beta cost accuracy.

    Raises:
        ValueError: if ``beta`` is not positive, or there is no ReLU to replace.
    """
    check_number("beta", beta, low=0.0, open_low=True, infinite=True, remedy="3 to 5 is usual")
    smooth = copy.deepcopy(module).eval().requires_grad_(False)
    if math.isinf(beta):
        return smooth
    found = 0
    for parent in list(smooth.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.ReLU, nn.ReLU6):
                setattr(parent, name, nn.Softplus(beta=beta))
                found += 1
    if isinstance(smooth, (nn.ReLU, nn.ReLU6)):
        return nn.Softplus(beta=beta)
    if not found:
        raise ValueError(
            f"{type(module).__name__} has no nn.ReLU to replace: it uses another activation, or "
            "calls relu as a function"
        )
    return smooth


@dataclass(frozen=True, eq=False)
class CalibratedClassifierGuidance:
    """Climb a classifier's calibrated energy, on top of a rule or of the conditional prediction.

    Args:
        classifier: images to *raw* logits (B, K), differentiable, in evaluation mode;
            ``smooth_activations`` first.
        scale: strength s; for ``form="direction"`` the largest push G, relative to the sample.
        rule: what it is added to; None is the conditional prediction.
        joint: tau_1 of ``calibrated_energy``; with ``marginal`` = 1 plain classifier guidance.
        marginal: tau_2.
        sine: gamma (or eta, for ``"direction"``), weight of the sine term of the schedule.
        form: ``"score"``: the denoised prediction moves by ``s (w / Sigma) sigma^2 / alpha * g``,
            for DDIM, flow and every other deterministic scheduler. ``"posterior"``: by ``s (w /
            Sigma) sigma'^2 / alpha' * g``, which moves the mean of an ancestral step by ``s w g``
            exactly. ``"direction"``: the sample moves by a push of fixed length before the step
            (EDM with Heun); costs one evaluation more for each branch.
        labels: wanted classes in the pipeline's numbering, (B,); None reads them from the
            pipeline's call.
        label_map: the pipeline's label of each class of the classifier, (K,); None if the same. See
            ``match_classes`` and ``check_label_map``.
        condition: the denoiser's label argument.
        decode: samples to the classifier's images, differentiable. By default images in [0, 1] from
            pixels in [-1, 1]: ``clipped_pixels`` of the denoised sample, or, for ``"direction"``,
            ``unit_pixels`` of the noisy sample at unit size. (The released code feeds [-1, 1].) For
            latent models ``image_decoder(pipe)``.
        classify_on: ``"denoised"``, the clean prediction, or ``"noisy"``: the sample itself, scaled
            to ``sqrt(alpha^2 + sigma^2) = 1`` as in variance-preserving models; exact for a
            classifier of noisy samples. ``"direction"`` always looks at the noisy sample.
        through_denoiser: take the gradient with respect to the noisy sample, through the denoiser
            (one more evaluation with its graph); else with respect to the denoised sample, as
            released.

    Raises:
        TypeError: if the classifier is not callable or ``rule`` is no rule.
        ValueError: if a number is out of range, the classifier is in training mode, or arguments
            exclude each other.

    Source: arXiv 2310.11311 and its code. Where we differ: the largest variance is that of the
    schedule and not of one pixel of one sample, and the push does not depend on other samples of
    the batch.
    """

    classifier: Callable[[Tensor], Tensor]
    scale: float = 1.0
    rule: Guidance | None = None
    joint: float = 1.0
    marginal: float = 0.5
    sine: float = 0.3
    form: Form = "score"
    labels: Tensor | None = None
    label_map: Tensor | None = None
    condition: str = "class_labels"
    decode: Callable[[Tensor], Tensor] | None = None
    classify_on: Literal["denoised", "noisy"] = "denoised"
    through_denoiser: bool = False

    commutes = False

    def __post_init__(self) -> None:
        """Check everything that can be checked before a run."""
        check_classifier(self.classifier)
        if self.rule is not None:
            check_rule("rule", self.rule)
            if getattr(self.rule, "moves", False) and self.form == "direction":
                raise ValueError("rule moves the sample, and form='direction' does so too; use one")
        check_number("scale", self.scale, low=0.0, remedy="0 is off")
        check_number("joint", self.joint, low=0.0, remedy="1 is plain classifier guidance")
        check_number("marginal", self.marginal, low=0.0, remedy="1 is plain classifier guidance")
        check_number("sine", self.sine, low=0.0, remedy="0 is off")
        check_choice("form", self.form, ("score", "posterior", "direction"))
        check_choice("classify_on", self.classify_on, ("denoised", "noisy"))
        if self.through_denoiser and (self.classify_on == "noisy" or self.form == "direction"):
            raise ValueError(
                "through_denoiser differentiates what the classifier sees of the denoised "
                "prediction, but here it sees the noisy sample; leave one of them out"
            )
        check_table(self.label_map)

    @property
    def moves(self) -> bool:
        """Whether the sample is replaced before the solver's step."""
        return self.form == "direction" or bool(getattr(self.rule, "moves", False))

    @property
    def needs_uncond(self) -> bool:
        """Whether the base rule reads the unconditional prediction."""
        return self.rule is not None and needs_uncond(self.rule)

    def __call__(self, step: Step) -> Tensor:
        """The guided prediction, shape of ``step.cond``; bit for bit the base rule's at scale 0.

        Raises:
            MissingPrediction: if labels or a needed evaluation are missing.
            ValueError: if the classifier's output does not fit, or ``form="posterior"`` is not told
                where the step leads.
        """
        if self.form == "direction":
            return self._push_sample(step)
        base = self._base(step)
        if self.scale == 0:
            return base
        gradient = self._gradient(step, base)
        alpha, sigma = step.level.over(base)
        if self.form == "posterior":
            if step.next_level is None:
                raise ValueError(
                    "this scheduler does not tell where its next step leads, which "
                    "form='posterior' needs; use form='score'"
                )
            alpha, sigma = step.next_level.over(base)
        # At pure noise the sample says nothing of the image, and the push has no finite form.
        reach = torch.where(alpha > 0, sigma**2 / alpha.clamp_min(1e-12), torch.zeros_like(sigma))
        weight = self.scale * self._boost(step).to(base.dtype) * reach
        return base + weight * gradient.to(base.dtype)

    def _base(self, step: Step) -> Tensor:
        return step.cond if self.rule is None else self.rule(step)

    def _boost(self, step: Step) -> Tensor:
        if self.sine == 0 or step.next_level is None:
            return torch.ones(())
        variance = posterior_variance(step.level, step.next_level)
        largest = torch.maximum(step.memory.get(id(self), variance), variance)
        step.memory[id(self)] = largest
        return sine_boost(step.index, step.count, self.sine, largest, variance)

    def _labels(self, step: Step) -> Tensor:
        labels = step.argument(self.condition) if self.labels is None else self.labels
        return one_label_a_sample(labels, step.cond)

    def _energy(self, step: Step, images: Tensor, labels: Tensor) -> Tensor:
        # One class has no probability to climb, but its logit may be any energy.
        logits = classify(self.classifier, images, least=2 if self.marginal else 1)
        table = None if self.label_map is None else send(self.label_map, logits.device)
        own, known = own_labels(labels, logits.shape[1], table)
        if ("seen", id(self)) not in step.memory:  # once a trajectory: this waits for the device
            if self.labels is None:  # labels of one's own may be of anything, e.g. of attributes
                check_classes(logits.shape[1], table, step.classes)
            require_sound(labels, known, logits)
            step.memory["seen", id(self)] = True
        return calibrated_energy(logits, own, joint=self.joint, marginal=self.marginal)

    def _gradient(self, step: Step, base: Tensor) -> Tensor:
        labels = self._labels(step)
        with torch.inference_mode(False), torch.enable_grad():
            if self.through_denoiser:
                leaf = step.x.detach().clone().requires_grad_()
                seen = step.predict(leaf, "cond")
            elif self.classify_on == "noisy":
                leaf = widen(step.x).detach().clone().requires_grad_()
                alpha, sigma = step.level.over(leaf)
                seen = leaf / torch.hypot(alpha, sigma)
            else:
                leaf = seen = base.detach().clone().requires_grad_()
            images = (self.decode or clipped_pixels)(seen)
            return _slope(self._energy(step, images, labels.clone()), leaf)

    def _push_sample(self, step: Step) -> Tensor:
        size = direction_size(step.index, step.count, self.scale, self.sine)
        if size == 0 or step.stage > 0:
            return self._base(step)
        x = widen(step.x)
        rms = per_sample(sample_norm(x) / math.sqrt(x[0].numel()), x)
        labels = self._labels(step)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = (x.detach() / rms.clamp_min(1)).clone().requires_grad_()
            images = (self.decode or unit_pixels)(leaf)
            gradient = _slope(self._energy(step, images, labels.clone()), leaf)
        length = per_sample(sample_norm(gradient) / math.sqrt(x[0].numel()), x)
        moved = x + size * rms * gradient / length.clamp_min(1e-12)
        guided = self._base(step.at(moved))
        step.move(moved)
        return guided


def _slope(energy: Tensor, leaf: Tensor) -> Tensor:
    if not energy.requires_grad:
        raise ValueError(
            "the classifier's logits do not depend differentiably on the sample: the classifier or "
            "decode runs without gradients (no_grad, inference_mode, a detached or uint8 image)"
        )
    (gradient,) = torch.autograd.grad(energy.sum(), leaf)
    return gradient
