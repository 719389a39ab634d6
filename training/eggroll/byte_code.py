"""One byte for each pair of members: the sign and the logarithm of the difference of their scores.

After "Just One Byte (per gradient)" (arXiv 2306.10015), which sends the logarithm of one projected
gradient a worker. Here each message carries its own unit, so that any reward fits into a byte.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

__all__ = ["decode_differences", "encode_differences", "shape_differences", "spread_of"]

STEPS_PER_E = 16  # 16 codes for each factor of e: an error of 3.2 % at most
LEVELS = 127
MISSING = -128


def encode_differences(differences: Tensor) -> bytes:
    """Differences of pairs, (P,), NaN where there is none, as 4 + P bytes.

    The largest size is sent in float32; every other is the nearest of 127 sizes ``largest * exp(-k
    / 16)``, with its sign. Anything smaller than a 2600th of the largest becomes zero.
    """
    values = differences.detach().to("cpu", torch.float64)
    known = values.isfinite()
    largest = float(values[known].abs().max()) if bool(known.any()) else 0.0
    largest = struct.unpack("<f", struct.pack("<f", largest))[0]
    if largest <= 0:
        codes = torch.zeros_like(values)
    else:
        below = (largest / values.abs().clamp(min=1e-300)).log() * STEPS_PER_E
        size = LEVELS - below.round().clamp(0, LEVELS)  # 127 is the largest, 0 is zero
        codes = size * values.sign()
    codes = codes.where(known, torch.tensor(float(MISSING), dtype=torch.float64))
    return struct.pack("<f", largest) + codes.to(torch.int8).numpy().tobytes()


def decode_differences(message: bytes) -> Tensor:
    """The differences of a message, (P,), float64, NaN where there was none.

    Raises:
        ValueError: it is too short.
    """
    if len(message) < 4:
        raise ValueError(f"a message has at least 4 bytes, got {len(message)}")
    (largest,) = struct.unpack("<f", message[:4])
    codes = torch.frombuffer(bytearray(message[4:] or b"\0"), dtype=torch.int8)
    codes = codes[: len(message) - 4].double()
    size = largest * torch.exp((codes.abs() - LEVELS) / STEPS_PER_E)
    values = torch.where(codes == 0, torch.zeros_like(size), size * codes.sign())
    return values.masked_fill(codes == MISSING, float("nan"))


def spread_of(table: Tensor) -> float:
    """The mean square of the scores of some pairs about the mean of each prompt.

    What `shape_fitness` divides by the root of, seen from these pairs alone. With a single pair its
    own mean is all that is known, and counts as none.

    Args:
        table: (2P, Q), NaN where there is no score.
    """
    pairs = table.double().view(-1, 2, table.shape[1])
    half, middle = (pairs[:, 0] - pairs[:, 1]) / 2, pairs.mean(1)
    known = half.isfinite()
    if not bool(known.any()):
        return 0.0
    seen = known.sum(0)
    centred = middle - middle.where(known, 0.0).sum(0) / seen.clamp(min=1)
    # The mean is the pairs' own: of P squares about it, P - 1 count.
    squares = half.square() + centred.square() * seen / (seen - 1).clamp(min=1)
    return float(squares.where(known, 0.0).sum() / known.sum())


def shape_differences(differences: Tensor, spread: float) -> tuple[Tensor, int, float]:
    """Weights of the members from the differences of pairs alone.

    The z-score of `shape_fitness` without its centring, which cancels in a pair: half of the
    difference to either side, divided by the deviation.

    Args:
        differences: (P,), of the mean over prompts; NaN where there is none.
        spread: the square of the deviation, see ``spread_of``.

    Returns:
        Weights (2P,) float64, the number of members with a score, and the deviation.
    """
    known = differences.isfinite()
    values = differences.where(known, 0.0).double()
    deviation = math.sqrt(spread) if bool(values.any()) else 0.0
    half = values / (2 * deviation) if deviation > 0 else torch.zeros_like(values)
    return torch.stack([half, -half], 1).flatten(), 2 * int(known.sum()), deviation
