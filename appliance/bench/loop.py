"""The open loop: every request at its time, whatever became of those before.

One coroutine sends; answers are taken within the callbacks of their sockets, so no task is woken
per token. A request that cannot be sent, is refused, breaks off or never ends is an outcome like
any other: the run goes on.
"""

import asyncio
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

from appliance.bench.bodies import Requests
from appliance.bench.connection import Connection, Pool
from appliance.bench.stream import Answer, StreamReceiver
from appliance.core.types import Record
from appliance.workload.items import Item

EARLY = 0.0005
"""Seconds before its time at which a request may be sent: timers have milliseconds."""
SWEEP = 0.25
"""Seconds between two looks for requests that take too long."""
HEAD_START = 0.1
"""Seconds from the beginning to the start of the run."""


class LoopSettings(Record, frozen=True):
    """How long to wait: for one answer, and after the last request for those still open."""

    timeout: float = 600.0
    drain: float = 120.0
    natural: bool = False
    """Answers end where the model ends them."""


class Asked:
    """One request of the run. Times are seconds from its start."""

    __slots__ = ("answer", "connection", "item", "retried", "sent")

    def __init__(self, item: Item, on_end: Callable[["Asked"], None], *, stop_after: int) -> None:
        self.item = item
        self.answer = Answer(lambda _: on_end(self), stop_after=stop_after)
        self.sent = 0.0
        """When the client turned to it; what the network takes comes after."""
        self.connection: Connection | None = None
        self.retried = False


class OpenLoop:
    """One run. `on_end` gets each request once it is over, within a callback: be quick."""

    def __init__(
        self,
        items: Sequence[Item],
        *,
        requests: Requests,
        pool: Pool,
        settings: LoopSettings,
        on_end: Callable[["Asked"], None],
    ) -> None:
        """`items` in the order of their times, `requests` made of the same items."""
        self._items = items
        self._requests = requests
        self._pool = pool
        self._settings = settings
        self._on_end = on_end
        self._open: set[Asked] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._drained = asyncio.Event()
        self.start = 0.0
        """The run's zero on the clock of `perf_counter`."""
        self.num_sent = 0
        self.num_ended = 0

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return perf_counter() - self.start

    async def run(self) -> None:
        """Send everything, then wait for the answers."""
        self.start = perf_counter() + HEAD_START
        sweeper = asyncio.get_running_loop().create_task(self._sweep())
        try:
            await self._send_all()
            if self._open:
                await self._drain()
        finally:
            sweeper.cancel()
            for task in self._tasks:
                task.cancel()
            for asked in list(self._open):
                self._give_up(asked, "unfinished", "still open when the run ended")

    async def _send_all(self) -> None:
        for item in self._items:
            due = self.start + item.at
            wait = due - perf_counter()
            if wait > EARLY:
                await asyncio.sleep(wait)
            self._send(item)
            if self.num_sent % 64 == 0:
                await asyncio.sleep(0)  # a burst must not keep answers from being read

    def _send(self, item: Item) -> None:
        # asking for more tokens than one wants says nothing about how many that are
        enough = item.output_tokens if item.max_tokens > item.output_tokens else 0
        stop_after = 0 if self._settings.natural else enough
        asked = Asked(item, self._ended, stop_after=stop_after)
        request = self._requests.take()
        self._open.add(asked)
        self.num_sent += 1
        asked.sent = self.now
        idle = self._pool.get_idle()
        if idle is None:
            self._later(self._connect(asked, request))
        else:
            self._begin(asked, idle, request)
        self._requests.more()

    def _begin(self, asked: Asked, connection: Connection, request: bytes) -> None:
        reused = connection.num_exchanges > 0

        def failed(kind: str, message: str) -> None:
            # a server may close a connection that was idle while the request is on its way
            if kind == "disconnected" and reused and not asked.retried and not asked.answer.over:
                asked.retried = True
                self._later(self._connect(asked, request))
            else:
                asked.answer.give_up(kind, message)

        asked.connection = connection
        connection.begin(StreamReceiver(asked.answer, failed), request)

    async def _connect(self, asked: Asked, request: bytes) -> None:
        try:
            connection = await self._pool.get(fresh=True)
        except ConnectionRefusedError as error:
            asked.answer.give_up("refused", str(error))
            return
        except OSError as error:
            asked.answer.give_up("connect", str(error))
            return
        if asked.answer.over:  # it took too long
            connection.abort()
        else:
            self._begin(asked, connection, request)

    def _later(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _ended(self, asked: Asked) -> None:
        self._open.discard(asked)
        self.num_ended += 1
        connection, asked.connection = asked.connection, None
        if asked.answer.stopped and connection is not None:
            connection.abort()
        self._on_end(asked)
        if not self._open:
            self._drained.set()

    async def _drain(self) -> None:
        self._drained.clear()
        try:
            await asyncio.wait_for(self._drained.wait(), self._settings.drain)
        except TimeoutError:
            return

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP)
            limit = self.now - self._settings.timeout
            late = [asked for asked in self._open if asked.sent < limit]
            for asked in late:
                self._give_up(asked, "timeout", f"no end within {self._settings.timeout:g} s")

    def _give_up(self, asked: Asked, kind: str, message: str) -> None:
        connection = asked.connection
        asked.answer.give_up(kind, message)
        if connection is not None:
            connection.abort()


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Inside, garbage is collected in small steps only: a full collection would make requests late
    and tokens look late."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 1_000_000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
