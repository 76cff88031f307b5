"""The target's side of a move, and blocks fetched by content, transition by transition."""

import re
from dataclasses import dataclass, field

import pytest

from appliance.core.batcher import Batcher
from appliance.core.committing import ProtocolError
from appliance.core.messages import (
    Abort,
    Aborted,
    Assign,
    CacheChanged,
    Heartbeat,
    KvPulled,
    Migrate,
    Park,
    PrefixPulled,
    Pull,
    PullFailed,
    Refused,
    Release,
    Report,
)
from appliance.core.peer import (
    Asked,
    CopyDone,
    Dropped,
    FetchDone,
    FetchJob,
    Offered,
    Taken,
    Withdrawn,
)
from appliance.core.types import (
    BatcherConfig,
    ErrorKind,
    MoveId,
    Phase,
    Request,
    RequestId,
    Slo,
    WorkerId,
)
from tests.core.test_exporting import kinds
from tests.core.toy_worker import FCFS, WORKER, paged, result_of, window

PEER = WorkerId(1)
MOVE = MoveId(7)
ID = RequestId(1)
HASHES = (101, 102)


def request(number: int = 1, **facts: object) -> Request:
    told = {"prompt_tokens": 9, "max_tokens": 20, "prefix_hashes": HASHES} | facts
    return Request(id=RequestId(number), arrived=0.0, **told)  # type: ignore[arg-type]


def copied(*, failed: str = "", move: MoveId = MOVE) -> CopyDone:
    return CopyDone(move=move, num_bytes=100, seconds=0.1, path="memory", failed=failed)


@dataclass
class Target:
    """A Batcher (blocks of 4) that hears of one request of 9 prompt tokens."""

    blocks: int = 32
    slots: int = 4
    depth: int = 0
    batcher: Batcher = field(init=False)

    def __post_init__(self) -> None:
        config = BatcherConfig(max_model_len=64, max_num_seqs=self.slots, depth=self.depth)
        self.batcher = Batcher(WORKER, config, groups=[paged(self.blocks)], policy=FCFS)

    def pull(self, number: int = 1, *, emitted: int = 0, **facts: object) -> list[Report]:
        command = Pull(
            worker=WORKER,
            move=MoveId(6 + number),
            request=request(number, **facts),
            source=PEER,
            emitted_tokens=emitted,
        )
        return self.batcher.handle(command, 0.0)

    def offer(self, first: int, count: int, *, final: int | None = None) -> list[Report]:
        """`final`: tokens of KV; then one token was emitted after 9."""
        message = Offered(
            move=MOVE,
            first=first,
            blocks=tuple(range(20, 20 + count)),
            generations=(3,) * count,
            num_tokens=4 * (first + count) if final is None else final,
            final=final is not None,
            num_emitted=0 if final is None else final - 8,
            cached_tokens=4,
        )
        hashes = HASHES if final is not None else ()
        return self.batcher.hear_peer(PEER, message, 1.0, hashes=hashes)

    def said(self) -> list[object]:
        return [message for peer, message in self.batcher.drain_peer() if peer == PEER]

    def assign(self, number: int, **facts: object) -> list[Report]:
        command = Assign(worker=WORKER, request=request(number, **facts))
        return self.batcher.handle(command, 0.0)

    def fill(self, number: int, blocks: int) -> None:
        """Let a sequence hold so many blocks."""
        self.assign(number, prompt_tokens=4 * blocks - 1, prefix_hashes=())
        self.step()

    def step(self) -> None:
        plan = self.batcher.next_step(0.0)
        self.batcher.finish_step(result_of(plan, 1), 0.0)


