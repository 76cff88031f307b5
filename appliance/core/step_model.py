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

Fitting. Steps are gathered in *cells* (counts alike up to a factor of two or four); a cell keeps
the mean of its recent steps, so a thousand decode steps do not wash away what one long prompt has
taught. Each plane is the weighted least squares of relative errors over the cells in which it is
the larger one, non-negative by coordinate descent on the normal equations, which are kept up to
date cell by cell: a step changes one, looks at an old one again, and costs the same however many
there are. Before there are steps, cells of a guess (or of a measured profile) stand in; their
weight fades.

A device that becomes slower altogether (a lower clock, a busy neighbour) moves the one factor `s`,
which follows within tens of steps and leaves the shape alone.

The tail factor is a running quantile (9 of 10) of (seconds / predicted), of decode steps and of
steps with prefill. Policies steer by the tail, never by the mean.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from math import exp, log, sqrt

from appliance.core.types import Record

Row = tuple[float, float, float, float, float]
"""1, prompt tokens, pairs, decodes, KV tokens read; or a coefficient for each."""

_SCALES: Row = (1.0, 256.0, 131072.0, 32.0, 32768.0)
"""Usual counts, so that coordinate descent sees numbers of one size."""
_WINDOW = 20.0
"""Steps that a cell remembers."""
_HALF_LIFE = 4000.0
"""Steps until a cell that is not seen counts half."""
_GUESS_HALF_LIFE = 60.0
_LEAST_WEIGHT = 1e-3
_ALWAYS = 256
"""So many first steps are all fitted, then one in `_EVERY`."""
_EVERY = 4
_REMEMBERED = 200
"""Numbers of which a quantile is taken."""


class StepCoefficients(Record, frozen=True, kw_only=True):
    """What a step model has learnt: seconds per (step, prompt token, pair, decode, KV token read)
    for each plane, of which the larger holds; and the tail factors of steps without and with
    prefill."""

    planes: tuple[Row, Row]
    tail_decode: float = 1.0
    tail_prefill: float = 1.0


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


class _Cell:
    """Steps with like counts: means over the recent ones. Seconds are free of the factor `s`."""

    __slots__ = ("count", "guessed", "owner", "row", "seconds", "seen_at", "share")

    def __init__(self, row: Row, seconds: float, *, count: float, seen_at: int) -> None:
        self.row = row
        self.seconds = seconds
        self.count = count
        self.seen_at = seen_at
        self.guessed = False
        self.owner = -1
        """The plane in whose equations it is; -1: in none."""
        self.share: tuple[float, Row] = (0.0, row)
        """Its weight and its row (scaled, per second) there."""


