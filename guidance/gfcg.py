"""Gradient-free classifier guidance, a reconstruction (after arXiv 2411.15393).

Only the abstract of the paper and one description of its method could be read: a classifier in
inference mode names, at every step, a reference class and a guidance scale. Everything else here is
reconstructed from the identity ``denoised_c - denoised_r = sigma^2 / alpha * grad log(p_c / p_r)``,
which replaces the classifier's gradient by a second denoiser call. Results are to be labelled
"GFCG-style".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.step import Step
from ..core.tensors import per_sample
from .checks import (
    check_choice,
    check_classifier,
    check_interval,
    check_number,
    check_reached,
    one_label_a_sample,
)
from .labels import check_classes, check_table, classify, own_labels, require_sound

Mode = Literal["pair", "top", "miss", "binary", "const"]
Combine = Literal["alone", "cfg", "switch", "autoguidance"]
MODES = ("pair", "top", "miss", "binary", "const")


def pixels(denoised: Tensor) -> Tensor:
    """A pixel model's denoised sample as images in [0, 1]: the default ``decode``."""
    return (denoised.clamp(-1, 1) + 1) / 2


def reference_class(logits: Tensor, labels: Tensor) -> Tensor:
    """The most likely class other than the wanted one, shape (B,).

    Args:
        logits: raw classifier outputs, (B, K), K > 1.
        labels: wanted classes, (B,).
    """
    masked = logits.scatter(1, labels[:, None], -math.inf)
    return masked.argmax(1)


def confusion(
    logits: Tensor,
    labels: Tensor,
    reference: Tensor,
    *,
    mode: Mode = "pair",
    temperature: float = 1.0,
) -> Tensor:
    """How far the classifier is from the wanted class, in [0, 1], shape (B,), float32.

    With p = softmax(logits / temperature), c the wanted and r the reference class: ``"pair"``
    p_r / (p_c + p_r), the two-class weight, 1/2 at a tie; ``"top"`` p_r, the weight of r in the
    full classifier gradient; ``"miss"`` 1 - p_c; ``"binary"`` whether any class beats c;
    ``"const"`` 1. Where the logits are not finite (an image that overflowed) it is 0.

    Args:
        logits: (B, K).
        labels: (B,).
        reference: (B,), from ``reference_class``.
        mode: see above.
        temperature: fitted by calibration; an over-confident classifier makes every mode binary.
    """
    z = logits.float() / temperature
    z_c, z_r = (z.gather(1, index[:, None])[:, 0] for index in (labels, reference))
    if mode == "pair":
        value = torch.sigmoid(z_r - z_c)
    elif mode == "top":
        value = (z_r - z.logsumexp(1)).exp()
    elif mode == "miss":
        value = -torch.expm1(z_c - z.logsumexp(1))
    elif mode == "binary":
        value = (z_r > z_c).float()
    else:
        value = torch.ones_like(z_c)
    sound = torch.isfinite(logits).all(1)
    return torch.where(sound, value.clamp(0, 1), torch.zeros_like(value))


