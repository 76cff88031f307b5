"""How long answers are, learnt per class from those that ended.

Nobody knows the length of an answer before it ends, and `max_tokens` is only a bound that clients
set as they like. What can be known is how long the answers of a class have been: a histogram over
lengths, in buckets a quarter of an octave wide, in which old answers fade (each new one takes 1/200
of the weight of those before). A question may be conditional: an answer that has already
`emitted` tokens is longer than that, so only the part of the histogram above counts.

Until ten answers of a class are known, the missing ones are filled in from the answers of all
classes, and before there are ten of those from a log-normal guess.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import exp, inf, log, log2
from statistics import NormalDist

_PER_OCTAVE = 4
_NUM_BUCKETS = 20 * _PER_OCTAVE + 1
"""Up to a million tokens; the last bucket is open."""
_ENOUGH = 10.0
"""Answers after which a class stands for itself."""
_EDGES = tuple(2.0 ** (index / _PER_OCTAVE) for index in range(_NUM_BUCKETS + 1))
"""Bucket i holds lengths from edge i to edge i + 1."""


class _Histogram:
    """Weights of the buckets, and their running sums from below."""

    __slots__ = ("count", "sums", "weights")

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = list(weights)
        self.count = 0
        self.sums: list[float] | None = None

    def add(self, length: int, fading: float) -> None:
        bucket = min(_NUM_BUCKETS - 1, int(log2(max(1, length)) * _PER_OCTAVE + 1e-9))
        if self.count:
            self.weights = [weight * fading for weight in self.weights]
        self.weights[bucket] += 1.0
        self.count += 1
        self.sums = None


class AnswerLengths:
    """Lengths of answers by class. State: one histogram per class and one of all; `observe` alone
    changes them."""

    def __init__(self, *, median: float = 64.0, sigma: float = 1.0, memory: int = 200) -> None:
        """The guess before anything was seen (log-normal: median in tokens, standard deviation of
        the logarithm), and how many answers are remembered."""
        self._fading = 1.0 - 1.0 / memory
        guess = NormalDist(log(median), sigma)
        shares = [guess.cdf(log(edge)) for edge in _EDGES]
        self._guess = [high - low for low, high in pairwise(shares)]
        self._all = _Histogram([0.0] * _NUM_BUCKETS)
        self._classes: dict[str, _Histogram] = {}

    def observe(self, class_name: str, num_tokens: int) -> None:
        """An answer of this class ended with so many tokens."""
        if class_name not in self._classes:
            self._classes[class_name] = _Histogram([0.0] * _NUM_BUCKETS)
        self._classes[class_name].add(num_tokens, self._fading)
        self._all.add(num_tokens, self._fading)
        for histogram in self._classes.values():
            if histogram.count < _ENOUGH:
                histogram.sums = None  # it borrows from all

    def num_observed(self, class_name: str) -> int:
        """Answers of this class that ended."""
        histogram = self._classes.get(class_name)
        return 0 if histogram is None else histogram.count

    def at(self, class_name: str, quantile: float, emitted: int = 0) -> float:
        """The total length (tokens, more than `emitted`) below which this share (0 < quantile < 1)
        stays of the answers of this class that are longer than `emitted`. Grows with both."""
        sums = self._sums_of(class_name)
        low = _NUM_BUCKETS if emitted >= _EDGES[-1] else bisect_right(_EDGES, emitted) - 1
        total = sums[-1]
        below = _below(sums, low, emitted)
        rest = total - below
        if rest <= 1e-6 * total:
            return max(emitted + 1.0, emitted * (1.0 + quantile))
        wanted = below + quantile * rest
        bucket = min(bisect_right(sums, wanted) - 1, _NUM_BUCKETS - 1)
        width = sums[bucket + 1] - sums[bucket]
        share = (wanted - sums[bucket]) / width if width > 0.0 else 0.0
        length = _EDGES[bucket] * exp(share * log(2.0) / _PER_OCTAVE)
        return float(max(emitted + 1.0, length))

    def _sums_of(self, class_name: str) -> list[float]:
        """Running sums over the buckets, beginning with 0; never all zero."""
        histogram = self._classes.get(class_name, self._all)
        if histogram.sums is None:
            histogram.sums = list(accumulate(self._filled(histogram), initial=0.0))
        return histogram.sums

    def _filled(self, histogram: _Histogram) -> list[float]:
        """Weights with what is missing filled in."""
        missing = _ENOUGH - histogram.count
        if missing <= 0.0:
            return histogram.weights
        source = self._guess if histogram is self._all else self._filled(self._all)
        scale = missing / sum(source)
        pairs = zip(histogram.weights, source, strict=True)
        return [weight + scale * other for weight, other in pairs]


def _below(sums: Sequence[float], bucket: int, emitted: int) -> float:
    """Weight of the answers of at most `emitted` tokens, which lie up to this bucket."""
    if bucket < 0:
        return 0.0
    if bucket >= _NUM_BUCKETS:
        return sums[-1] if emitted < inf else 0.0
    share = log2(emitted / _EDGES[bucket]) * _PER_OCTAVE
    return sums[bucket] + min(1.0, share) * (sums[bucket + 1] - sums[bucket])