def test_from_pull_to_the_first_step() -> None:
    target = Target()
    assert kinds(target.pull()) == ["Heartbeat"], "blocks are held"
    assert target.said() == [Asked(move=MOVE, num_blocks=0, room=4)]
    assert not target.batcher.has_work()
    assert not target.batcher.is_live(ID)
    target.offer(0, 2)
    (job,) = target.batcher.drain_copies()
    assert (job.peer, job.sources, job.generations) == (PEER, (20, 21), (3, 3))
    taken = {block for block, _ in target.batcher.drain_index().taken}
    assert set(job.targets) <= taken
    reports = target.batcher.copied(copied(), 1.0)
    assert reports == [CacheChanged(worker=WORKER, added=HASHES)]
    assert target.batcher.drain_index().named == tuple(zip(job.targets, HASHES, strict=True))
    assert target.said() == [Taken(move=MOVE, num_blocks=2, room=4)]
    target.offer(2, 1, final=9)
    (last,) = target.batcher.drain_copies()
    assert len(last.targets) == 1
    reports = target.batcher.copied(copied(), 5.0)
    assert kinds(reports) == ["KvPulled", "Heartbeat"]
    pulled = reports[0]
    assert isinstance(pulled, KvPulled)
    assert (pulled.emitted_tokens, pulled.num_tokens, pulled.num_bytes) == (1, 9, 200)
    assert (pulled.source, pulled.path, pulled.seconds) == (PEER, "memory", 5.0)
    plan = target.batcher.next_step(5.0)
    assert plan is not None
    (item,) = plan.work
    assert (item.start, item.num_tokens, item.phase) == (9, 1, Phase.DECODE)
    assert item.fresh
    assert item.samples
    assert item.new_blocks[0][:3] == (*job.targets, *last.targets)


def test_what_is_cached_is_not_copied() -> None:
    target = Target()
    target.assign(5, max_tokens=1)
    target.step()
    target.pull()
    assert target.said() == [Asked(move=MOVE, num_blocks=2, room=4)]
    target.offer(2, 1, final=9)
    reports = target.batcher.copied(copied(), 1.0)
    assert isinstance(reports[0], KvPulled)
    assert reports[0].num_tokens == 1
    target = Target()
    target.assign(5, max_tokens=1)
    target.step()
    target.pull(prompt_tokens=8, emitted=1)
    assert target.said() == [Asked(move=MOVE, num_blocks=2, room=4)]
    message = Offered(
        move=MOVE, first=2, blocks=(), generations=(), num_tokens=8, final=True, num_emitted=1
    )
    reports = target.batcher.hear_peer(PEER, message, 1.0, hashes=HASHES)
    assert isinstance(reports[0], KvPulled), "nothing had to be copied"
    assert reports[0].path == "cache"


def test_R28_without_room_nothing_is_asked_until_there_is() -> None:
    target = Target(blocks=16)
    target.fill(5, 12)
    target.pull()
    assert target.said() == []
    target.batcher.handle(Abort(worker=WORKER, request_id=RequestId(5)), 0.0)
    assert target.said() == [Asked(move=MOVE, num_blocks=0, room=4)]


def test_a_slot_is_reserved_too() -> None:
    target = Target(slots=1)
    target.fill(5, 2)
    target.pull()
    assert target.said() == []
    target.batcher.handle(Abort(worker=WORKER, request_id=RequestId(5)), 0.0)
    assert target.said() == [Asked(move=MOVE, num_blocks=0, room=4)]
    target.assign(6, prefix_hashes=())
    plan = target.batcher.next_step(0.0)
    assert plan is not None, "who is here goes first: the reservation has given way"
    assert target.said() == [Dropped(move=MOVE, reason="its room was needed")]


def test_R28_a_reservation_gives_way_before_anybody_is_preempted() -> None:
    target = Target(blocks=16)
    target.fill(5, 9)
    target.pull(max_tokens=20)
    target.said()
    for _ in range(18):
        target.step()
    assert target.said() == [Dropped(move=MOVE, reason="its room was needed")]
    assert 5 in {seq.id for seq in target.batcher.queues.running}


