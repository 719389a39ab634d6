"""Where an output of zero lies among denoised predictions, for rules made for raw outputs."""

from __future__ import annotations

from torch import Tensor

from ..core.prediction import Kind, denoised_affine
from ..core.step import Step
from ..core.tensors import widen


def origin(step: Step, kind: Kind) -> Tensor:
    """The denoised sample that an output of zero means: ``A * x``.

    With ``denoised = A * x + B * output``, ``denoised - origin`` is B times the output: dot
    products, norms and standard deviations of outputs follow from it up to a factor that drops out
    of every ratio.

    Args:
        step: its ``x`` and ``level`` are read.
        kind: what the output means.

    Returns:
        Shape of ``step.x``, float32 or wider.
    """
    return denoised_affine(kind, step.level, step.x)[0] * widen(step.x)
