"""How long a step lasts: predicted from what is in it, fitted to the steps that were seen.

Four counts say what a step does: `n` prompt tokens computed, `P` pairs of (computed prompt token,
token it attends to), `B` sequences in decode, `K` tokens of their context. With `c` tokens before
the chunk, P = n c + n (n + 1) / 2, and R = K + c tokens have their KV read. Then::

    seconds = s * max over both planes of  k0 + k1 n + k2 P + k3 B + k4 R        (every k >= 0)

Without decodes that is quadratic in the new tokens with terms for the prefix, without prefill
linear in batch and context: the forms that are usual for each alone. The larger of two planes makes
it right for a device that is bound by arithmetic in one step and by memory traffic in the next; a
device where costs add up has one plane twice. The model is monotone in each count, and its inverse
is the root of a quadratic.

Fitting (`appliance.core.step_fit`). Steps with like counts are gathered in cells, so a thousand
decode steps do not wash away what one long prompt has taught. Each plane is a least squares of
relative errors over the cells in which it is the larger one, and never negative. Before there are
steps, cells of a guess (or of a measured profile) stand in, and fade.

A device that becomes slower altogether (a lower clock, a busy neighbour) moves the one factor `s`,
which follows within tens of steps and leaves the shape alone.

The tail factor is a running quantile (9 of 10) of (seconds / predicted), of decode steps and of
steps with prefill. Policies steer by the tail, never by the mean.
"""

from bisect import bisect_left, insort
from collections import deque
from math import sqrt

from appliance.core.step_fit import Row, StepFit, cell_key
from appliance.core.types import Record

_FOLLOWING = 0.03
"""Weight of a step in what is usual now."""
_NOTABLE = 0.06
"""Change that moves the factor; less is left to the cells."""
_LEAST_CLIP = 0.3
"""A single step counts as longer than usual by this share at least, if it is."""
_REMEMBERED = 200
"""Numbers of which a quantile is taken."""


class StepCoefficients(Record, frozen=True, kw_only=True):
    """What a step model has learnt: seconds per (step, prompt token, pair, decode, KV token read)
    for each plane, of which the larger holds; and the tail factors of steps without and with
    prefill."""

    planes: tuple[Row, Row]
    tail_decode: float = 1.0
    tail_prefill: float = 1.0


class Seen(Record, frozen=True, kw_only=True):
    """Mean counts and seconds of steps that were alike, and what the model says of them."""

    prefill_tokens: float
    prefill_pairs: float
    decodes: float
    kv_tokens: float
    seconds: float
    num_steps: int
    """At most the last twenty."""
    predicted: float


class PredictionError(Record, frozen=True, kw_only=True):
    """Relative error of recent predictions, each made before its step was seen."""

    mean_relative: float
    p90_relative: float
    num_steps: int


GUESS = StepCoefficients(
    planes=((1e-3, 3e-5, 2e-9, 3e-5, 2e-8), (4e-3, 1e-6, 0.0, 3e-6, 3e-8)),
    tail_decode=1.1,
    tail_prefill=1.1,
)
"""The shape before anything is known; the first step says how large it is."""