def test_a_copy_under_way_keeps_its_blocks_until_it_ends() -> None:
    target = Target()
    target.pull()
    target.offer(0, 2)
    target.batcher.drain_copies()
    withdrawn = Withdrawn(move=MOVE, reason="preempted")
    assert target.batcher.hear_peer(PEER, withdrawn, 1.0) == []
    assert target.batcher.load().blocks_held == 4
    reports = target.batcher.copied(copied(), 1.0)
    assert kinds(reports) == ["PullFailed", "Heartbeat"]
    assert isinstance(reports[0], PullFailed)
    assert reports[0].reason == "the source has withdrawn: preempted"
    assert target.batcher.load().blocks_held == 0


def test_a_copy_that_nobody_has_begun_is_taken_back() -> None:
    target = Target()
    target.pull()
    target.offer(0, 2)
    reports = target.batcher.peer_lost(PEER, 1.0)
    assert kinds(reports) == ["PullFailed", "Heartbeat"]
    assert target.batcher.drain_copies() == []


def test_a_failed_copy_fails_the_move() -> None:
    target = Target()
    target.pull()
    target.said()
    target.offer(0, 2)
    target.batcher.drain_copies()
    reports = target.batcher.copied(copied(failed="block 20 was reused"), 1.0)
    assert isinstance(reports[0], PullFailed)
    assert reports[0].reason == "block 20 was reused"
    assert target.said() == [Dropped(move=MOVE, reason="block 20 was reused")]


def test_a_lost_source_is_finished_if_it_had_stopped() -> None:
    target = Target()
    target.pull()
    target.offer(0, 3, final=9)
    target.batcher.drain_copies()
    assert target.batcher.peer_lost(PEER, 1.0) == []
    assert isinstance(target.batcher.copied(copied(), 1.0)[0], KvPulled)


@pytest.mark.parametrize("copying", [False, True])
def test_an_abort_is_answered_when_nothing_is_written_any_more(copying: bool) -> None:
    target = Target()
    target.pull()
    target.said()
    if copying:
        target.offer(0, 2)
        target.batcher.drain_copies()
    reports = target.batcher.handle(Abort(worker=WORKER, request_id=ID), 1.0)
    assert target.said() == [Dropped(move=MOVE, reason="aborted")]
    if copying:
        assert reports == []
        reports = target.batcher.copied(copied(), 1.0)
    assert reports[0] == Aborted(worker=WORKER, request_id=ID)
    assert isinstance(reports[1], Heartbeat)
    assert target.batcher.load().blocks_free == 32


def test_what_the_source_said_before_the_node_counts() -> None:
    target = Target()
    target.batcher.hear_peer(PEER, Withdrawn(move=MOVE, reason="ended"), 0.0)
    (failed,) = target.pull()
    assert isinstance(failed, PullFailed)
    assert target.said() == []


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"first": 1}, r"blocks 1\.\. came, not of 0\.\."),
        ({"blocks": (1, 2), "generations": (1,)}, "does not fit"),
        ({"final": True, "num_tokens": 9}, "9 known ones"),
        ({"final": True, "num_tokens": 9, "num_emitted": 1}, "2 blocks came"),
        ({"final": True, "num_tokens": 9, "num_emitted": 20}, "cannot be"),
    ],
)
def test_an_offer_without_sense_fails_the_move(facts: dict[str, object], words: str) -> None:
    target = Target()
    target.pull()
    told = {"first": 0, "blocks": (1, 2), "generations": (1, 1), "num_tokens": 8} | facts
    reports = target.batcher.hear_peer(PEER, Offered(move=MOVE, **told), 0.0)  # type: ignore[arg-type]
    assert isinstance(reports[0], PullFailed)
    assert re.search(words, reports[0].reason)


def test_room_grows_with_what_the_source_offers() -> None:
    target = Target()
    target.pull(max_tokens=50)
    target.offer(0, 2)
    target.batcher.copied(copied(), 0.0)
    target.said()
    target.offer(2, 3)
    assert target.said() == [Taken(move=MOVE, num_blocks=2, room=7)]


