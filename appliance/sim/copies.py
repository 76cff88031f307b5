"""Copies of KV blocks between pools: how long they take, and what may be believed of them.

As in the product, each worker copies for itself, one job at a time: the jobs of one move in their
order, the move with the least slack first. A job takes `copy_seconds` and its bytes at the rate of
the link; those that read from one worker at the same time share what it can send (looked at when a
job begins).

What was copied counts only if the source's block is still what it was: its generation is compared
afterwards, its name too where it was found by name.
"""

from collections import deque
from collections.abc import Callable, Mapping
from math import inf

from appliance.core.blocks import BlockLedger
from appliance.core.messages import HOST_TIER
from appliance.core.peer import CopyDone, CopyJob, FetchDone, FetchJob
from appliance.core.types import WorkerId
from appliance.sim.events import Events
from appliance.sim.machine import Machine

Job = CopyJob | FetchJob
Done = CopyDone | FetchDone
_Lane = tuple[str, int]


class Traffic:
    """What is being copied in the whole node, and what was."""

    def __init__(self) -> None:
        self.readers: dict[WorkerId, int] = {}
        """Copies under way by the worker they read from."""
        self.num_jobs = 0
        self.num_bytes = 0
        self.busy_seconds = 0.0


class Copier:
    """Makes the copies of one worker."""

    def __init__(
        self,
        machine: Machine,
        events: Events,
        *,
        own: BlockLedger,
        pools: Mapping[WorkerId, BlockLedger],
        traffic: Traffic,
        tell: Callable[[Done], None],
    ) -> None:
        """`pools` are those of all workers, dead ones too: a pool outlives its worker."""
        self._machine = machine
        self._events = events
        self._own = own
        self._pools = pools
        self._traffic = traffic
        self._tell = tell
        self._lanes: dict[_Lane, deque[Job]] = {}
        self._due: dict[_Lane, float] = {}
        self._busy = False

    def put(self, job: Job) -> None:
        """Make this copy; `tell` will hear what came of it."""
        if isinstance(job, CopyJob):
            lane: _Lane = ("move", job.move)
            due = inf if job.slack is None else self._events.now + job.slack
        else:
            lane, due = ("fetch", job.request_id), inf
        self._lanes.setdefault(lane, deque()).append(job)
        self._due[lane] = min(self._due.get(lane, inf), due)
        if not self._busy:
            self._begin()

    def _begin(self) -> None:
        if not self._lanes:
            return
        lane = min(self._lanes, key=self._due.__getitem__)  # the first of equals
        jobs = self._lanes[lane]
        job = jobs.popleft()
        if not jobs:
            del self._lanes[lane], self._due[lane]
        self._busy = True
        found = self._look(job)
        readers, machine = self._traffic.readers, self._machine
        readers[job.peer] = sharing = readers.get(job.peer, 0) + 1
        num_bytes = len(found) * machine.block_bytes
        rate = machine.copy_bytes_per_second / sharing
        if job.peer == HOST_TIER:
            rate = machine.host_bytes_per_second
        seconds = machine.copy_seconds + num_bytes / rate
        self._traffic.num_jobs += 1
        self._traffic.num_bytes += num_bytes
        self._traffic.busy_seconds += seconds
        self._events.later(seconds, self._end, (job, found, seconds))

    def _look(self, job: Job) -> list[tuple[int, int]]:
        """Blocks to be read, with their generations."""
        if isinstance(job, CopyJob):
            return list(zip(job.sources, job.generations, strict=True))
        if job.peer == HOST_TIER:
            tier = self._own.tier
            return [] if tier is None else [(0, 0)] * tier.find(job.hashes)
        found: list[tuple[int, int]] = []
        pool = self._pools[job.peer].pools[0]
        for content in job.hashes:
            block = pool.block_of.get(content)
            if block is None:
                break
            found.append((block, pool.generation[block]))
        return found

    def _end(self, what: tuple[Job, list[tuple[int, int]], float]) -> None:
        job, found, seconds = what
        self._traffic.readers[job.peer] -= 1
        self._busy = False
        good = len(found)
        if job.peer != HOST_TIER:
            pool = self._pools[job.peer].pools[0]
            names = job.hashes if isinstance(job, FetchJob) else (None,) * len(found)
            for number, (block, generation) in enumerate(found):
                name = names[number]
                same = name is None or pool.hash_of[block] == name
                if pool.generation[block] != generation or not same:
                    good = number
                    break
        num_bytes = good * self._machine.block_bytes
        path = self._machine.copy_path
        if isinstance(job, CopyJob):
            failed = "" if good == len(found) else f"block {found[good][0]} was reused"
            self._tell(
                CopyDone(
                    move=job.move, num_bytes=num_bytes, seconds=seconds, path=path, failed=failed
                )
            )
        else:
            reason = "" if good == len(job.hashes) else "not all blocks are there"
            self._tell(
                FetchDone(
                    request_id=job.request_id,
                    num_blocks=good,
                    num_bytes=num_bytes,
                    seconds=seconds,
                    path=path,
                    reason=reason,
                )
            )
        if not self._busy:
            self._begin()
