"""Checks of the plain arguments of a class-conditional pipeline's call."""

from __future__ import annotations

import math
from collections.abc import Sequence

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_numbers(guidance_scale: float, steps: int, output_type: str) -> None:
    """Refuse a number or an output type that the call does not know.

    Raises:
        ValueError: the message names the argument.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(
            f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_inference_steps must be an integer of at least 1, got {steps!r}")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")


def check_callback_inputs(wanted: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names of tensors that a callback cannot be given.

    Raises:
        ValueError: the message names them.
    """
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs: only {list(known)} can be given, got {unknown}"
        )