class _Plane:
    """Coefficients (of scaled counts) and the normal equations they solve."""

    __slots__ = ("gram", "k", "sums")

    def __init__(self, k: Sequence[float]) -> None:
        self.k = list(k)
        self.gram = [[0.0] * 5 for _ in range(5)]
        self.sums = [0.0] * 5

    def add(self, weight: float, row: Row) -> None:
        """Take in (or, with a negative weight, out) a row whose value should be 1."""
        a, b, c, d, e = row
        for index, value in enumerate(row):
            if value:
                part = weight * value
                line = self.gram[index]
                line[0] += part * a
                line[1] += part * b
                line[2] += part * c
                line[3] += part * d
                line[4] += part * e
                self.sums[index] += part

    def descend(self) -> None:
        """One round of coordinate descent."""
        k = self.k
        for index, line in enumerate(self.gram):
            most = line[index]
            if most > 1e-12:
                a, b, c, d, e = line
                got = a * k[0] + b * k[1] + c * k[2] + d * k[3] + e * k[4]
                wanted = k[index] + (self.sums[index] - got) / most
                k[index] = wanted if wanted > 0.0 else 0.0

    def value(self, row: Row) -> float:
        """Of a scaled row."""
        a, b, c, d, e = row
        k = self.k
        return a * k[0] + b * k[1] + c * k[2] + d * k[3] + e * k[4]


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
        self._planes = tuple(
            _Plane([k * scale for k, scale in zip(plane, _SCALES, strict=True)])
            for plane in known.planes
        )
        self._factor = 1.0
        self._bias = 0.0
        self._cells: dict[int, _Cell] = {}
        self._order: list[_Cell] = []
        self._next = 0
        self._num = 0
        self._mean_error = 0.0
        self._large_error = _Quantile(0.0)
        self._tails = (_Quantile(known.tail_decode), _Quantile(known.tail_prefill))
        self._k = (*known.planes[0], *known.planes[1])
        self._stand_in()

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
        """Learn from one step: prompt tokens computed, pairs of them with what they attend to,
        sequences in decode, tokens of their context, seconds."""
        n = prefill_tokens
        if elapsed <= 0.0 or not (n or decodes):
            return
        prefix = max(0.0, prefill_pairs / n - (n + 1) / 2) if n else 0.0
        row = (1.0, n, prefill_pairs, decodes, context_tokens + prefix)
        k = self._k
        predicted = max(
            k[0] + k[1] * n + k[2] * prefill_pairs + k[3] * decodes + k[4] * row[4],
            k[5] + k[6] * n + k[7] * prefill_pairs + k[8] * decodes + k[9] * row[4],
        )
        ratio = elapsed / predicted
        if self._num == 0 and self._is_guess:
            self._factor *= ratio
            ratio = 1.0
        else:
            self._judge(ratio, with_prefill=n > 0)
        self._num += 1
        ratio = min(3.0, max(1 / 3, ratio))
        self._follow(ratio)
        cell = self._gather(row, prefix, ratio * predicted / self._factor)
        if self._num <= _ALWAYS or self._num % _EVERY == 0:
            self._fit(cell)

    def _judge(self, ratio: float, *, with_prefill: bool) -> None:
        """How good the prediction was."""
        error = abs(1.0 / ratio - 1.0)
        rate = max(0.005, 1.0 / self._num)
        self._mean_error += rate * (error - self._mean_error)
        self._large_error.add(error)
        self._tails[with_prefill].add(ratio)

    def _follow(self, ratio: float) -> None:
        """Move the factor when steps of all kinds have become longer or shorter."""
        self._bias += max(0.05, 0.5 / self._num) * (log(ratio) - self._bias)
        if abs(self._bias) > 0.1:
            self._factor *= exp(self._bias)
            self._bias = 0.0
            self._publish()

    def _gather(self, row: Row, prefix: float, seconds: float) -> _Cell:
        """Put a step into its cell."""
        _, n, _, decodes, read = row
        mean = int(read) // int(decodes) if decodes else 0
        key = int(n).bit_length() << 18 | int(decodes).bit_length() << 12
        key |= (int(prefix).bit_length() + 1) // 2 << 6 | (mean.bit_length() + 1) // 2
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = _Cell(row, seconds, count=1.0, seen_at=self._num)
            self._order.append(cell)
            return cell
        if cell.guessed:
            cell.guessed = False
            cell.row, cell.seconds, cell.count = row, seconds, 1.0
        else:
            cell.count = count = min(_WINDOW, cell.count + 1.0)
            old = cell.row
            rate = 1.0 / count
            cell.row = (
                1.0,
                old[1] + rate * (n - old[1]),
                old[2] + rate * (row[2] - old[2]),
                old[3] + rate * (decodes - old[3]),
                old[4] + rate * (read - old[4]),
            )
            cell.seconds += rate * (seconds - cell.seconds)
        cell.seen_at = self._num
        return cell

    def _fit(self, cell: _Cell) -> None:
        self._place(cell)
        self._next = (self._next + 1) % len(self._order)
        self._place(self._order[self._next])
        for plane in self._planes:
            plane.descend()
        self._publish()

    def _place(self, cell: _Cell) -> None:
        """Bring a cell up to date in the equations of the plane that is the larger one there."""
        if cell.owner >= 0:
            weight, row = cell.share
            self._planes[cell.owner].add(-weight, row)
        _, b, c, d, e = cell.row
        per = 1.0 / cell.seconds
        row = (
            per,
            b * per / _SCALES[1],
            c * per / _SCALES[2],
            d * per / _SCALES[3],
            e * per / _SCALES[4],
        )
        half_life = _GUESS_HALF_LIFE if cell.guessed else _HALF_LIFE
        age = (self._num - cell.seen_at) / half_life
        weight = max(_LEAST_WEIGHT, cell.count * 0.5**age)
        first, second = self._planes
        cell.owner = 1 if second.value(row) > first.value(row) else 0
        cell.share = (weight, row)
        self._planes[cell.owner].add(weight, row)

    def _stand_in(self) -> None:
        """Cells of the coefficients the model begins with."""
        for n, prefix, decodes, mean in _grid():
            pairs = n * prefix + n * (n + 1) / 2
            row = (1.0, n, pairs, decodes, decodes * mean + prefix)
            seconds = self.seconds(
                prefill_tokens=n,
                prefix_tokens=prefix,
                decodes=decodes,
                context_tokens=decodes * mean,
            )
            cell = self._gather(row, prefix, seconds)
            cell.guessed = True
            cell.count = 0.1 if self._is_guess else 2.0
            self._place(cell)

    def _publish(self) -> None:
        """The coefficients that predictions use."""
        factor, (first, second) = self._factor, self._planes
        scales = [factor / scale for scale in _SCALES]
        self._k = (
            *(k * scale for k, scale in zip(first.k, scales, strict=True)),
            *(k * scale for k, scale in zip(second.k, scales, strict=True)),
        )

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
        k = self._k
        one = k[0] + k[1] * n + k[2] * pairs + k[3] * decodes + k[4] * read
        two = k[5] + k[6] * n + k[7] * pairs + k[8] * decodes + k[9] * read
        return one if one > two else two

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
            num_steps=max(0, self._num - self._is_guess),
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
        """Fit until nothing moves, without the stand-ins: for profiles, not for serving."""
        for _ in range(rounds):
            for cell in self._order:
                self._place(cell)
            for plane in self._planes:
                for _ in range(5):
                    plane.descend()
        self._publish()


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


def _grid() -> list[tuple[int, int, int, int]]:
    """Counts that stand for all: prompt tokens, prefix, decodes, mean context."""
    decoding = [(0, 0, b, mean) for b in (1, 8, 64, 256) for mean in (64, 1024, 8192)]
    prefilling = [
        (n, prefix, b, 1024 if b else 0)
        for n in (1, 16, 64, 256, 1024, 4096)
        for prefix in (0, 4096)
        for b in (0, 8, 128)
    ]
    return decoding + prefilling