class _Quantile:
    """The value that nine of ten recent numbers stay under."""

    __slots__ = ("_recent", "_sorted", "level")

    def __init__(self, level: float) -> None:
        """`level`: what is believed before there are numbers."""
        self.level = level
        self._recent = deque([level, level], maxlen=_REMEMBERED)
        self._sorted = [level, level]

    def add(self, value: float) -> None:
        """Take in one number, forget the oldest."""
        recent, ordered = self._recent, self._sorted
        if len(recent) == _REMEMBERED:
            del ordered[bisect_left(ordered, recent[0])]
        recent.append(value)
        insort(ordered, value)
        self.level = ordered[len(ordered) * 9 // 10]


class StepModel:
    """Seconds of a step, and tokens that fit into seconds. `observe` alone changes it, so equal
    steps give equal answers. Every call costs some microseconds, whatever the numbers."""

    def __init__(self, start: StepCoefficients | None = None) -> None:
        """`start`: what a profile found; None: a guess, whose size the first step corrects."""
        known = GUESS if start is None else start
        self._is_guess = start is None
        self._fit = StepFit(known.planes, trust=0.1 if start is None else 2.0)
        self._factor = 1.0
        self._bias = 0.0
        self._spread = 0.3
        self._num = 0
        self._judged = 0
        self._mean_error = 0.0
        self._large_error = _Quantile(0.0)
        self._tails = (_Quantile(known.tail_decode), _Quantile(known.tail_prefill))
        self._k: tuple[float, ...] = (*known.planes[0], *known.planes[1])

    # --- learning -------------------------------------------------------------------------------

    def observe(
        self,
        *,
        prefill_tokens: int,
        prefill_pairs: int,
        decodes: int,
        context_tokens: int,
        elapsed: float,
    ) -> None:
        """Learn from one step: prompt tokens computed, pairs of them with what they attend to (0:
        not known, taken for one prompt from its beginning), sequences in decode, tokens of their
        context, seconds."""
        n = prefill_tokens
        if elapsed <= 0.0 or not (n or decodes):
            return
        pairs = prefill_pairs or n * (n + 1) / 2
        prefix = max(0.0, pairs / n - (n + 1) / 2) if n else 0.0
        row = (1.0, n, pairs, decodes, context_tokens + prefix)
        predicted = self._of(n, pairs, decodes, row[4])
        ratio = elapsed / predicted
        if self._num == 0 and self._is_guess:
            self._factor *= ratio
            ratio = 1.0
        else:
            self._judge(ratio, with_prefill=n > 0)
        self._num += 1
        key = cell_key(row, prefix)
        elapsed = self._compare(key, elapsed=elapsed, predicted=predicted)
        if self._fit.learn(key, row, elapsed / self._factor):
            self._publish()

    def _compare(self, key: int, *, elapsed: float, predicted: float) -> float:
        """Beside earlier steps like this one (not beside the prediction, which may be wrong for all
        of them): has the device changed? Returns the duration to learn from: a step during which
        the process did not run says little about the device."""
        alike = self._fit.alike(key)
        if alike is None:
            return elapsed
        (_, n, pairs, decodes, read), seconds = alike
        usual = self._factor * seconds * predicted / self._of(n, pairs, decodes, read)
        change = elapsed / usual - 1.0
        most = max(_LEAST_CLIP, 3.0 * self._spread)
        self._spread += 0.05 * (min(abs(change), 2.0 * most) - self._spread)
        change = min(most, change)
        self._follow(change)
        return usual * (1.0 + change)

    def _judge(self, ratio: float, *, with_prefill: bool) -> None:
        """How good the prediction was."""
        error = abs(1.0 / ratio - 1.0)
        self._judged += 1
        rate = max(0.005, 1.0 / self._judged)
        self._mean_error += rate * (error - self._mean_error)
        self._large_error.add(error)
        self._tails[with_prefill].add(ratio)

    def _follow(self, change: float) -> None:
        """Move the factor when steps of all kinds have become longer or shorter, by more than
        noise would explain."""
        self._bias += _FOLLOWING * (change - self._bias)
        if abs(self._bias) > max(_NOTABLE, 0.7 * self._spread):
            self._factor *= 1.0 + self._bias
            self._bias = 0.0
            self._publish()

    def _publish(self) -> None:
        """The coefficients that predictions use."""
        first, second = self._fit.coefficients
        factor = self._factor
        self._k = (*(k * factor for k in first), *(k * factor for k in second))

    # --- predicting -----------------------------------------------------------------------------

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
        n, read = prefill_tokens, context_tokens
        pairs = 0.0
        if n:
            pairs = n * (prefix_tokens + 0.5 * (n + 1))
            read += prefix_tokens
        return self._of(n, pairs, decodes, read)

    def tail_seconds(
        self,
        *,
        prefill_tokens: int = 0,
        prefix_tokens: int = 0,
        decodes: int = 0,
        context_tokens: int = 0,
    ) -> float:
        """What nine of ten such steps stay under: what policies steer by. Grows with each."""
        mean = self.seconds(
            prefill_tokens=prefill_tokens,
            prefix_tokens=prefix_tokens,
            decodes=decodes,
            context_tokens=context_tokens,
        )
        return mean * (self.tail if prefill_tokens else max(1.0, self._tails[0].level))

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
        mean = seconds / self.tail
        read = context_tokens + prefix_tokens
        found = float(most)
        for k0, k1, k2, k3, k4 in (self._k[:5], self._k[5:]):
            left = mean - k0 - k3 * decodes - k4 * read
            if left < 0.0:
                return 0
            slope = k1 + k2 * (prefix_tokens + 0.5)
            root = slope + sqrt(slope * slope + 2.0 * k2 * left)
            if 2.0 * left < found * root:
                found = 2.0 * left / root
        n = int(found)
        while n > 0 and self._tail_of(n, prefix_tokens, decodes, context_tokens) > seconds:
            n -= 1
        while n < most and self._tail_of(n + 1, prefix_tokens, decodes, context_tokens) <= seconds:
            n += 1
        return n

    def _tail_of(self, n: int, prefix: int, decodes: int, context: int) -> float:
        return self.tail_seconds(
            prefill_tokens=n, prefix_tokens=prefix, decodes=decodes, context_tokens=context
        )

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
        of at most `chunk` tokens beside that batch; 0 for no tokens."""
        chunk = max(1, chunk)
        full, rest = divmod(max(0, num_tokens), chunk)
        total = 0.0
        if rest:
            total = self.seconds(
                prefill_tokens=rest,
                prefix_tokens=prefix_tokens + full * chunk,
                decodes=decodes,
                context_tokens=context_tokens,
            )
        if not full:
            return total
        # each plane is linear in the number of chunks before, so it is an arithmetic series
        pairs = chunk * (prefix_tokens + 0.5 * (chunk + 1))
        read = context_tokens + prefix_tokens
        lines = [
            (k0 + k1 * chunk + k2 * pairs + k3 * decodes + k4 * read, (k2 * chunk + k4) * chunk)
            for k0, k1, k2, k3, k4 in (self._k[:5], self._k[5:])
        ]
        return total + _sum_of_larger(lines[0], lines[1], full)

    def added_seconds(self, num_tokens: int, *, prefix_tokens: int = 0) -> float:
        """What computing so many prompt tokens after `prefix_tokens` adds to steps that are long
        anyway: the arithmetic alone, without what every step costs."""
        pairs = num_tokens * (prefix_tokens + 0.5 * (num_tokens + 1))
        k = self._k
        return max(k[1] * num_tokens + k[2] * pairs, k[6] * num_tokens + k[7] * pairs)

    @property
    def tail(self) -> float:
        """Factor from the expected to the tail duration of a step with prefill."""
        decode, prefill = self._tails
        return max(1.0, decode.level, prefill.level)

    @property
    def error(self) -> PredictionError:
        """How good the recent predictions were."""
        return PredictionError(
            mean_relative=self._mean_error,
            p90_relative=self._large_error.level,
            num_steps=self._judged,
        )

    @property
    def coefficients(self) -> StepCoefficients:
        """What was learnt, to start another model from."""
        a, b, c, d, e, f, g, h, i, j = self._k
        decode, prefill = self._tails
        return StepCoefficients(
            planes=((a, b, c, d, e), (f, g, h, i, j)),
            tail_decode=max(1.0, decode.level),
            tail_prefill=max(1.0, prefill.level),
        )

    def settle(self, rounds: int = 100) -> None:
        """Fit what was seen until nothing moves: for profiles; it takes milliseconds."""
        self._fit.settle(rounds)
        self._publish()

    def seen(self) -> list[Seen]:
        """What was learnt from: steps with like counts, together."""
        return [
            Seen(
                prefill_tokens=n,
                prefill_pairs=pairs,
                decodes=decodes,
                kv_tokens=read,
                seconds=seconds * self._factor,
                num_steps=count,
                predicted=self._of(n, pairs, decodes, read),
            )
            for (_, n, pairs, decodes, read), seconds, count in self._fit.seen()
        ]

    def _of(self, n: float, pairs: float, decodes: float, read: float) -> float:
        k = self._k
        one = k[0] + k[1] * n + k[2] * pairs + k[3] * decodes + k[4] * read
        two = k[5] + k[6] * n + k[7] * pairs + k[8] * decodes + k[9] * read
        return one if one > two else two


def _sum_of_larger(one: tuple[float, float], two: tuple[float, float], count: int) -> float:
    """Sum over i < count of the larger of two lines (value at 0, slope)."""
    (u, v), (x, y) = one, two
    if v > y or (v == y and u > x):
        (u, v), (x, y) = (x, y), (u, v)  # the second is the larger one in the end
    turn = 0
    if u > x:
        turn = count if v == y else min(count, int((u - x) / (y - v)) + 1)
    before = u * turn + v * turn * (turn - 1) / 2
    rest = count * (count - 1) / 2 - turn * (turn - 1) / 2
    return before + x * (count - turn) + y * rest
