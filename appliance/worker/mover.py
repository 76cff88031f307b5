"""The thread that copies blocks out of peers' pools while the step loop computes.

The loop hands over jobs and goes on; what came of them it learns through an event that wakes it
where it sleeps. Jobs of one move are done in their order. Among moves the one whose sequence has
the least slack goes first, looked at anew after every slice of some megabytes, so a long copy does
not stand before an urgent short one. There is one thread, so no link ever carries two at once.

The copying itself runs without the interpreter's lock.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from math import inf

from appliance.core.peer import CopyDone, CopyJob, FetchDone, FetchJob
from appliance.core.types import BlockId, Record, WorkerId
from appliance.worker.fault_actions import FaultPoints
from appliance.worker.transfer import PeerPool


class Probed(Record, frozen=True, kw_only=True):
    """How fast the pool of this incarnation of a peer can be read; or why not (`failed`)."""

    peer: WorkerId
    epoch: int
    path: str
    bytes_per_second: float
    failed: str = ""


Done = CopyDone | FetchDone | Probed

_Work = Generator[None, None, Done]
_Lane = tuple[str, int]
"""What must stay in order: the jobs of one move, of one request, of one peer's probes."""


class _Queued:
    """The jobs of one lane."""

    __slots__ = ("due", "ticket", "works")

    def __init__(self, ticket: int) -> None:
        self.works: deque[_Work] = deque()
        self.due = inf
        self.ticket = ticket


