"""Chance, made of a seed and a name alone: the same numbers on every machine and version.

The generator is SplitMix64 (Steele, Lea, Flood 2014). Each use has a stream of its own, so that a
draw more in one place moves nothing in another: item i of a class has the same lengths at every
rate."""

from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from math import cos, exp, log, pi, sqrt

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_UNIT = 1.0 / (1 << 53)


class Draws:
    """A stream of numbers; `name` tells the streams of one seed apart."""

    __slots__ = ("_state",)

    def __init__(self, seed: int, name: str) -> None:
        digest = blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        self._state = int.from_bytes(digest, "little")

    def uniform(self) -> float:
        """Uniform in (0, 1): never 0, never 1."""
        state = self._state = (self._state + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        return (((state ^ (state >> 31)) >> 11) + 0.5) * _UNIT

    def exponential(self, mean: float) -> float:
        """Exponential with this mean."""
        return -mean * log(self.uniform())

    def normal(self) -> float:
        """Standard normal (Box and Muller; the second number is not kept)."""
        return sqrt(-2.0 * log(self.uniform())) * cos(2.0 * pi * self.uniform())

    def gamma(self, shape: float, scale: float) -> float:
        """Gamma with mean `shape * scale` (Marsaglia and Tsang 2000)."""
        if shape < 1.0:
            return self.gamma(shape + 1.0, scale) * exp(log(self.uniform()) / shape)
        d = shape - 1.0 / 3.0
        c = 1.0 / sqrt(9.0 * d)
        while True:
            x = self.normal()
            w = 1.0 + c * x
            v = w * w * w
            if v > 0.0 and log(self.uniform()) < 0.5 * x * x + d - d * v + d * log(v):
                return d * v * scale

    def pick(self, cumulative: Sequence[float]) -> int:
        """An index with the weights whose running sums are given (the last is their total)."""
        place = bisect_right(cumulative, self.uniform() * cumulative[-1])
        return min(place, len(cumulative) - 1)
