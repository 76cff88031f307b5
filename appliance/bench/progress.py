"""What a person sees while a run goes on: one live line at a terminal, else a line now and then."""

import asyncio
from collections import deque
from time import perf_counter

from rich.console import Console
from rich.live import Live
from rich.text import Text

from appliance.bench.loop import OpenLoop
from appliance.bench.points import Point
from appliance.metrics.outcome import Outcome
from appliance.metrics.score import VOID_LATENESS, attained, quantile

LIVE_INTERVAL = 0.5
PLAIN_INTERVAL = 10.0
RECENT = 2_000
"""Requests whose lateness the line shows."""


class Progress:
    """Follows one run after the other."""

    def __init__(self, console: Console, *, seconds: float | None) -> None:
        """`seconds`: how long sending takes, where that is known."""
        self._console = console
        self._seconds = seconds
        self._loop: OpenLoop | None = None
        self._num_items = 0
        self._point: Point | None = None
        self._hits = 0
        self._over = 0
        self._failed = 0
        self._late: deque[float] = deque(maxlen=RECENT)

    def began(self, point: Point, loop: OpenLoop, *, num_items: int) -> None:
        """A run is about to start."""
        self._point, self._loop, self._num_items = point, loop, num_items
        self._hits = self._over = self._failed = 0
        self._late.clear()

    def ended(self, outcome: Outcome) -> None:
        """One request is over."""
        self._over += 1
        self._hits += attained(outcome)
        self._failed += bool(outcome.error)
        self._late.append(outcome.lateness)

    async def show(self) -> None:
        """Until cancelled."""
        if self._console.is_terminal:
            with Live(console=self._console, auto_refresh=False, transient=True) as live:
                while True:
                    await asyncio.sleep(LIVE_INTERVAL)
                    live.update(self.line(), refresh=True)
        last = perf_counter()
        while True:
            await asyncio.sleep(LIVE_INTERVAL)
            if perf_counter() - last >= PLAIN_INTERVAL:
                last = perf_counter()
                self._console.print(self.line())

    def line(self) -> Text:
        """The run in a line."""
        loop, point = self._loop, self._point
        if loop is None or point is None:
            return Text("asking the server")
        share = self._hits / self._over if self._over else 1.0
        late = quantile(sorted(self._late), 0.99) if self._late else 0.0
        of_all = f"/{self._seconds:.0f}" if self._seconds is not None else ""
        failed = f", {self._failed} failed" if self._failed else ""
        text = Text(f"  {point.words}  {max(0.0, loop.now):.0f}{of_all} s  ")
        text.append(f"sent {loop.num_sent}/{self._num_items}, finished {self._over}{failed}, ")
        text.append(f"open {loop.num_sent - loop.num_ended}  ")
        text.append(f"attained {share:.1%}", style=_style(share))
        text.append("  ")
        text.append(f"late {late * 1000:.1f} ms", style="red" if late > VOID_LATENESS else "")
        return text


def _style(share: float) -> str:
    return "green" if share >= 0.9 else "yellow" if share >= 0.7 else "red"