class Mover:
    """Does jobs in a thread of its own. All methods but those of the thread belong to the loop."""

    def __init__(
        self,
        *,
        checksum: Callable[[BlockId], int],
        faults: FaultPoints,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`checksum` of one of our own blocks, for jobs that name what it must be."""
        self._checksum = checksum
        self._faults = faults
        self._clock = clock
        self._lanes: dict[_Lane, _Queued] = {}
        self._done: deque[Done] = deque()
        self._tickets = 0
        self._changed = threading.Condition()
        self._stopped = False
        self._error: Exception | None = None
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="mover", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """Readable when `drain` has something to give."""
        return self._event

    def copy(self, job: CopyJob, pool: PeerPool) -> None:
        """Do this job; a `CopyDone` will tell."""
        due = inf if job.slack is None else self._clock() + job.slack
        self._put(("move", job.move), self._copying(job, pool), due=due)

    def fetch(self, job: FetchJob, pool: PeerPool) -> None:
        """Do this job; a `FetchDone` will tell."""
        self._put(("fetch", job.request_id), self._fetching(job, pool), due=inf)

    def probe(self, peer: WorkerId, epoch: int, pool: PeerPool) -> None:
        """Measure; a `Probed` will tell. Urgent: nobody uses a link that has not been probed."""
        self._put(("probe", peer), self._probing(peer, epoch, pool), due=0.0)

    def drain(self) -> list[Done]:
        """What has been done since the last call. Raises what went wrong in the thread and was no
        failure of one copy."""
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return []
        if self._error is not None:
            raise self._error
        done: list[Done] = []
        while self._done:
            done.append(self._done.popleft())
        return done

    def stop(self) -> None:
        """Do nothing more and wait for the slice that is being copied."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()
        os.close(self._event)

    def _put(self, key: _Lane, work: _Work, *, due: float) -> None:
        with self._changed:
            lane = self._lanes.get(key)
            if lane is None:
                self._tickets += 1
                lane = self._lanes[key] = _Queued(self._tickets)
            lane.works.append(work)
            lane.due = min(lane.due, due)
            self._changed.notify()

    # --- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (found := self._next()) is not None:
                self._advance(*found)
        except Exception as error:
            self._error = error
            os.eventfd_write(self._event, 1)

    def _next(self) -> tuple[_Lane, _Work] | None:
        """The most urgent lane's oldest job, waited for; None: stop."""
        with self._changed:
            while not self._lanes and not self._stopped:
                self._changed.wait()
            if self._stopped:
                return None
            key = min(self._lanes, key=self._urgency)
            return key, self._lanes[key].works[0]

    def _urgency(self, key: _Lane) -> tuple[float, int]:
        lane = self._lanes[key]
        return lane.due, lane.ticket

    def _advance(self, key: _Lane, work: _Work) -> None:
        try:
            next(work)
        except StopIteration as end:
            done: Done = end.value
            with self._changed:
                lane = self._lanes[key]
                lane.works.popleft()
                if not lane.works:
                    del self._lanes[key]
            self._done.append(done)
            os.eventfd_write(self._event, 1)

    # --- jobs -----------------------------------------------------------------------------------

    def _copying(self, job: CopyJob, pool: PeerPool) -> Generator[None, None, CopyDone]:
        began = self._clock()
        failed = ""
        try:
            yield from self._copy(job, pool)
        except _Failed as failure:
            failed = str(failure)
        return CopyDone(
            move=job.move,
            num_bytes=len(job.sources) * pool.block_bytes,
            seconds=self._clock() - began,
            path=pool.path,
            failed=failed,
        )

    def _copy(self, job: CopyJob, pool: PeerPool) -> Generator[None, None, None]:
        """Raises `_Failed`."""
        wanted = list(job.generations)
        try:
            self._reach("move.before_copy")
            _compare(pool.generations(job.sources), wanted, job, when="before it was copied")
            yield from pool.copy(job.sources, job.targets)
            self._reach("move.after_copy")
            _compare(pool.generations(job.sources), wanted, job, when="while it was copied")
        except (IndexError, ValueError) as error:
            raise _Failed(str(error)) from error
        if job.checksums:
            for source, target, expected in zip(
                job.sources, job.targets, job.checksums, strict=True
            ):
                if self._checksum(target) != expected:
                    raise _Failed(
                        f"block {source} of worker {job.peer} arrived with another checksum"
                    )

    def _fetching(self, job: FetchJob, pool: PeerPool) -> Generator[None, None, FetchDone]:
        began, wanted = self._clock(), len(job.targets)
        num_blocks = num_copied = 0
        try:
            self._reach("fetch.before_copy")
            blocks, generations = pool.find(job.hashes[:wanted])
            num_copied = len(blocks)
            yield from pool.copy(blocks, job.targets[:num_copied])
            self._reach("fetch.after_copy")
            now = zip(pool.generations(blocks), pool.names(blocks), strict=True)
            before = zip(generations, job.hashes[:num_copied], strict=True)
            num_blocks = _num_equal(list(now), list(before))
            reason = "" if num_blocks == wanted else _why_not_all(wanted, num_copied, num_blocks)
        except (_Failed, IndexError, ValueError) as failure:
            num_blocks, reason = 0, str(failure)
        return FetchDone(
            request_id=job.request_id,
            num_blocks=num_blocks,
            num_bytes=num_copied * pool.block_bytes,
            seconds=self._clock() - began,
            path=pool.path,
            reason=reason,
        )

    def _probing(self, peer: WorkerId, epoch: int, pool: PeerPool) -> Generator[None, None, Probed]:
        speed, failed = 0.0, ""
        try:
            self._reach("link.probe")
            yield
            speed = pool.probe()
        except (_Failed, OSError, ValueError) as error:
            failed = str(error)
        return Probed(peer=peer, epoch=epoch, path=pool.path, bytes_per_second=speed, failed=failed)

    def _reach(self, point: str) -> None:
        if self._faults.refuses(point):
            raise _Failed(f"injected at {point}")


class _Failed(Exception):
    """This copy is no good."""


def _compare(found: list[int], wanted: list[int], job: CopyJob, *, when: str) -> None:
    if found != wanted:
        place = next(i for i, generation in enumerate(found) if generation != wanted[i])
        raise _Failed(
            f"block {job.sources[place]} of worker {job.peer} was given to other content {when} "
            f"(generation {found[place]}, offered with {wanted[place]})"
        )


def _num_equal(found: list[tuple[int, int]], wanted: list[tuple[int, int]]) -> int:
    for place, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if a != b:
            return place
    return len(found)


def _why_not_all(wanted: int, num_copied: int, num_blocks: int) -> str:
    if num_blocks < num_copied:
        return f"{num_copied - num_blocks} of {num_copied} blocks changed while they were copied"
    return f"{wanted - num_copied} of {wanted} blocks are not in its cache any more"
