"""The copying thread: order, verification, and failures that stay with their job (R13)."""

import select
import threading
from collections.abc import Callable, Iterator, Sequence
from zlib import crc32

import pytest

from appliance.core.faults import FaultPlan, FaultRule
from appliance.core.peer import CopyDone, CopyJob, FetchDone, FetchJob
from appliance.core.types import MoveId, RequestId, WorkerId
from appliance.worker.fault_actions import FaultPoints, InjectedFault
from appliance.worker.mover import Done, Mover, Probed

PEER = WorkerId(3)


class FakePool:
    """A peer's pool whose copies wait for the test, slice by slice."""

    path = "test"
    block_bytes = 10

    def __init__(self, *, free: bool = True) -> None:
        self.generation = dict.fromkeys(range(100), 5)
        self.name = {block: 1000 + block for block in range(100)}
        self.steps: list[tuple[int, int]] = []
        """(first source, slice) in the order of copying."""
        self.during: Callable[[int], None] = lambda _source: None
        self.gate = threading.Semaphore(10**6 if free else 0)
        self.begun = threading.Semaphore(0)
        self.num_slices = 1

    def probe(self) -> float:
        return 1e9

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> Iterator[None]:
        if any(source >= 100 for source in sources):
            raise IndexError("no such block")
        for number in range(self.num_slices):
            if number:
                yield
            self.begun.release()
            assert self.gate.acquire(timeout=20)
            self.steps.append((sources[0] if sources else -1, number))
            self.during(number)

    def generations(self, blocks: Sequence[int]) -> list[int]:
        return [self.generation[block] for block in blocks]

    def names(self, blocks: Sequence[int]) -> list[int]:
        return [self.name[block] for block in blocks]

    def find(self, hashes: Sequence[int]) -> tuple[list[int], list[int]]:
        by_name = {name: block for block, name in self.name.items()}
        blocks: list[int] = []
        for content in hashes:
            if content not in by_name:
                break
            blocks.append(by_name[content])
        return blocks, self.generations(blocks)


class Rig:
    def __init__(self, *rules: FaultRule) -> None:
        plan = FaultPlan(rules, worker=WorkerId(0), epoch=1)
        self.mover = Mover(checksum=lambda block: crc32(bytes([block])), faults=FaultPoints(plan))

    def done(self, count: int = 1) -> list[Done]:
        found: list[Done] = []
        while len(found) < count:
            assert select.select([self.mover.fileno()], [], [], 20)[0]
            found += self.mover.drain()
        return found


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(*rules: FaultRule) -> Rig:
        made.append(Rig(*rules))
        return made[-1]

    yield make
    for each in made:
        each.mover.stop()


RigMaker = Callable[..., Rig]


def job(move: int, *sources: int, slack: float | None = None, **more: object) -> CopyJob:
    given = {"checksums": (), **more}
    return CopyJob(
        move=MoveId(move),
        peer=PEER,
        sources=sources,
        targets=tuple(range(len(sources))),
        generations=(5,) * len(sources),
        slack=slack,
        **given,  # type: ignore[arg-type]
    )


def failed(done: Done) -> str:
    assert isinstance(done, CopyDone)
    return done.failed


def test_copy_is_reported_with_what_it_cost(rig: RigMaker) -> None:
    here = rig()
    here.mover.copy(job(1, 7, 8), FakePool())
    (done,) = here.done()
    assert isinstance(done, CopyDone)
    assert (done.move, done.num_bytes, done.path, done.failed) == (1, 20, "test", "")
    assert done.seconds >= 0
    assert here.mover.drain() == []


def test_least_slack_goes_first_and_jobs_of_a_move_keep_their_order(rig: RigMaker) -> None:
    here, pool = rig(), FakePool(free=False)
    here.mover.copy(job(1, 10), pool)
    assert pool.begun.acquire(timeout=20)  # it runs; the others wait
    here.mover.copy(job(2, 20), pool)
    here.mover.copy(job(3, 30, slack=9.0), pool)
    here.mover.copy(job(4, 40, slack=1.0), pool)
    here.mover.copy(job(4, 41, slack=8.0), pool)
    here.mover.copy(job(2, 21, slack=0.1), pool)
    pool.gate.release(100)
    moves = [done.move for done in here.done(6) if isinstance(done, CopyDone)]
    assert moves == [1, 2, 2, 4, 4, 3]
    assert [source for source, _ in pool.steps] == [10, 20, 21, 40, 41, 30]


