"""Between the scheduler's prediction space and the denoised space, at one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.prediction import Kind, denoised_affine, from_denoised, to_denoised
from ..core.tensors import widen
from .levels import LevelReading


class Space:
    """Conversions at one sample and level, with the pair of ``denoised = A * x + B * output`` kept.

    Args:
        reading: what the scheduler takes.
        x: the noisy sample, (B, ...).

    ``denoised`` and ``output`` work in float32 or wider. Where the level is one number for the
    batch, A and B are Python floats: no tensor is made for them and nothing waits for the device.
    """

    def __init__(self, reading: LevelReading, x: Tensor) -> None:
        self.reading, self.x = reading, x
        a, b = denoised_affine(reading.kind, reading.level, x)
        b = b * reading.sign
        self.direct = reading.kind == Kind.DENOISED
        self.a: Any = float(a) if _is_number(a) else a
        self.b: Any = float(b) if _is_number(b) else b
        self._scaled_x: Tensor | None = None

    def check(self) -> None:
        """Refuse levels at which the output says nothing about the clean sample.

        Raises:
            ValueError: for a noise prediction at alpha = 0 (zero terminal SNR).
        """
        if isinstance(self.b, float) and not abs(self.b) < 1e7:
            raise ValueError(
                "the scheduler predicts noise at a level without signal (zero terminal SNR "
                "with prediction_type='epsilon'), where the denoised sample is undefined; use "
                "a scheduler with prediction_type='v_prediction', or "
                "rescale_betas_zero_snr=False"
            )

    def denoised(self, output: Tensor, x: Tensor | None = None) -> Tensor:
        """The denoised sample that ``output`` implies at ``x``, by default the step's sample."""
        if self.direct:
            return widen(output)
        scaled = self._over_x() if x is None else widen(x) * self.a
        if isinstance(self.b, float):
            return torch.add(scaled, output, alpha=self.b)
        return scaled + self.b * widen(output)

    def output(
        self, guided: Tensor, cond: Tensor, cond_denoised: Tensor, moved: Tensor | None = None
    ) -> Tensor:
        """The output that implies ``guided`` at ``x`` (or at ``moved``), as a change of ``cond``.

        Dividing the change by B keeps all digits near sigma = 0, where
        ``(x - denoised) / sigma`` loses them. At sigma = 0 itself (levels of the user's own that
        end there) no output changes the denoised sample, and it stays ``cond``.
        """
        if self.direct:
            return guided
        change = guided - cond_denoised
        if moved is not None:
            change = change - self.a * (widen(moved) - widen(self.x))
        if isinstance(self.b, float):
            return torch.add(widen(cond), change, alpha=1 / self.b if self.b else 0.0)
        return widen(cond) + (change / self.b).where(self.b != 0, 0.0)

    def _over_x(self) -> Tensor:
        if self._scaled_x is None:
            unscaled = isinstance(self.a, float) and self.a == 1
            self._scaled_x = widen(self.x) if unscaled else widen(self.x) * self.a
        return self._scaled_x


def _is_number(value: Tensor) -> bool:
    return value.numel() == 1 and value.device.type == "cpu"


def as_scheduled(output: Tensor, network: Kind | None, reading: LevelReading, x: Tensor) -> Tensor:
    """A network output in the scheduler's kind, for pipelines that convert it.

    The same float32 operations as such a pipeline does, so that plain guidance stays bit-exact. An
    output of a doubled batch has the rows of ``x`` twice.
    """
    if network is None or network == reading.kind:
        return output
    x = x if len(x) == len(output) else torch.cat([x, x])
    denoised = to_denoised(widen(output), network, x, reading.level)
    return from_denoised(denoised, reading.kind, x, reading.level)
