"""What a paced device knows by itself: its time table, and the answer to every prompt.

Answers are made of hashes, so they are the same in every process and whatever else is computed
beside them. Nobody but the engine asks where an answer ends, and the engine tells by ending it.
"""

import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from struct import pack

import numpy as np
import numpy.typing as npt

from appliance.core.payload import Sampling
from appliance.core.profiles import Profile

Words = npt.NDArray[np.uint64]

MASK = (1 << 64) - 1
BASE = 0x9E3779B97F4A7C15
_DRAWS = 64
"""Tokens of an answer that are drawn at once."""


def mix(values: Words) -> Words:
    """Scatter 64-bit numbers: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = values * np.uint64(BASE)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class MixTable(dict[int, int]):
    """`mix` of single numbers, looked up once and kept."""

    def __missing__(self, value: int) -> int:
        self[value] = mixed = int(mix(np.array([value], dtype=np.uint64))[0])
        return mixed


def digest(*parts: bytes) -> int:
    """64 bits that name these strings of bytes, the same in every process."""
    state = blake2b(digest_size=8)
    for part in parts:
        state.update(pack("<I", len(part)))
        state.update(part)
    return int.from_bytes(state.digest(), "little")


class Pacer:
    """The time table of a device. A schedule, not a series of sleeps: delays do not add up."""

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, most_debt: float = 0.25
    ) -> None:
        """`most_debt`: seconds of delay that are caught up; more is forgiven, so that a process
        that was stopped does not rush afterwards."""
        self._clock = clock
        self._most_debt = most_debt
        self._due: float | None = None

    def begin(self) -> float:
        """When the step that is starting now has begun."""
        now = self._clock()
        if self._due is None or now - self._due > self._most_debt:
            return now
        return self._due

    def due(self, begun: float, seconds: float) -> float:
        """When that step ends, and the next one may begin."""
        self._due = begun + seconds
        return self._due

    def rest(self) -> None:
        """The device has nothing to do: the next step begins when it is asked for."""
        self._due = None


class Script:
    """The answer to one prompt: the token at each place, and the place where it ends."""

    def __init__(
        self,
        prompt: bytes,
        sampling: Sampling,
        *,
        vocabulary: Sequence[int],
        profile: Profile,
    ) -> None:
        name = digest(prompt)
        seed = sampling.seed & MASK if sampling.temperature > 0 else 0
        self._key = digest(pack("<QQ", name, seed))
        self._vocabulary = vocabulary
        self._drawn: list[int] = []
        self._end: int | None = None
        self._end_token = 0
        if sampling.eos_token_ids and not sampling.ignore_eos:
            # the odd multiple of 2^-54 lies inside (0, 1)
            quantile = ((name >> 11) * 2 + 1) / 2.0**54
            self._end = max(profile.answers.at(quantile), sampling.min_tokens)
            self._end_token = sampling.eos_token_ids[0]

    def token(self, place: int) -> int:
        """The token at this place of the answer, counted from 0."""
        if place == self._end:
            return self._end_token
        while place >= len(self._drawn):
            self._draw()
        return self._drawn[place]

    def choose(self, place: int, allowed: Sequence[int], ends: Sequence[int]) -> int:
        """The token at this place when only some may stand there: one of `allowed`, or of `ends`
        where nothing else is left or the answer has reached its length. One of both must be."""
        if ends and (not allowed or (self._end is not None and place >= self._end)):
            return ends[0]
        number = int(mix(np.array([place ^ self._key], dtype=np.uint64))[0])
        return allowed[number % len(allowed)]

    def _draw(self) -> None:
        begin = len(self._drawn)
        places = np.arange(begin, begin + _DRAWS, dtype=np.uint64)
        numbers = mix(places ^ np.uint64(self._key)) % np.uint64(len(self._vocabulary))
        self._drawn.extend(self._vocabulary[number] for number in numbers.tolist())
