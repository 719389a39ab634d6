"""Features on which the peers' values in tests/eval/golden.json were computed.

numpy only, and elementwise IEEE operations only (no BLAS, no libm), so that the float32 bytes are
the same on every platform; the tests check their sha256.
"""

from __future__ import annotations

import numpy as np


def _random(seed):
    return np.random.Generator(np.random.PCG64(seed))


def base():
    g, d = _random(20250101), 64
    real, fake = g.standard_normal((2000, d)), g.standard_normal((1600, d))
    scale, j = 1.0 / np.sqrt(1.0 + np.arange(d)), np.arange(d)
    r = real.copy()
    r[:, 1:] += 0.5 * real[:, :-1]
    r = r * scale + 0.1
    f = fake.copy()
    f[:, 1:] += 0.4 * fake[:, :-1]
    f = 0.9 * f * scale + 0.1 + 0.05 * ((j % 3) - 1)
    return r.astype(np.float32), f.astype(np.float32)


def lowrank():
    g = _random(20250102)
    real, fake = g.standard_normal((60, 128)), g.standard_normal((80, 128))
    scale = 1.0 / (1.0 + np.arange(128) / 16.0)
    return (real * scale).astype(np.float32), (1.1 * fake * scale + 0.05).astype(np.float32)


def dups():
    g = _random(20250103)
    a = g.standard_normal((40, 16))
    b = a[:30] + 0.05 * g.standard_normal((30, 16))
    fake = np.repeat(np.concatenate([a[30:], b]), 5, axis=0)
    return np.repeat(a, 5, axis=0).astype(np.float32), fake.astype(np.float32)


def ones():
    return np.ones((64, 16), np.float32), np.ones((64, 16), np.float32)


def logits():
    return ((2.0 * _random(20250104).standard_normal((1003, 50))).astype(np.float32),)


def offset():
    g = _random(20250105)
    real = np.abs(g.standard_normal((20000, 32))) * 0.3 + 100.0
    fake = np.abs(g.standard_normal((20000, 32))) * 0.3 + 100.0
    return real.astype(np.float32), fake.astype(np.float32)


SETS = {f.__name__: f for f in (base, lowrank, dups, ones, logits, offset)}