def test_what_cannot_be_taken_over_is_refused_and_the_source_told() -> None:
    target = Target()
    target.batcher.handle(Park(worker=WORKER), 0.0)
    (refused,) = target.pull()
    assert isinstance(refused, Refused)
    assert (refused.command, refused.kind) == ("Pull", ErrorKind.NO_WORKER)
    assert target.said() == [Dropped(move=MOVE, reason="worker 0 is parked")]
    config = BatcherConfig(max_model_len=64)
    target.batcher = Batcher(WORKER, config, groups=[paged(64), window(64, tokens=9)], policy=FCFS)
    (refused,) = target.pull()
    assert isinstance(refused, Refused)
    assert "one paged cache group" in refused.reason


def test_what_is_here_or_on_its_way_is_not_given_twice() -> None:
    target = Target()
    target.pull()
    with pytest.raises(ProtocolError, match="given twice: request 1"):
        target.pull()
    with pytest.raises(ProtocolError, match="given twice: request 1"):
        target.assign(1)
    with pytest.raises(ProtocolError, match="not under way"):
        target.batcher.copied(copied(), 0.0)


def move(source: Batcher, target: Batcher, wanted: Request, *, number: int, now: float) -> None:
    """Let a sequence that decodes go from one Batcher to another, all the way."""
    emitted = source.queues.by_id[wanted.id].num_emitted
    pull = Pull(
        worker=target.worker,
        move=MoveId(number),
        request=wanted,
        source=source.worker,
        emitted_tokens=emitted,
    )
    target.handle(pull, now)
    go = Migrate(
        worker=source.worker,
        move=MoveId(number),
        request_id=wanted.id,
        target=target.worker,
        live=False,
        lease_seconds=10.0,
    )
    source.handle(go, now)
    for _ in range(5):
        for _, message in target.drain_peer():
            source.hear_peer(target.worker, message, now)
        for _, message in source.drain_peer():
            final = isinstance(message, Offered) and message.final
            hashes = wanted.prefix_hashes if final else ()
            target.hear_peer(source.worker, message, now, hashes=hashes)
        for job in target.drain_copies():
            target.copied(copied(move=job.move), now)
    assert target.is_live(wanted.id)
    source.handle(Release(worker=source.worker, request_id=wanted.id, move=MoveId(number)), now)
    assert not source.is_live(wanted.id)


@pytest.mark.parametrize("before", [0, 1])
def test_after_two_moves_the_true_first_token_is_known(before: int) -> None:
    """`before`: tokens of a worker that died."""
    config = BatcherConfig(max_model_len=64)
    first, second, third = (
        Batcher(WorkerId(number), config, groups=[paged(32)], policy=FCFS) for number in range(3)
    )
    wanted = request(slo=Slo(ttft=5.0, tpot=0.5))
    first.handle(Assign(worker=first.worker, request=wanted, emitted_tokens=before), 0.0)
    first.finish_step(result_of(first.next_step(0.0), 1), 1.0)
    assert first.queues.by_id[ID].first_token_at == 1.0
    move(first, second, wanted, number=1, now=2.0)
    second.finish_step(result_of(second.next_step(2.0), 1), 3.0)
    move(second, third, wanted, number=2, now=4.0)
    for now in (5.0, 6.0):
        seq = third.queues.by_id[ID]
        assert (seq.first_token_at, seq.emitted_before) == (1.0, before)
        third.finish_step(result_of(third.next_step(now), 1), now)
    assert third.queues.by_id[ID].num_emitted == before + 4


@pytest.mark.parametrize(
    ("slo", "left"),
    [(Slo(), None), (Slo(ttft=2.0, tpot=0.5), 2.0), (Slo(ttft=2.0, tpot=0.5, e2e=2.5), 1.5)],
)
def test_a_copy_says_how_long_its_next_token_can_wait(slo: Slo, left: float | None) -> None:
    target = Target()
    target.pull(slo=slo, emitted=2)
    target.offer(0, 2)
    (job,) = target.batcher.drain_copies()
    assert job.slack == (None if left is None else pytest.approx(left))


