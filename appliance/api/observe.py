"""Numbers that the HTTP surface keeps itself: latencies and verdicts by SLO class, steps, answers,
loop lag.

Latency is measured from the arrival of the request (body not yet read) to the moment when the token
is handed to whatever writes the answer. A histogram here is two list operations; it is rendered
only when scraped.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence

from appliance.api.verdict import Verdict
from appliance.core.slo import verdict
from appliance.core.stamps import Times
from appliance.core.types import Slo, WorkerId

Clock = Callable[[], float]

LATENCY_BOUNDS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5,
    0.75, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
SLACK_BOUNDS = (
    -60.0, -20.0, -10.0, -5.0, -2.0, -1.0, -0.5, -0.2, -0.1, -0.05, -0.02, 0.0,
    0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0,
)  # fmt: skip
"""Seconds left before a deadline; below 0 is late."""
STEP_BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LAG_BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)

MOVE_BOUNDS = (
    0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip


class Histogram:
    """Counts of values by bucket; a value belongs to the first bound that is not below it."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Add a value, `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[tuple[str, int]]:
        """Pairs (upper bound as text, number of values up to it), "+Inf" last."""
        total = 0
        pairs = []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            pairs.append((bound, total))
        return pairs


class ClassLatency:
    """The latencies of one SLO class, in seconds, and how its complete answers did."""

    def __init__(self) -> None:
        self.ttft = Histogram(LATENCY_BOUNDS)
        self.itl = Histogram(LATENCY_BOUNDS)
        self.tpot = Histogram(LATENCY_BOUNDS)
        self.e2e = Histogram(LATENCY_BOUNDS)
        self.first_slack = Histogram(SLACK_BOUNDS)
        """Left of the budget of the first token when it came; of answers that have one."""
        self.end_slack = Histogram(SLACK_BOUNDS)
        """Left before the deadline of the last token when it came; likewise."""
        self.met = 0
        """Answers that kept every target, or had none."""
        self.missed = 0
        self.lost = 0
        """Answers that were complete, of requests that ended with an error for another one."""
        self.tokens_met = 0
        """Of the answers that met."""

    def judge(self, found: Verdict, num_tokens: int) -> None:
        """Count a complete answer."""
        if found.met:
            self.met += 1
            self.tokens_met += num_tokens
        else:
            self.missed += 1
        first, end = found.first_slack, found.end_slack(num_tokens)
        if first is not None:
            self.first_slack.observe(first)
        if end is not None:
            self.end_slack.observe(end)


class ApiStats:
    """Everything the HTTP surface counts. One per application."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()
        """HTTP answers by route and status."""
        self.step_seconds = Histogram(STEP_BOUNDS)
        self.step_sequences = Histogram(BATCH_BOUNDS)
        self.loop_lag = Histogram(LAG_BOUNDS)
        self.move_seconds: dict[tuple[str, str], Histogram] = {}
        """By kind of move and path."""
        self.classes: dict[str, ClassLatency] = {}

    def step(self, worker: WorkerId, seconds: float, sequences: int) -> None:
        """A worker has done a step in which so many sequences got a token."""
        del worker  # its totals are the node's
        self.step_seconds.observe(seconds)
        self.step_sequences.observe(sequences)

    def moved(self, kind: str, path: str, seconds: float) -> None:
        """A sequence goes on at another worker, so long after it stopped."""
        histogram = self.move_seconds.get((kind, path))
        if histogram is None:
            histogram = self.move_seconds[kind, path] = Histogram(MOVE_BOUNDS)
        histogram.observe(seconds)

    def latency(self, slo: Slo) -> ClassLatency:
        """The histograms of this class; names are configured ones, so there are few."""
        return self.classes.setdefault(slo.class_name, ClassLatency())


class Meter:
    """Takes the times of one answer."""

    __slots__ = (
        "_clock",
        "_first",
        "_last",
        "_latency",
        "_on_first",
        "_slo",
        "_started",
        "_tokens",
        "_verdict",
    )

    def __init__(
        self,
        latency: ClassLatency,
        started: float,
        clock: Clock,
        *,
        slo: Slo | None = None,
        on_first: Callable[[], None] | None = None,
    ) -> None:
        """Judges by `slo` (None: no targets); `on_first` is called at the first token."""
        self._latency = latency
        self._slo = slo or Slo()
        self._on_first = on_first
        self._started = started
        self._clock = clock
        self._first = 0.0
        self._last = 0.0
        self._tokens = 0
        self._verdict: Verdict | None = None

    def tokens(self, count: int) -> None:
        """`count` tokens have just come together: they share the time since the one before."""
        if count == 0:
            return
        now = self._clock()
        if self._tokens:
            self._latency.itl.observe((now - self._last) / count, count)
        else:
            self._first = now
            self._latency.ttft.observe(now - self._started)
            if self._on_first is not None:
                self._on_first()
            if count > 1:
                self._latency.itl.observe(0.0, count - 1)
        self._last = now
        self._tokens += count

    def finished(self, times: Times | None = None) -> Verdict | None:
        """The answer is complete; the verdict, if it is known where the time went. Failed answers
        have no total latency."""
        self._latency.e2e.observe(self._clock() - self._started)
        if self._tokens > 1:
            self._latency.tpot.observe((self._last - self._first) / (self._tokens - 1))
        if times is None:
            return None
        how = verdict(
            self._slo,
            arrived=self._started,
            first_token_at=self._first if self._tokens else None,
            ended_at=self._last if self._tokens else self._clock(),
            num_tokens=self._tokens,
        )
        self._verdict = Verdict(slo=self._slo, how=how, times=times)
        return self._verdict

    def judge(self) -> None:
        """Count the finished answer: the whole request that it belongs to is complete."""
        if self._verdict is not None:
            self._latency.judge(self._verdict, self._tokens)

    def lose(self) -> None:
        """Count the finished answer: another one of its request failed."""
        if self._verdict is not None:
            self._latency.lost += 1
