"""Counter-based random numbers: Philox4x32-10.

A draw is a pure function of (seed, position, stream), so an answer with a seed is the same whatever
shares its batch, on whichever worker, and after a restart. Source: Salmon, Moraes, Dror, Shaw,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MASK64 = (1 << 64) - 1

Words = npt.NDArray[np.uint64]


def philox4x32(counter: Words, key: Words) -> Words:
    """Random words `[N, 4]` (32 bits each, held in uint64) of `counter [N, 4]` under `key [N,
    2]`."""
    c0, c1, c2, c3 = counter.T
    k0, k1 = key.T
    for round_ in range(_ROUNDS):
        w0 = (k0 + np.uint64(round_ * _WEYL[0] & 0xFFFFFFFF)) & _LOW
        w1 = (k1 + np.uint64(round_ * _WEYL[1] & 0xFFFFFFFF)) & _LOW
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ w0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ w1, p0 & _LOW
    return np.stack([c0, c1, c2, c3], -1)


def uniforms(
    seeds: Sequence[int], positions: Sequence[int], *, stream: int = 0
) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per (seed, position), 52 bits each. Seeds may be any integers (taken
    modulo 2^64); `stream` separates uses that share both."""
    seed = np.array([s & _MASK64 for s in seeds], np.uint64)
    position = np.array(positions, np.uint64)
    lane = np.full(len(seed), stream, np.uint64)
    counter = np.stack([position & _LOW, position >> _SHIFT, lane, np.zeros_like(lane)], -1)
    words = philox4x32(counter, np.stack([seed & _LOW, seed >> _SHIFT], -1))
    bits = (words[:, 0] << np.uint64(20)) | (words[:, 1] >> np.uint64(12))
    uniform: npt.NDArray[np.float64] = bits.astype(np.float64) * 2.0**-52
    return uniform
