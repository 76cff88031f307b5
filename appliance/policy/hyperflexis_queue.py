"""HyperFlexis: what waits at the node, kept in order as it comes and goes.

Three lanes: *main* (to be served in time, the most urgent first), *shed* (held back so that the
rest of the main lane can be in time; comes back when there is room), *lane* (best effort: what
cannot be in time any more, the oldest first).

Shedding is Moore's algorithm (Management Science 15(1), 1968) with values: walk along the due
times, add up the work, and whenever somebody would be late hold back the one with the least value
per second among those before. With equal values it leaves the fewest late; pure density order
forgets that what is cheap may also be in no hurry."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from appliance.core.types import Request, RequestId

Lane = Literal["main", "shed", "lane"]
LIMIT = 384
"""Requests of the main lane that a plan looks at."""
HORIZON = 20.0
"""What is due later than in so many seconds is not held back yet."""


class Entry:
    """One waiting request. Times are of the node's clock, tokens those of its prompt to compute
    where most of it is cached."""

    __slots__ = (
        "begun",
        "due",
        "id",
        "key",
        "lane",
        "name",
        "request",
        "start_by",
        "tokens",
        "tpot",
        "weight",
    )

    def __init__(
        self, request: Request, *, tokens: int, due: float, start_by: float, key: float
    ) -> None:
        self.request = request
        self.id: RequestId = request.id
        self.name = request.slo.class_name
        self.weight = request.slo.weight
        self.tokens = tokens
        self.due = due
        self.start_by = start_by
        """Latest start of its prefill on a worker that does nothing else."""
        self.key = key
        """Urgency: the least is first."""
        self.lane: Lane = "main"
        self.begun = False
        """Something of it was sent before: it cannot be refused."""
        self.tpot = request.slo.tpot
        """Seconds per token that the worker which takes it must keep; None: any may take it."""


class Lanes:
    """The three lanes. An entry costs a bisection to insert and to remove."""

    def __init__(self) -> None:
        self.entries: dict[RequestId, Entry] = {}
        self._main: list[tuple[float, RequestId]] = []
        self._shed: list[tuple[float, RequestId]] = []
        self._lane: list[tuple[float, RequestId]] = []
        self._start_by: list[tuple[float, RequestId]] = []
        """Of main and shed, by latest start."""

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def num_shed(self) -> int:
        """Held back."""
        return len(self._shed)

    def add(self, entry: Entry) -> None:
        """A request came; into the lane that it names."""
        self.entries[entry.id] = entry
        if entry.lane == "lane":
            insort(self._lane, (entry.request.arrived, entry.id))
            return
        insort(self._main, (entry.key, entry.id))
        insort(self._start_by, (entry.start_by, entry.id))
        entry.lane = "main"

    def remove(self, request_id: RequestId) -> Entry | None:
        """It is gone; None if it was not here."""
        entry = self.entries.pop(request_id, None)
        if entry is None:
            return None
        if entry.lane == "lane":
            _take(self._lane, (entry.request.arrived, entry.id))
            return entry
        _take(self._main if entry.lane == "main" else self._shed, (entry.key, entry.id))
        _take(self._start_by, (entry.start_by, entry.id))
        return entry

    def demote(self, entry: Entry) -> None:
        """To best effort, for good."""
        self.remove(entry.id)
        entry.lane = "lane"
        self.add(entry)

    def rekey(self, entry: Entry, *, start_by: float, key: float) -> None:
        """Its latest start has turned out to be another one."""
        held_back = entry.lane == "shed"
        self.remove(entry.id)
        entry.start_by, entry.key = start_by, key
        self.add(entry)
        if held_back:
            _take(self._main, (key, entry.id))
            insort(self._shed, (key, entry.id))
            entry.lane = "shed"

    def overdue(self, now: float) -> list[Entry]:
        """Those whose latest start is past."""
        count = bisect_left(self._start_by, (now, RequestId(0)))
        return [self.entries[id_] for _, id_ in self._start_by[:count]]

    @property
    def next_start(self) -> float | None:
        """The earliest of the latest starts."""
        return self._start_by[0][0] if self._start_by else None

    @property
    def head(self) -> Entry | None:
        """The most urgent of the main lane."""
        return self.entries[self._main[0][1]] if self._main else None

    def first(self, lane: Lane, count: int) -> list[Entry]:
        """Up to `count` of a lane, first first."""
        rows = {"main": self._main, "shed": self._shed, "lane": self._lane}[lane]
        return [self.entries[id_] for _, id_ in rows[:count]]

    # --- overload -------------------------------------------------------------------------------

    def plan(
        self,
        now: float,
        *,
        rate: float,
        serial: float,
        begun: Iterable[tuple[float, int]],
        value: Mapping[str, float],
        step: float,
        reserve: float,
    ) -> None:
        """Decide anew who is held back. `rate`: prompt tokens per second of all workers together,
        `serial` of one; `begun`: (due, tokens to compute) of what is at workers already; `value`:
        of a class, beside its weight (1 where it is not named); `step`: seconds that a newcomer may
        wait for the step under way; `reserve`: the share of the time to each due that is kept for
        what arrives meanwhile and is more urgent."""
        entries = self.entries
        if self._shed:
            for row in self._shed:
                entries[row[1]].lane = "main"
            self._main = list(heapq.merge(self._main, self._shed))
            self._shed = []
        if not self._main or rate <= 0.0:
            return
        walk: list[tuple[float, int, Entry | None]] = [
            (entry.due, entry.tokens, entry)
            for entry in [entries[id_] for _, id_ in self._main[:LIMIT]]
            if entry.due - now <= HORIZON
        ]
        walk += [(due, tokens, None) for due, tokens in begun]
        walk.sort(key=_due)
        slacks = Slacks(now=now, step=step, reserve=reserve, rate=rate, serial=serial)
        out = {entry.id for entry in _moore(walk, slacks, value)}
        if not out:
            return
        self._shed = [row for row in self._main if row[1] in out]
        self._main = [row for row in self._main if row[1] not in out]
        for id_ in out:
            entries[id_].lane = "shed"


def _due(row: tuple[float, int, Entry | None]) -> float:
    return row[0]


class Slacks(NamedTuple):
    """What a plan assumes of the workers; see `Lanes.plan`."""

    now: float
    step: float
    reserve: float
    rate: float
    serial: float


def _moore(
    walk: Iterable[tuple[float, int, Entry | None]], slacks: Slacks, value: Mapping[str, float]
) -> Iterator[Entry]:
    """Whom to hold back. What has no entry has begun and stays."""
    rate = slacks.rate
    alone = 1.0 / slacks.serial - 1.0 / rate
    seconds = slacks.step
    heap: list[tuple[float, RequestId, Entry]] = []
    for due, tokens, entry in walk:
        seconds += tokens / rate
        if entry is None:
            continue
        latest = (due - slacks.now) * (1.0 - slacks.reserve) - tokens * alone
        density = entry.weight * value.get(entry.name, 1.0) / tokens
        if seconds <= latest:
            heapq.heappush(heap, (density, entry.id, entry))
            continue
        least = heap[0][2] if heap and heap[0][0] < density else entry
        if least is not entry and seconds - least.tokens / rate <= latest:
            heapq.heapreplace(heap, (density, entry.id, entry))
        else:
            least = entry
        seconds -= least.tokens / rate
        yield least


def _take(rows: list[tuple[float, RequestId]], row: tuple[float, RequestId]) -> None:
    index = bisect_left(rows, row)
    if index < len(rows) and rows[index] == row:
        del rows[index]
