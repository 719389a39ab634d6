"""Ask a classifier along the trajectory, and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.step import Guidance, Step, needs_uncond
from ..core.tensors import sample_norm
from .checks import check_classifier, check_rule, one_label_a_sample
from .elucd import unit_pixels
from .gfcg import pixels, reference_class
from .labels import check_table, classify, own_labels, require_sound


@dataclass
class StageLogits:
    """What a classifier said at one stage of sampling.

    Attributes:
        ratio: the stage's noise-to-signal ratio.
        logits: (N, K), float32 on the CPU.
        labels: the wanted classes in the classifier's numbering, (N,).
        contrast: ``|denoised_c - denoised_r| / |denoised_c|`` with the reference class r, (N,);
            None where the model was not asked for it.
    """

    ratio: float
    logits: Tensor
    labels: Tensor
    contrast: Tensor | None = None

    def joined(self, other: StageLogits) -> StageLogits:
        """Both, one after the other; they must be of the same stage.

        Raises:
            ValueError: if the ratios differ.
        """
        if abs(self.ratio - other.ratio) > 1e-4 * abs(self.ratio) and self.ratio != other.ratio:
            raise ValueError(f"two noise levels in one stage: {self.ratio} and {other.ratio}")
        pair = (self.contrast, other.contrast)
        both = [value for value in pair if value is not None]
        return StageLogits(
            self.ratio,
            torch.cat([self.logits, other.logits]),
            torch.cat([self.labels, other.labels]),
            torch.cat(both) if len(both) == 2 else None,
        )


@dataclass(eq=False)
class ClassifierProbe:
    """Guides by ``rule``, and keeps what a classifier says of every step in ``stages``.

    Args:
        classifier: images to raw logits (B, K), in evaluation mode.
        rule: the guidance to run under; None is the conditional prediction.
        labels: wanted classes in the pipeline's numbering, (B,); None reads them from the
            pipeline's call.
        label_map: as for ``GradientFreeClassifierGuidance``.
        condition: the denoiser's label argument.
        decode: samples to the classifier's images; ``pixels`` of the denoised prediction by
            default, ``unit_pixels`` of the noisy sample with ``noisy``.
        noisy: classify the noisy sample instead of the denoised prediction.
        contrast: also measure how far apart the model's predictions for the wanted and for the
            reference class are: one evaluation more a step, for class-conditional models.

    Raises:
        TypeError: if the classifier is not callable or ``rule`` is no rule.
        ValueError: if the classifier is in training mode, or the label map is no good.
    """

    classifier: Callable[[Tensor], Tensor]
    rule: Guidance | None = None
    labels: Tensor | None = None
    label_map: Tensor | None = None
    condition: str = "class_labels"
    decode: Callable[[Tensor], Tensor] | None = None
    noisy: bool = False
    contrast: bool = False
    stages: list[StageLogits] = field(default_factory=list)

    commutes = False

    def __post_init__(self) -> None:
        """Check what can be checked before a run."""
        check_classifier(self.classifier)
        check_table(self.label_map)
        if self.rule is not None:
            check_rule("rule", self.rule)

    @property
    def moves(self) -> bool:
        """Whether the rule replaces the noisy sample."""
        return bool(getattr(self.rule, "moves", False))

    @property
    def needs_uncond(self) -> bool:
        """Whether the rule reads the unconditional prediction."""
        return self.rule is not None and needs_uncond(self.rule)

    def __call__(self, step: Step) -> Tensor:
        """The rule's guided prediction; what the classifier says goes into ``stages``.

        Raises:
            MissingPrediction: if there are no labels.
            ValueError: if labels or logits do not fit, or are no numbers.
        """
        if step.stage == 0:
            if step.index == 0:
                self.stages = []
            self.stages.append(self._judge(step))
        return step.cond if self.rule is None else self.rule(step)

    def _judge(self, step: Step) -> StageLogits:
        given = step.argument(self.condition) if self.labels is None else self.labels
        labels = one_label_a_sample(given, step.cond)
        shown, decode = step.cond, self.decode or pixels
        if self.noisy:
            shown, decode = step.x, self.decode or unit_pixels
        with torch.no_grad():
            logits = classify(self.classifier, decode(shown))
            table = None if self.label_map is None else self.label_map.to(logits.device)
            own, known = own_labels(labels, logits.shape[1], table)
            require_sound(labels, known, logits)
            contrast = None
            if self.contrast:
                reference = reference_class(logits, own)
                reference = reference if table is None else table[reference]
                other = step.predict(branch="cond", **{self.condition: reference})
                contrast = sample_norm(step.cond - other) / sample_norm(step.cond)
        ratio = step.level.ratio.flatten()[0]
        kept = None if contrast is None else contrast.float().cpu()
        return StageLogits(float(ratio), logits.float().cpu(), own.cpu(), kept)
