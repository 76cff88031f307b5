"""How long tokens may wait to leave together: nothing under normal load, a little when the event
loop is nearly full.

A write to a socket costs more than everything else that is done for a token. When the loop is busy
for more than `busy_above` of the time, the *hold* is raised step by step, so that several tokens of
an answer share one chunk and one write; when it has air again the hold falls back to zero. Joining
tokens by itself makes the loop less busy, so between the thresholds the hold falls slowly, until
the loop is as busy as `relaxed_below`: tokens wait no longer than the load asks for.
`appliance.live.streams` says which tokens never wait, and bounds each wait by the request's budget.
"""

import time
from collections.abc import Callable
from pathlib import Path

from appliance.core.types import Record

FIRST_HOLD = 0.01
"""Seconds; less would join nothing at the pace of any device."""
SLOWLY = 0.94
"""What is left of the hold after one look at a load that is neither high nor low."""
_SCHEDSTAT = Path("/proc/thread-self/schedstat")


class HoldSettings(Record, frozen=True, kw_only=True):
    """When tokens are joined. Shares of the loop's time; seconds."""

    busy_above: float = 0.9
    """Above this the hold grows; 1 means never."""
    relaxed_below: float = 0.75
    """Below this the hold falls slowly."""
    calm_below: float = 0.45
    """Below this it falls at once."""
    longest: float = 0.05
    """The longest hold, also of requests without a budget per token; 0 means no hold at all."""
    interval: float = 0.1
    """Between two looks at the load."""


class Governor:
    """Decides on the hold from the load alone. Pure."""

    def __init__(self, settings: HoldSettings) -> None:
        self._settings = settings
        self.hold = 0.0
        """How long a token may wait, at most; seconds."""

    def observe(self, busy: float, elapsed: float) -> None:
        """The loop was busy for this share of the last `elapsed` seconds."""
        settings = self._settings
        if busy > settings.busy_above:
            self.hold = min(settings.longest, max(FIRST_HOLD, 2 * self.hold))
        elif busy < settings.calm_below:
            lasting = elapsed >= 10 * settings.interval
            self.hold = 0.0 if lasting or self.hold <= FIRST_HOLD else self.hold / 2
        elif busy < settings.relaxed_below:
            self.hold = 0.0 if self.hold <= FIRST_HOLD else SLOWLY * self.hold


class LoopLoad:
    """The share of the time in which the calling thread ran or waited for a core."""

    def __init__(self, *, path: Path = _SCHEDSTAT) -> None:
        """`path` is the kernel's account of the thread; without it only running counts."""
        self._path = path
        self._last: float | None = None

    def busy(self, elapsed: float) -> float:
        """Since the call before, which was `elapsed` seconds ago; 0 the first time."""
        total = self._seconds()
        last, self._last = self._last, total
        return 0.0 if last is None or elapsed <= 0 else min(1.0, (total - last) / elapsed)

    def _seconds(self) -> float:
        try:
            ran, waited, _ = self._path.read_bytes().split()
        except (OSError, ValueError):
            return time.thread_time()
        return (int(ran) + int(waited)) / 1e9


class Holding:
    """The hold in force, kept up to date by whoever delivers tokens, and what it has done."""

    def __init__(
        self,
        settings: HoldSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        busy: Callable[[float], float] | None = None,
    ) -> None:
        """`busy(elapsed)` measures the load since its last call; None: that of this thread."""
        self._settings = settings
        self._clock = clock
        self._governor = Governor(settings)
        self._busy = LoopLoad().busy if busy is None else busy
        self._looked = float("-inf")
        self.busy = 0.0
        """The load at the last look."""
        self.num_pushes = 0
        """Deliveries to sinks."""
        self.num_joined = 0
        """Tokens that were delivered together with an earlier one of their answer."""
        self.held_seconds = 0.0
        """Time during which there was a hold."""

    @property
    def seconds(self) -> float:
        """The hold."""
        return self._governor.hold

    def look(self) -> None:
        """Measure the load if it is time to."""
        now = self._clock()
        elapsed = now - self._looked
        if elapsed < self._settings.interval:
            return
        self._looked = now
        self.busy = self._busy(elapsed)
        if self._governor.hold:
            self.held_seconds += elapsed
        self._governor.observe(self.busy, elapsed)