# --- blocks by content ----------------------------------------------------------------------------


def fetching(target: Target, *, pull_blocks: int = 2, number: int = 1) -> list[Report]:
    command = Assign(
        worker=WORKER, request=request(number), pull_from=PEER, pull_blocks=pull_blocks
    )
    return target.batcher.handle(command, 0.0)


def fetched(num_blocks: int, reason: str = "") -> FetchDone:
    return FetchDone(
        request_id=ID,
        num_blocks=num_blocks,
        num_bytes=64 * num_blocks,
        seconds=0.1,
        path="memory",
        reason=reason,
    )


def test_what_was_fetched_is_found_in_the_cache() -> None:
    target = Target()
    assert kinds(fetching(target)) == ["Heartbeat"]
    (job,) = target.batcher.drain_fetches()
    assert isinstance(job, FetchJob)
    assert (job.peer, job.hashes, len(job.targets)) == (PEER, HASHES, 2)
    assert not target.batcher.has_work()
    assert target.batcher.next_step(0.0) is None
    reports = target.batcher.fetched(fetched(2), 1.0)
    assert kinds(reports) == ["PrefixPulled", "Heartbeat", "CacheChanged"]
    assert isinstance(reports[0], PrefixPulled)
    assert (reports[0].wanted, reports[0].num_blocks, reports[0].reason) == (2, 2, "")
    plan = target.batcher.next_step(1.0)
    assert plan is not None
    assert (plan.work[0].start, plan.work[0].num_tokens) == (8, 1)
    assert plan.work[0].new_blocks[0][:2] == job.targets


def test_what_could_not_be_fetched_is_computed() -> None:
    target = Target()
    fetching(target)
    reports = target.batcher.fetched(fetched(1, "block 2 is gone"), 1.0)
    assert isinstance(reports[0], PrefixPulled)
    assert (reports[0].num_blocks, reports[0].reason) == (1, "block 2 is gone")
    plan = target.batcher.next_step(1.0)
    assert plan is not None
    assert (plan.work[0].start, plan.work[0].num_tokens) == (4, 5)


def test_nothing_is_fetched_without_room_or_need() -> None:
    target = Target(blocks=16)
    target.fill(5, 15)
    reports = fetching(target)
    assert isinstance(reports[0], PrefixPulled)
    assert (reports[0].wanted, reports[0].num_blocks) == (2, 0)
    assert reports[0].reason == "there is no room"
    assert target.batcher.drain_fetches() == []
    target = Target()
    target.assign(5, max_tokens=1)
    target.step()
    reports = fetching(target)
    assert isinstance(reports[0], PrefixPulled)
    assert (reports[0].wanted, reports[0].reason) == (0, "")


def test_an_abort_during_a_fetch_is_answered_at_its_end_and_keeps_what_came() -> None:
    target = Target()
    fetching(target)
    reports = target.batcher.handle(Abort(worker=WORKER, request_id=ID), 0.0)
    assert kinds(reports) == ["Heartbeat"]
    assert not target.batcher.is_live(ID)
    with pytest.raises(ProtocolError, match="given twice"):
        fetching(target)
    reports = target.batcher.fetched(fetched(2), 1.0)
    assert kinds(reports) == ["Aborted", "Heartbeat", "CacheChanged"]
    assert target.batcher.load().blocks_cached == 2
    with pytest.raises(ProtocolError, match="not under way"):
        target.batcher.fetched(fetched(2), 1.0)


def test_a_sibling_that_waits_for_its_leader_fetches_nothing() -> None:
    target = Target()
    target.assign(1, group=RequestId(1))
    command = Assign(
        worker=WORKER, request=request(2, group=RequestId(1)), pull_from=PEER, pull_blocks=2
    )
    reports = target.batcher.handle(command, 0.0)
    assert isinstance(reports[0], PrefixPulled)
    assert "leader" in reports[0].reason
