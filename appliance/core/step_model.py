"""How long a step lasts: predicted from what is in it, fitted to the steps that were seen.

Four counts say what a step does: `n` prompt tokens computed, `P` pairs of (computed prompt token,
token it attends to), `B` sequences in decode, `K` tokens of their context; from them `R`, the
tokens whose KV is read. The time is a plane over these, every coefficient at least zero.
"""

from collections.abc import Sequence

from appliance.core.types import Record

_SIZE = 5
_SCALES = (1.0, 256.0, 65536.0, 16.0, 16384.0)
"""Typical counts, so that no coefficient is tiny beside another."""


class StepCoefficients(Record, frozen=True, kw_only=True):
    """What a step model has learnt: seconds per (step, prompt token, pair, decode, context token)
    for each plane, of which the longest holds; and the tail factors of steps without and with
    prefill."""

    planes: tuple[tuple[float, float, float, float, float], ...]
    tail_decode: float = 1.0
    tail_prefill: float = 1.0


class PredictionError(Record, frozen=True, kw_only=True):
    """Relative error of predictions, each made before its step was seen."""

    mean_relative: float
    p90_relative: float
    num_steps: int


DEFAULT_COEFFICIENTS = StepCoefficients(planes=((0.004, 5e-5, 1e-9, 1e-5, 3e-8),))
"""Before anything is known, so that an order between steps always exists."""


class StepModel:
    """Seconds of a step, and tokens that fit into seconds. `observe` alone changes it, so equal
    steps give equal answers."""

    def __init__(self, start: StepCoefficients | None = None) -> None:
        """`start`: what a profile found; None: a guess that the first step corrects."""
        known = start or DEFAULT_COEFFICIENTS
        self._known = known
        self._num = 0
        self._a = [[0.0] * _SIZE for _ in range(_SIZE)]
        self._b = [0.0] * _SIZE
        self._plane = [c * s for c, s in zip(known.planes[0], _SCALES, strict=True)]
        self._tail = max(1.0, known.tail_decode, known.tail_prefill)
        self._mean_error = 0.0
        self._p90_error = 0.0

    def observe(
        self,
        *,
        prefill_tokens: int,
        prefill_pairs: int,
        decodes: int,
        context_tokens: int,
        elapsed: float,
    ) -> None:
        """Learn from one step: prompt tokens computed, pairs of them with what they attend to,
        sequences in decode, tokens of their context, seconds."""
        if elapsed <= 0.0 or not (prefill_tokens or decodes):
            return
        prefix = 0.0
        if prefill_tokens:
            prefix = max(0.0, prefill_pairs / prefill_tokens - (prefill_tokens + 1) / 2)
        x = (
            1.0,
            prefill_tokens / _SCALES[1],
            prefill_pairs / _SCALES[2],
            decodes / _SCALES[3],
            (context_tokens + prefix) / _SCALES[4],
        )
        predicted = sum(c * f for c, f in zip(self._plane, x, strict=True))
        self._note(elapsed / predicted)
        if self._num == 0 and self._known is DEFAULT_COEFFICIENTS:
            self._plane = [c * elapsed / predicted for c in self._plane]
        self._num += 1
        self._fit(x, elapsed)

    def _note(self, ratio: float) -> None:
        error = abs(1.0 / ratio - 1.0)
        rate = max(0.01, 1.0 / (self._num + 1))
        self._mean_error += rate * (error - self._mean_error)
        self._p90_error += rate * error * (0.9 if error > self._p90_error else -0.1)
        self._tail = max(1.0, self._tail + 0.02 * (0.9 if ratio > self._tail else -0.1))

    def _fit(self, x: Sequence[float], elapsed: float) -> None:
        weight = 1.0 / (elapsed * elapsed)
        for i, row in enumerate(self._a):
            f = weight * x[i]
            for j in range(_SIZE):
                row[j] = 0.99 * row[j] + f * x[j]
            self._b[i] = 0.99 * self._b[i] + f * elapsed
        plane = self._plane
        for i, row in enumerate(self._a):
            if row[i] > 0.0:
                slope = self._b[i] - sum(a * c for a, c in zip(row, plane, strict=True))
                plane[i] = max(0.0, plane[i] + slope / row[i])

    def seconds(
        self,
        *,
        prefill_tokens: int = 0,
        prefix_tokens: int = 0,
        decodes: int = 0,
        context_tokens: int = 0,
    ) -> float:
        """Expected duration of a step that computes `prefill_tokens` after `prefix_tokens` of
        their prompt, beside `decodes` sequences with `context_tokens` in all. Grows with each."""
        n = prefill_tokens
        pairs = n * prefix_tokens + n * (n + 1) / 2
        read = context_tokens + (prefix_tokens if n else 0)
        x = (1.0, n, pairs, decodes, read)
        scaled = zip(self._plane, x, _SCALES, strict=True)
        return sum(c * f / s for c, f, s in scaled)

    def tail_seconds(
        self,
        *,
        prefill_tokens: int = 0,
        prefix_tokens: int = 0,
        decodes: int = 0,
        context_tokens: int = 0,
    ) -> float:
        """What nine of ten such steps stay under: what policies steer by."""
        return self.tail * self.seconds(
            prefill_tokens=prefill_tokens,
            prefix_tokens=prefix_tokens,
            decodes=decodes,
            context_tokens=context_tokens,
        )

    def tokens_within(
        self,
        seconds: float,
        *,
        prefix_tokens: int = 0,
        decodes: int = 0,
        context_tokens: int = 0,
        most: int = 1 << 20,
    ) -> int:
        """The most prompt tokens, up to `most`, with which the step stays within `seconds` (by
        `tail_seconds`); 0 when not one fits."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            tail = self.tail_seconds(
                prefill_tokens=middle,
                prefix_tokens=prefix_tokens,
                decodes=decodes,
                context_tokens=context_tokens,
            )
            if tail <= seconds:
                low = middle
            else:
                high = middle - 1
        return low

    def prompt_seconds(
        self,
        num_tokens: int,
        *,
        prefix_tokens: int = 0,
        chunk: int = 1 << 20,
        decodes: int = 0,
        context_tokens: int = 0,
    ) -> float:
        """Expected seconds to compute so many tokens of a prompt after `prefix_tokens`, in steps
        of at most `chunk` tokens beside that batch."""
        total, done = 0.0, 0
        while done < num_tokens:
            count = min(chunk, num_tokens - done)
            total += self.seconds(
                prefill_tokens=count,
                prefix_tokens=prefix_tokens + done,
                decodes=decodes,
                context_tokens=context_tokens,
            )
            done += count
        return total

    @property
    def tail(self) -> float:
        """Factor from the expected to the tail duration."""
        return self._tail

    @property
    def error(self) -> PredictionError:
        """How good the recent predictions were."""
        return PredictionError(
            mean_relative=self._mean_error, p90_relative=self._p90_error, num_steps=self._num
        )

    @property
    def coefficients(self) -> StepCoefficients:
        """What was learnt, to start another model from."""
        plane = [c / s for c, s in zip(self._plane, _SCALES, strict=True)]
        return StepCoefficients(
            planes=((plane[0], plane[1], plane[2], plane[3], plane[4]),),
            tail_decode=self._tail,
            tail_prefill=self._tail,
        )