@dataclass(frozen=True, eq=False)
class GradientFreeClassifierGuidance:
    """Push away from the class that a classifier mistakes the sample for, as strongly as it does.

    Args:
        classifier: images to logits (B, K); called without gradients. A module must be in
            evaluation mode.
        scale: lambda, the weight of the class contrast; 0 is off.
        combine: ``"alone"``: ``cond + scale * phi * (cond - ref)``. ``"cfg"``: the same on top of
            classifier-free guidance of ``cfg_scale``. ``"switch"``: contrast where phi >=
            ``threshold``, classifier-free guidance elsewhere. ``"autoguidance"``: guidance of
            ``cfg_scale`` away from the weak model, which is given the reference class where phi >=
            ``threshold`` and the wanted class elsewhere; no more evaluations than autoguidance.
        mode: of ``confusion``.
        temperature: of ``confusion``.
        threshold: see ``combine``.
        dead_zone: phi below this is 0.
        cfg_scale: see ``combine``.
        labels: wanted classes in the pipeline's numbering, (B,); None reads them from the
            pipeline's call.
        condition: what makes the model conditional on the reference: the name of the denoiser's
            label argument; or, for a closed set of prompts, a table for each argument,
            ``{"encoder_hidden_states": (K, tokens, channels), ...}``, indexed by class; tables may
            be nested as the argument is. ``pipelines.prompt_conditions`` makes them.
        label_map: the pipeline's label of each class of the classifier, (K,); None if the same. See
            ``match_classes`` and ``check_label_map``.
        decode: denoised samples to the classifier's images; ``pixels`` for pixel models, an
            ``image_decoder(pipe)`` for latent ones.
        classify_on: ``"cond"``, or ``"previous"``: the last step's guided prediction.
        every: classify at every n-th step and hold the result in between.
        hysteresis: keep the last reference unless another is this many times as likely; 1 is off.
        low: no contrast at this sigma (noise-to-signal ratio) and below; the baseline goes on.
        high: no contrast above this sigma.

    Raises:
        TypeError: if the classifier is not callable, or a number is something else.
        ValueError: if a number is out of range, the classifier is in training mode, or the label
            map has duplicates.

    Source: arXiv 2411.15393, reconstruction; see the module. In multi-stage solvers the later
    stages reuse the first stage's classes and weights, so that a step follows one field.
    """

    classifier: Callable[[Tensor], Tensor]
    scale: float = 1.0
    combine: Combine = "alone"
    mode: Mode = "pair"
    temperature: float = 1.0
    threshold: float = 0.5
    dead_zone: float = 0.0
    cfg_scale: float = 1.0
    labels: Tensor | None = None
    condition: str | Mapping[str, Any] = "class_labels"
    label_map: Tensor | None = None
    decode: Callable[[Tensor], Tensor] = pixels
    classify_on: Literal["cond", "previous"] = "cond"
    every: int = 1
    hysteresis: float = 1.0
    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        """Check everything that can be checked before a run."""
        check_classifier(self.classifier)
        check_number("scale", self.scale, low=0.0, remedy="0 is off")
        check_number("cfg_scale", self.cfg_scale, remedy="1 is no guidance")
        check_number("temperature", self.temperature, low=0.0, open_low=True, remedy="1 is none")
        check_number("threshold", self.threshold, low=0.0, remedy="phi is in [0, 1]")
        check_number("dead_zone", self.dead_zone, low=0.0, high=1.0, remedy="0 is off")
        check_number("every", self.every, low=1, whole=True, remedy="1 classifies at every step")
        check_number("hysteresis", self.hysteresis, low=1.0, remedy="1 is off")
        check_choice("combine", self.combine, ("alone", "cfg", "switch", "autoguidance"))
        check_choice("mode", self.mode, MODES)
        check_choice("classify_on", self.classify_on, ("cond", "previous"))
        check_interval(self.low, self.high)
        if not isinstance(self.condition, str) and (self.labels is None or not self.condition):
            raise ValueError("a table of conditions needs labels, (B,), and at least one argument")
        check_table(self.label_map)

    commutes = False

    @property
    def needs_uncond(self) -> bool:
        """Whether the unconditional prediction is read, for classifier-free guidance."""
        return self.combine in ("cfg", "switch") and self.cfg_scale != 1

    def __call__(self, step: Step) -> Tensor:
        """The guided prediction, shape of ``step.cond``.

        Raises:
            MissingPrediction: if a needed prediction, label or weak model is missing.
            ValueError: if the classifier's output or the labels do not fit, or no step of the run
                lies between ``low`` and ``high``.
        """
        check_reached(step.ratios, self.low, self.high)
        memory = step.memory.setdefault(id(self), {})
        ratio = step.level.ratio
        # Without ends nothing is asked: a level on an accelerator would have to be waited for.
        ends = self.low > 0 or self.high < math.inf
        inside = not ends or bool(((ratio > self.low) & (ratio <= self.high)).all())
        if not inside or self.scale == 0:
            guided = self._baseline(step)
        else:
            reference, phi = self._judge(step, memory)
            guided = self._combine(step, reference, phi)
        if self.classify_on == "previous":
            memory["guided"] = guided.detach()
        return guided

    def _baseline(self, step: Step) -> Tensor:
        if self.combine == "alone" or self.cfg_scale == 1:
            return step.cond
        weak = step.weak() if self.combine == "autoguidance" else self._uncond(step)
        return step.cond + (self.cfg_scale - 1) * (step.cond - weak)

    def _uncond(self, step: Step) -> Tensor:
        return step.need_uncond(type(self).__name__)

    def _combine(self, step: Step, reference: Tensor, phi: Tensor) -> Tensor:
        cond, push = step.cond, per_sample(phi, step.cond).to(step.cond.dtype)
        if self.combine == "autoguidance" and self.cfg_scale == 1:
            return cond
        if self.combine == "autoguidance":
            confused = phi >= self.threshold
            label = torch.where(confused, reference, self._labels(step))
            weak = step.weak(**self._condition(step, label))
            return cond + (self.cfg_scale - 1) * (cond - weak)
        contrast = cond - step.predict(branch="cond", **self._condition(step, reference))
        if self.combine == "switch":
            confused = per_sample(phi >= self.threshold, cond)
            plain = torch.zeros_like(cond)
            if self.needs_uncond:
                plain = (self.cfg_scale - 1) * (cond - self._uncond(step))
            return cond + torch.where(confused, self.scale * push * contrast, plain)
        guided = cond + self.scale * push * contrast
        if self.needs_uncond:
            guided = guided + (self.cfg_scale - 1) * (cond - self._uncond(step))
        return guided

    def _labels(self, step: Step) -> Tensor:
        """The wanted classes in the pipeline's numbering."""
        if self.labels is None:  # then the condition is a name, see __post_init__
            return one_label_a_sample(step.argument(str(self.condition)), step.cond)
        return one_label_a_sample(self.labels, step.cond)

    def _classes(self, step: Step) -> int | None:
        """How many conditions there are to choose a reference from, where that is known."""
        if isinstance(self.condition, str):
            return step.classes
        return _rows(self.condition)

    def _condition(self, step: Step, labels: Tensor) -> dict[str, Any]:
        if isinstance(self.condition, str):
            return {self.condition: labels}
        memory = step.memory.setdefault(id(self), {})
        if "tables" not in memory:  # copied to the device once a trajectory
            memory["tables"] = _each(self.condition, lambda table: table.to(labels.device))
        rows: dict[str, Any] = _each(memory["tables"], lambda table: table[labels])
        return rows

    def _judge(self, step: Step, memory: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Reference labels in the pipeline's numbering and phi, held between classifications."""
        held: tuple[Tensor, Tensor] | None = memory.get("verdict")
        due = step.stage == 0 and step.index % int(self.every) == 0
        if held is not None and not due and held[1].shape[0] == step.cond.shape[0]:
            return held
        sample = memory.get("guided", step.cond)
        with torch.no_grad():
            logits = classify(self.classifier, self.decode(sample))
            table = self._table(memory, logits)
            labels = self._labels(step)
            wanted, known = own_labels(labels, logits.shape[1], table)
            if held is None:  # once a trajectory: this waits for the device
                check_classes(logits.shape[1], table, self._classes(step))
                require_sound(labels, known, logits)
            own = self._settle(reference_class(logits, wanted), logits, memory)
            phi = confusion(logits, wanted, own, mode=self.mode, temperature=self.temperature)
        phi = torch.where(phi < self.dead_zone, torch.zeros_like(phi), phi)
        verdict = (own if table is None else table[own], phi)
        memory["verdict"] = verdict
        return verdict

    def _table(self, memory: dict[str, Any], logits: Tensor) -> Tensor | None:
        """The label map on the classifier's device, copied once a trajectory."""
        if self.label_map is not None and "table" not in memory:
            memory["table"] = self.label_map.to(logits.device)
        return memory.get("table")

    def _settle(self, fresh: Tensor, logits: Tensor, memory: dict[str, Any]) -> Tensor:
        """Keep the last reference unless the new one is clearly more likely."""
        last = memory.get("own")
        if self.hysteresis > 1 and last is not None and last.shape == fresh.shape:
            z = logits.float() / self.temperature
            gain = (z.gather(1, fresh[:, None]) - z.gather(1, last[:, None]))[:, 0]
            fresh = torch.where(gain > math.log(self.hysteresis), fresh, last)
        memory["own"] = fresh
        return fresh


def _rows(table: Any) -> int:
    """The number of rows of a table, or of the first of several."""
    return _rows(next(iter(table.values()))) if isinstance(table, Mapping) else int(table.shape[0])


def _each(table: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``change`` of a table, or of each of several."""
    if isinstance(table, Mapping):
        return {name: _each(value, change) for name, value in table.items()}
    return change(table)
