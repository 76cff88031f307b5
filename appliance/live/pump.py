"""One message after the other through the Dispatcher, each answer carried out before the next
message.

Messages that come up while one is being handled (a sink that gives up in the middle of a frame, a
worker that cannot be started) wait in the inbox. The Dispatcher's wish to be woken is one timer
of the loop, set anew after each round.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from appliance.core.dispatcher import Dispatcher
from appliance.core.journal import Journal
from appliance.core.messages import Input, Output, Woke

log = logging.getLogger(__name__)
MIN_DELAY = 0.001
"""Seconds; loops round timers to milliseconds, a shorter one might fire too early again and
again."""


class Hands(Protocol):
    """Who carries out what the Dispatcher says."""

    def note(self, message: Input, now: float) -> None:
        """This was handled; its outputs follow."""

    def carry_out(self, output: Output, now: float) -> None:
        """Do it. May post messages."""

    def settled(self) -> None:
        """The inbox is empty."""

    def failed(self, words: str) -> None:
        """The Dispatcher or a hand raised: nothing more is handled."""


class Pump:
    """The inbox and the timer of one Dispatcher."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        journal: Journal,
        *,
        hands: Hands,
        clock: Callable[[], float],
    ) -> None:
        self._dispatcher = dispatcher
        self._journal = journal
        self._hands = hands
        self._clock = clock
        self._inbox: deque[tuple[str, Input]] = deque()
        self._held = False
        self._stopped = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self.failure = ""
        """Why nothing is handled any more; empty while all is well."""

    def post(self, source: str, message: Input) -> None:
        """Hear a message: now, or after those that are being handled."""
        self.post_all(source, (message,))

    def post_all(self, source: str, messages: Iterable[Input]) -> None:
        """Hear messages in this order. `source` says who spoke, for the journal."""
        if self._stopped:
            return
        self._inbox.extend((source, message) for message in messages)
        if not self._held:
            self._run()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Let messages wait; what has come up is handled with the next `post`."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def stop(self) -> None:
        """Handle nothing more, wake no more."""
        self._stopped = True
        self._inbox.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _run(self) -> None:
        try:
            with self.hold():
                while self._inbox:
                    source, message = self._inbox.popleft()
                    now = self._clock()
                    outputs = self._dispatcher.handle(message, now)
                    self._journal.record(now, source, message, outputs)
                    self._hands.note(message, now)
                    for output in outputs:
                        self._hands.carry_out(output, now)
        except Exception as error:
            log.exception("the scheduler failed")
            self.stop()
            self.failure = f"the scheduler failed: {error}"
            self._hands.failed(self.failure)
        else:
            self._set_timer()
        self._hands.settled()

    def _set_timer(self) -> None:
        wakeup = self._dispatcher.next_wakeup()
        if wakeup == self._timer_at or self._stopped:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = wakeup
        if wakeup is not None:
            delay = max(MIN_DELAY, wakeup - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self._wake)

    def _wake(self) -> None:
        self._timer = self._timer_at = None
        self.post("clock", Woke())
