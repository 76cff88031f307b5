"""Cyclic garbage is collected where nobody waits for it.

A full collection looks at every object of every open request and stops the event loop meanwhile: a
tenth of a second with some thousand streams. The two young generations are collected as the
interpreter does it, which is cheap and finds nearly all garbage; a full collection runs when no
answer is under way, and otherwise only after a long time.
"""

import asyncio
import gc
import time
from collections.abc import Callable

YOUNG = (5_000, 20)
"""Thresholds of the two young generations: new objects, and collections of the youngest."""
NEVER = 1_000_000_000
INTERVAL = 1.0
"""Seconds between two looks."""
AT_LEAST_APART = 10.0
AT_MOST_APART = 900.0
"""Seconds between two full collections: when idle, and whatever happens."""


class Collector:
    """Full collections of this process at good moments."""

    def __init__(
        self,
        is_idle: Callable[[], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
        collect: Callable[[], object] = gc.collect,
    ) -> None:
        """`is_idle` says whether nobody waits for anything."""
        self._is_idle = is_idle
        self._clock = clock
        self._collect = collect
        self._last = clock()
        self._timer: asyncio.TimerHandle | None = None
        self._thresholds = gc.get_threshold()

    def start(self) -> None:
        """What lives now lives to the end and is not looked at again. Needs the running loop."""
        self._collect()
        gc.freeze()
        self._thresholds = gc.get_threshold()
        gc.set_threshold(*YOUNG, NEVER)
        self._last = self._clock()
        self._wait()

    def stop(self) -> None:
        """Leave it to the interpreter again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            gc.set_threshold(*self._thresholds)
            gc.unfreeze()

    def look(self) -> None:
        """Collect if this is a good moment, or if it is high time."""
        since = self._clock() - self._last
        if since >= AT_MOST_APART or (since >= AT_LEAST_APART and self._is_idle()):
            self._collect()
            self._last = self._clock()

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(INTERVAL, self._turn)

    def _turn(self) -> None:
        self.look()
        self._wait()
