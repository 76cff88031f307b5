"""What the soak does to roles: operators who change them, swap them and park workers, and impatient
clients, while everything else goes on.

How an operator's request ended is booked by outcome. Legal are `done`, `rolled_back` (a worker died
or did not answer in time) and 409 (a worker is down, or is changing already); anything else, and no
answer within `ASK_SECONDS`, is a violation.
"""

import asyncio
import random
import time
from collections.abc import Mapping
from typing import Any

import aiohttp

from appliance.core.types import Record
from tools.soak_clients import Clients

ROLES = ("prefill", "decode", "mixed")
ASK_SECONDS = 45.0
"""Far more than any change may take with the server's defaults."""
PARK_SHARE = 0.02
"""Of an operator's changes that are park and wake."""
SWAP_SHARE = 0.2
"""That change two workers as one."""
NUM_OPERATORS = 6
NUM_LEAVERS = 8


class Goals(Record, frozen=True, kw_only=True):
    """What a run must have done before it counts; 0 for what is not asked for."""

    kills: int = 0
    """Workers hit, by whichever signal."""
    flips: int = 0
    """Workers that took another role because they were told to."""
    aborts: int = 0
    """Requests whose client left before their end."""

    @staticmethod
    def done(counts: Mapping[str, int]) -> dict[str, int]:
        """What the accounts say to each goal."""
        hits = sum(count for name, count in counts.items() if name.startswith("workers hit"))
        return {"kills": hits, "flips": counts["flips done"], "aborts": counts["abandoned"]}

    def missing(self, counts: Mapping[str, int]) -> list[str]:
        """Goals that are not reached, in words."""
        done = self.done(counts)
        wanted = {"kills": self.kills, "flips": self.flips, "aborts": self.aborts}
        return [
            f"{done[name]} {name} of {goal}" for name, goal in wanted.items() if done[name] < goal
        ]


class Changers:
    """All who change roles, and those who leave early, of one run."""

    def __init__(self, clients: Clients, goals: Goals, *, num_workers: int, seconds: float) -> None:
        """`seconds`: how long the run is; the goals are spread over nine tenths of it."""
        self._clients = clients
        self._goals = goals
        self._num_workers = num_workers
        self._seconds = 0.9 * seconds

    def work(self, rng: random.Random) -> list[Any]:
        """Coroutines for one round; they end with it (`Clients.until`)."""
        found: list[Any] = []
        if self._goals.flips:
            seeds = [rng.getrandbits(64) for _ in range(NUM_OPERATORS)]
            found += [self._operator(random.Random(seed)) for seed in seeds]
        if self._goals.aborts:
            seeds = [rng.getrandbits(64) for _ in range(NUM_LEAVERS)]
            found += [self._leaver(random.Random(seed)) for seed in seeds]
        return found

    def _ahead(self, name: str) -> bool:
        """Whether more has been done than was due by now."""
        accounts = self._clients.accounts
        wanted = {"flips": self._goals.flips, "aborts": self._goals.aborts}[name]
        share = (time.monotonic() - accounts.began) / self._seconds
        return Goals.done(accounts.counts)[name] > wanted * share

    async def _operator(self, rng: random.Random) -> None:
        while time.monotonic() < self._clients.until:
            if self._ahead("flips"):
                await asyncio.sleep(0.1)
                continue
            drawn = rng.random()
            if drawn < PARK_SHARE:
                await self._park(rng)
            elif drawn < PARK_SHARE + SWAP_SHARE and self._num_workers > 1:
                one, two = rng.sample(range(self._num_workers), 2)
                roles = {str(one): rng.choice(ROLES), str(two): rng.choice(ROLES)}
                await self._ask("roles", roles, flips=2)
            else:
                worker = rng.randrange(self._num_workers)
                await self._ask(f"workers/{worker}/role", {"role": rng.choice(ROLES)}, flips=1)
            await asyncio.sleep(0.2 * rng.random())

    async def _park(self, rng: random.Random) -> None:
        """Out of service and back: a round ends with every worker in service."""
        worker = rng.randrange(self._num_workers)
        if await self._ask(f"workers/{worker}/park", {}, name="parks"):
            await asyncio.sleep(rng.random())
            if not await self._ask(f"workers/{worker}/wake", {}, name="wakes"):
                await asyncio.sleep(1.0)
                await self._ask(f"workers/{worker}/wake", {}, name="wakes")

    async def _ask(
        self, path: str, body: Mapping[str, Any], *, flips: int = 0, name: str = "flips"
    ) -> bool:
        """One change; whether it was done. A flip counts for each worker that it is said of, also
        where the worker has that role already: that is answered at once and is booked apart."""
        accounts, begun = self._clients.accounts, time.monotonic()
        try:
            async with (
                asyncio.timeout(ASK_SECONDS),
                self._clients.session.post(f"{self._clients.url}/admin/{path}", json=body) as reply,
            ):
                document = await reply.json()
        except (TimeoutError, aiohttp.ClientError) as error:
            accounts.violate("operator", f"{path} {body}: {error!r}")
            return False
        seconds = time.monotonic() - begun
        outcome = document.get("outcome", "")
        if reply.status == 409:
            accounts.counts[f"{name} refused"] += 1
        elif reply.status != 200 or outcome not in ("done", "rolled_back"):
            accounts.violate("operator", f"{path} {body}: {reply.status} {document}")
        elif outcome == "done" and flips and document["seconds"] == 0.0:
            accounts.counts["flips to the same role"] += 1
        else:
            word = "done" if outcome == "done" else "rolled back"
            accounts.counts[f"{name} {word}"] += flips or 1
            accounts.counts[f"moved by {name}"] += document["migrated"]
            for who, taken in (("client", seconds), ("server", document["seconds"])):
                slowest = f"slowest of {name} for the {who}, ms"
                accounts.counts[slowest] = max(accounts.counts[slowest], round(1000 * taken))
        return bool(outcome == "done")

    async def _leaver(self, rng: random.Random) -> None:
        while time.monotonic() < self._clients.until:
            if self._ahead("aborts"):
                await asyncio.sleep(0.05)
                continue
            await self._clients.abandon(rng)