def test_urgent_job_goes_between_two_slices_of_a_long_one(rig: RigMaker) -> None:
    here, pool = rig(), FakePool(free=False)
    pool.num_slices = 3
    here.mover.copy(job(1, 10), pool)
    assert pool.begun.acquire(timeout=20)
    here.mover.copy(job(2, 20, slack=0.0), pool)
    pool.gate.release(100)
    assert [done.move for done in here.done(2) if isinstance(done, CopyDone)] == [2, 1]
    assert pool.steps == [(10, 0), (20, 0), (20, 1), (20, 2), (10, 1), (10, 2)]


@pytest.mark.parametrize("when", ["before", "while"])
def test_r13_block_with_another_generation_fails_the_copy(rig: RigMaker, when: str) -> None:
    here, pool = rig(), FakePool()
    if when == "before":
        pool.generation[8] = 6
    else:
        pool.during = lambda _slice: pool.generation.update({8: 6})
    here.mover.copy(job(1, 7, 8), pool)
    (done,) = here.done()
    assert failed(done).startswith(
        f"block 8 of worker 3 was given to other content {when} it was copied (generation 6"
    )
    assert bool(pool.steps) == (when == "while")


def test_r13_block_with_another_checksum_fails_the_copy(rig: RigMaker) -> None:
    here = rig()
    here.mover.copy(job(1, 7, 8, checksums=(crc32(b"\0"), crc32(b"\1"))), FakePool())
    here.mover.copy(job(1, 7, 8, checksums=(crc32(b"\0"), 1)), FakePool())
    good, bad = here.done(2)
    assert failed(good) == ""
    assert failed(bad) == "block 8 of worker 3 arrived with another checksum"


def test_block_that_does_not_exist_fails_its_job_only(rig: RigMaker) -> None:
    here, pool = rig(), FakePool()
    pool.generation[100] = 5
    here.mover.copy(job(1, 100), pool)
    here.mover.copy(job(2, 7), pool)
    assert [failed(done) for done in here.done(2)] == ["no such block", ""]


def fetch(*hashes: int) -> FetchJob:
    targets = tuple(range(len(hashes)))
    return FetchJob(request_id=RequestId(9), peer=PEER, hashes=hashes, targets=targets)


def test_fetch_brings_the_leading_blocks_that_are_there(rig: RigMaker) -> None:
    here = rig()
    here.mover.fetch(fetch(1007, 1008), FakePool())
    here.mover.fetch(fetch(1007, 55, 1008), FakePool())
    whole, part = here.done(2)
    assert isinstance(whole, FetchDone)
    assert isinstance(part, FetchDone)
    assert (whole.num_blocks, whole.num_bytes, whole.reason) == (2, 20, "")
    assert (part.num_blocks, part.num_bytes) == (1, 10)
    assert part.reason == "2 of 3 blocks are not in its cache any more"


@pytest.mark.parametrize("what", ["generation", "name"])
def test_r13_fetched_block_that_changed_meanwhile_is_not_used(rig: RigMaker, what: str) -> None:
    here, pool = rig(), FakePool()
    changing = pool.generation if what == "generation" else pool.name
    pool.during = lambda _slice: changing.update({8: 0})
    here.mover.fetch(fetch(1007, 1008, 1009), pool)
    (done,) = here.done()
    assert isinstance(done, FetchDone)
    assert (done.num_blocks, done.num_bytes) == (1, 30)
    assert done.reason == "2 of 3 blocks changed while they were copied"


@pytest.mark.parametrize(
    "point", ["move.before_copy", "move.after_copy", "fetch.before_copy", "fetch.after_copy"]
)
def test_refusal_at_a_point_is_a_failed_copy(rig: RigMaker, point: str) -> None:
    here = rig(FaultRule(point=point, action="refuse"))
    here.mover.copy(job(1, 7), FakePool())
    here.mover.fetch(fetch(1007), FakePool())
    copied, fetched = here.done(2)
    assert isinstance(fetched, FetchDone)
    reasons = {failed(copied), fetched.reason}
    assert reasons == {"", f"injected at {point}"}
    assert (fetched.num_blocks == 0) == point.startswith("fetch")


def test_what_breaks_in_the_thread_breaks_the_loop(rig: RigMaker) -> None:
    here = rig(FaultRule(point="move.before_copy", action="raise"))
    here.mover.copy(job(1, 7), FakePool())
    assert select.select([here.mover.fileno()], [], [], 20)[0]
    with pytest.raises(InjectedFault):
        here.mover.drain()


def test_probe_tells_speed_or_why_not(rig: RigMaker) -> None:
    here = rig(FaultRule(point="link.probe", action="refuse", nth=2))
    for epoch in (1, 2):
        here.mover.probe(PEER, epoch, FakePool())
    first, second = here.done(2)
    assert first == Probed(peer=PEER, epoch=1, path="test", bytes_per_second=1e9)
    assert isinstance(second, Probed)
    assert (second.epoch, second.failed) == (2, "injected at link.probe")
