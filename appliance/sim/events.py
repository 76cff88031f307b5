"""The virtual clock: what happens next, in order of time, and of its announcement where times are
equal."""

import heapq
from collections.abc import Callable
from typing import Any

Action = Callable[[Any], None]


class Events:
    """A heap of things to come. `now` moves only in `run`."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self._heap: list[tuple[float, int, Action, Any]] = []
        self._count = 0

    def at(self, time: float, action: Action, what: Any = None) -> None:
        """Call `action(what)` then, or now if that is past."""
        self._count += 1
        heapq.heappush(self._heap, (max(time, self.now), self._count, action, what))

    def later(self, seconds: float, action: Action, what: Any = None) -> None:
        """Call `action(what)` after so many seconds."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + seconds, self._count, action, what))

    def run(self, going_on: Callable[[], bool], *, until: float) -> None:
        """Let things happen while `going_on()` (asked before each) and not past `until`."""
        heap, pop = self._heap, heapq.heappop
        while heap and going_on() and heap[0][0] <= until:
            self.now, _, action, what = pop(heap)
            action(what)
