"""What operators have asked of the node and not heard of yet, and why the node decided what it
did.

An ask has a number; the Dispatcher answers each one once. Whoever asked may have gone meanwhile,
and what was begun for them goes on.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from heapq import nlargest
from itertools import chain

from appliance.core.asks import (
    Answered,
    Decided,
    Outcome,
    ParkAsked,
    RolesAsked,
    WakeAsked,
    WorkerAsked,
)
from appliance.core.types import Role, WorkerId, WorkerSpec

log = logging.getLogger(__name__)
Ask = RolesAsked | ParkAsked | WakeAsked | WorkerAsked
ROOM = {"node": 1000, "requests": 400, "door": 100}
"""Decisions that are kept: about the node itself, about single requests, and that requests are
turned away. Overload makes many of the latter two, which push none of the first out."""
RINGS = {"demote": "requests", "refuse": "requests", "turn_away": "door"}
"""By kind; all others are about the node."""


class Asks:
    """Open asks, and the last decisions."""

    def __init__(self, post: Callable[[Ask], None], *, specs: dict[WorkerId, WorkerSpec]) -> None:
        """`post` lets the Dispatcher hear an ask. A worker that is asked for is put into `specs`
        before."""
        self._post = post
        self._specs = specs
        self._next = 1
        self._open: dict[int, asyncio.Future[Answered]] = {}
        self._rings: dict[str, OrderedDict[int, Decided]] = {name: OrderedDict() for name in ROOM}
        """Decisions by number."""
        self._refusal = ""
        """Why nothing can be asked any more."""

    # --- asking --------------------------------------------------------------------------------

    async def roles(self, roles: Sequence[tuple[WorkerId, Role]]) -> Answered:
        """Let these workers take these roles, all or none; returns when they serve so, or when the
        old roles are back."""
        pairs = tuple(roles)
        return await self._ask(lambda ask: RolesAsked(ask=ask, roles=pairs))

    async def park(self, worker: WorkerId) -> Answered:
        """Take a worker out of service, its process kept."""
        return await self._ask(lambda ask: ParkAsked(ask=ask, worker=worker))

    async def wake(self, worker: WorkerId) -> Answered:
        """Put a parked worker back in service."""
        return await self._ask(lambda ask: WakeAsked(ask=ask, worker=worker))

    async def worker(
        self, devices: tuple[str, ...], *, role: Role = Role.MIXED, parked: bool = False
    ) -> tuple[WorkerId, Answered]:
        """Add a worker on these devices; returns when it serves (or stands by), or cannot."""
        worker = WorkerId(max(self._specs) + 1)
        spec = WorkerSpec(id=worker, devices=devices, role=role, parked=parked)
        self._specs[worker] = spec
        answer = await self._ask(lambda ask: WorkerAsked(ask=ask, spec=spec))
        if answer.outcome is Outcome.REFUSED:
            self._specs.pop(worker, None)
        return worker, answer

    async def _ask(self, make: Callable[[int], Ask]) -> Answered:
        number = self._next
        self._next += 1
        if self._refusal:
            return _refused(number, self._refusal)
        future: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self._open[number] = future
        try:
            self._post(make(number))
            return await future
        finally:
            self._open.pop(number, None)

    # --- what the Dispatcher says --------------------------------------------------------------

    def answered(self, answer: Answered) -> None:
        """The Dispatcher has answered; nobody may wait for it any more."""
        future = self._open.get(answer.ask)
        if future is not None and not future.done():
            future.set_result(answer)

    def decided(self, decision: Decided) -> None:
        """Keep a decision; one that is known is replaced where it stands."""
        _say(decision)
        name = RINGS.get(decision.kind, "node")
        ring = self._rings[name]
        ring[decision.decision] = decision
        if len(ring) > ROOM[name]:
            ring.popitem(last=False)

    def decisions(self, limit: int) -> list[Decided]:
        """The last `limit` decisions that are kept, newest first."""
        kept = chain.from_iterable(ring.values() for ring in self._rings.values())
        return nlargest(limit, kept, key=lambda decision: decision.decision)

    def refuse(self, reason: str) -> None:
        """Nothing more will be answered: refuse what is open and what will come."""
        self._refusal = reason
        for number, future in self._open.items():
            if not future.done():
                future.set_result(_refused(number, reason))


def _say(decision: Decided) -> None:
    """Into the log, when it is over; what lasts until something changes also when it begins."""
    if decision.kind == "none":
        return
    lasts = decision.kind in ("fallback", "turn_away")
    level = logging.INFO if decision.outcome or lasts else logging.DEBUG
    words: dict[str, object] = {
        "workers": list(decision.workers),
        "by": decision.by,
        "trigger": decision.trigger,
    }
    if decision.outcome:
        words["outcome"] = decision.outcome
    log.log(level, "decision: %s", decision.kind, extra=words)


def _refused(ask: int, reason: str) -> Answered:
    return Answered(ask=ask, outcome=Outcome.REFUSED, seconds=0.0, reason=reason)
