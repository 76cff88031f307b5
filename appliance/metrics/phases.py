"""Attainment over time, and how long it takes to come back after a change.

Requests count by when they were due. A window [t, t + width) has the attainment of the requests due
in it; windows slide by `step`. Within the stretch from one change to the next (or the end):

* `dip`: seconds from the change to the start of the first window below the threshold; None if there
  is none, and then recovery took 0 seconds;
* `back`: seconds to the start of the first window at or above the threshold after the dip began;
  None: not before the next change;
* `settled`: seconds to the start of the first window after which none is below the threshold; None:
  the last window is still below.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise

from appliance.core.types import Record
from appliance.metrics.outcome import Outcome
from appliance.metrics.score import attained


class Window(Record, frozen=True, kw_only=True):
    """Requests due in [start, start + width)."""

    start: float
    offered: int
    attained: int

    @property
    def attainment(self) -> float:
        """Their attainment; 1 of nothing."""
        return self.attained / self.offered if self.offered else 1.0


class Recovery(Record, frozen=True, kw_only=True):
    """What followed one change; see the module's text. All seconds from the change."""

    change: float
    until: float
    lowest: float
    """Attainment of the worst window."""
    mean: float
    """Attainment of all requests due up to the next change."""
    first_30s: float
    """Attainment of the requests due in the first 30 seconds of the stretch."""
    dip: float | None
    back: float | None
    settled: float | None

    @property
    def seconds(self) -> float | None:
        """Time to recover: 0 without a dip, `settled` otherwise."""
        return 0.0 if self.dip is None else self.settled


def windows(
    outcomes: Iterable[Outcome], *, start: float, end: float, width: float, step: float
) -> list[Window]:
    """Sliding windows that lie within [start, end)."""
    if width <= 0 or step <= 0:
        raise ValueError(f"width = {width}, step = {step}: both must be above 0")
    ordered = sorted((outcome.at, attained(outcome)) for outcome in outcomes)
    times = [at for at, _ in ordered]
    hits = [0]
    for _, hit in ordered:
        hits.append(hits[-1] + hit)
    found = []
    place = 0
    while start + place * step + width <= end + 1e-9:
        left = start + place * step
        low, high = bisect_left(times, left), bisect_left(times, left + width)
        found.append(Window(start=left, offered=high - low, attained=hits[high] - hits[low]))
        place += 1
    return found


def recoveries(
    outcomes: Sequence[Outcome],
    changes: Sequence[float],
    *,
    end: float,
    threshold: float = 0.9,
    width: float = 2.0,
    step: float = 0.25,
) -> list[Recovery]:
    """What followed each change, in order; `end` is the end of the offered span."""
    ordered = sorted(changes)
    stretches = pairwise([*ordered, end])
    return [
        _recovery(outcomes, change, until, threshold=threshold, width=width, step=step)
        for change, until in stretches
        if until > change
    ]


def _recovery(
    outcomes: Sequence[Outcome],
    change: float,
    until: float,
    *,
    threshold: float,
    width: float,
    step: float,
) -> Recovery:
    found = windows(outcomes, start=change, end=until, width=width, step=step)
    low = [window.attainment < threshold for window in found]
    dip = back = settled = None
    if any(low):
        first = low.index(True)
        dip = found[first].start - change
        after = next((place for place in range(first, len(low)) if not low[place]), None)
        back = None if after is None else found[after].start - change
        last = len(low) - 1 - low[::-1].index(True)
        settled = found[last + 1].start - change if last + 1 < len(found) else None
    return Recovery(
        change=change,
        until=until,
        lowest=min((window.attainment for window in found), default=1.0),
        mean=_mean(outcomes, change, until),
        first_30s=_mean(outcomes, change, min(until, change + 30.0)),
        dip=dip,
        back=back,
        settled=settled,
    )


def _mean(outcomes: Sequence[Outcome], start: float, end: float) -> float:
    chosen = [attained(outcome) for outcome in outcomes if start <= outcome.at < end]
    return sum(chosen) / len(chosen) if chosen else 1.0
