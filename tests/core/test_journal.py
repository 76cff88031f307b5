"""The journal remembers, tells the story, and replays (laws 6 and 12)."""

from collections.abc import Callable

import msgspec
import pytest

from appliance.core.dispatcher import Dispatcher
from appliance.core.journal import (
    Journal,
    JournalError,
    JournalHeader,
    JournalRecord,
    ReplayDiffers,
    load,
    replay,
)
from appliance.core.messages import (
    Abort,
    Aborted,
    Arrived,
    Assign,
    Input,
    KvPulled,
    Migrate,
    Output,
    Preempted,
    Prefilled,
    PrefixPulled,
    Pull,
    Refused,
    Release,
    Released,
    StepReported,
    Woke,
    WorkerDown,
)
from appliance.core.types import (
    ErrorKind,
    MoveId,
    Request,
    RequestId,
    WorkerId,
    WorkerLoad,
)
from appliance.policy import make_policy
from tests.core.node_kit import Node

FIRST, SECOND = RequestId(1), RequestId(2)


class Recorded(Node):
    """A node that keeps a journal, as its shell would."""

    def __init__(
        self,
        num_workers: int = 2,
        *,
        ring_records: int = 1000,
        write: Callable[[bytes], None] | None = None,
    ) -> None:
        super().__init__(num_workers, boot=False)
        header = JournalHeader(config=self.config, workers=tuple(self.specs), policy="fcfs")
        self.journal = Journal(header, ring_records=ring_records, write=write)

    def hear(self, message: Input, *, after: float = 0.001) -> list[Output]:
        outputs = super().hear(message, after=after)
        self.journal.record(self.now, "test", message, outputs)
        return outputs


def fresh(header: JournalHeader) -> Dispatcher:
    policy = make_policy(header.policy, header.settings, roles=header.roles)
    return Dispatcher(header.config, workers=header.workers, policy=policy.dispatch)


def eventful(node: Recorded) -> None:
    """Deaths, a refusal, a cancel, a preemption, ends."""
    node.hear(Woke())
    node.up(0)
    node.up(1)
    for number in range(1, 13):
        node.arrive(number, prompt=10 + number)
    home = node.where[1]
    node.step(home, [1])
    node.hear(Preempted(worker=WorkerId(home), request_id=FIRST, lost_tokens=12))
    node.step(home, [1], counts=[2])
    node.down(home)
    node.respawn(home)
    mates = node.at(1 - home)
    node.cancel(mates[0])
    node.hear(Aborted(worker=WorkerId(1 - home), request_id=RequestId(mates[0])))
    refusal = Refused(
        worker=WorkerId(1 - home),
        command="Assign",
        kind=ErrorKind.INTERNAL,
        reason="no room",
        request_id=RequestId(mates[1]),
    )
    node.hear(refusal)
    for _ in range(20):
        for worker in range(2):
            if here := node.at(worker):
                node.step(worker, here[:3], finished=here[:1])
    assert len(node.ended) == 12


@pytest.fixture
def recorded() -> Recorded:
    node = Recorded()
    eventful(node)
    return node


def test_law12_a_replayed_journal_gives_the_same_outputs(recorded: Recorded) -> None:
    count = replay(recorded.journal.header, recorded.journal.records(), make=fresh)
    assert count == recorded.journal.next_seq > 30


def test_law12_a_journal_is_self_contained_lines() -> None:
    lines: list[bytes] = []
    node = Recorded(write=lines.append)
    eventful(node)
    assert lines == list(node.journal.lines())
    assert not any(b"\n" in line for line in lines)
    header, records = load([*lines[:5], b"", *lines[5:]])
    assert header == node.journal.header
    assert records == list(node.journal.records())
    assert replay(header, records, make=fresh) == len(records)


def tamper(records: list[JournalRecord], index: int, **changes: object) -> list[JournalRecord]:
    changed = msgspec.structs.replace(records[index], **changes)
    return [*records[:index], changed, *records[index + 1 :]]


def test_a_tampered_output_is_reported_with_both_versions(recorded: Recorded) -> None:
    records = list(recorded.journal.records())
    index = next(i for i, r in enumerate(records) if any(isinstance(o, Assign) for o in r.outputs))
    forged = [Abort(worker=WorkerId(0), request_id=SECOND)]
    with pytest.raises(ReplayDiffers) as caught:
        replay(recorded.journal.header, tamper(records, index, outputs=forged), make=fresh)
    assert caught.value.seq == index
    words = str(caught.value)
    assert f"record {index}" in words
    assert 'in the journal: {"t":"Abort"' in words
    assert 'of the replay:  {"t":"Assign"' in words


def test_a_missing_output_is_reported(recorded: Recorded) -> None:
    records = list(recorded.journal.records())
    index = next(i for i, record in enumerate(records) if record.outputs)
    with pytest.raises(ReplayDiffers, match="in the journal: nothing"):
        replay(recorded.journal.header, tamper(records, index, outputs=[]), make=fresh)


def test_a_tampered_time_is_noticed_where_it_matters(recorded: Recorded) -> None:
    records = list(recorded.journal.records())
    index = next(
        i
        for i, record in enumerate(records)
        if i > 5 and type(record.input).__name__ == "Woke" and record.outputs
    )
    early = records[index - 1].now
    with pytest.raises(ReplayDiffers) as caught:
        replay(recorded.journal.header, tamper(records, index, now=early), make=fresh)
    assert caught.value.seq == index


def test_another_configuration_is_noticed(recorded: Recorded) -> None:
    config = msgspec.structs.replace(recorded.config, queue_ahead=0)
    header = msgspec.structs.replace(recorded.journal.header, config=config)
    with pytest.raises(ReplayDiffers):
        replay(header, recorded.journal.records(), make=fresh)


def test_a_journal_that_lost_records_cannot_be_replayed(recorded: Recorded) -> None:
    records = list(recorded.journal.records())
    with pytest.raises(JournalError, match="lost its beginning"):
        replay(recorded.journal.header, records[3:], make=fresh)
    with pytest.raises(JournalError, match="lost records 4 to 5"):
        replay(recorded.journal.header, records[:4] + records[6:], make=fresh)
    newer = msgspec.structs.replace(recorded.journal.header, version=2)
    with pytest.raises(JournalError, match="version 2"):
        replay(newer, records, make=fresh)


def test_what_is_no_journal_is_refused_with_the_line() -> None:
    lines = list(Recorded().journal.lines())
    with pytest.raises(JournalError, match="empty"):
        load([])
    with pytest.raises(JournalError, match="line 1"):
        load([b"{}"])
    with pytest.raises(JournalError, match="line 2"):
        load([*lines, b'[1, 2.0, "x", {"t": "Lunch"}, []]'])


def test_the_ring_is_bounded_and_forgets_whole_stories() -> None:
    node = Recorded(ring_records=10)
    eventful(node)
    assert len(node.journal) == 10
    kept = [record.seq for record in node.journal.records()]
    assert kept == list(range(node.journal.next_seq - 10, node.journal.next_seq))
    told = [entry for number in range(1, 13) for entry in node.journal.story(RequestId(number))]
    assert told
    assert all(entry["seq"] in kept for entry in told)
    with pytest.raises(ValueError, match=r"journal\.ring_records"):
        Recorded(ring_records=0)


def test_a_story_is_told_in_order_and_only_of_what_moved_the_request() -> None:
    node = Recorded()
    node.hear(Woke())
    node.up(0)
    node.up(1)
    node.arrive(1, prompt=40)
    node.arrive(2)
    home = node.where[1]
    for _ in range(3):
        node.step(home, [1])
    node.hear(Preempted(worker=WorkerId(home), request_id=FIRST, lost_tokens=43))
    node.step(home, [1])
    node.down(home)
    node.step(1 - home, [1, 2])
    node.step(1 - home, [1], finished=[1])
    story = node.journal.story(FIRST)
    assert [entry["what"] for entry in story] == [
        "Arrived",
        "Assign",
        "FirstToken",
        "Preempted",
        "WorkerDown",
        "Assign",
        "FirstToken",
        "Finished",
        "Ended",
    ]
    assert [entry["at"] for entry in story] == sorted(entry["at"] for entry in story)
    assert story[1]["worker"] == home
    assert story[5] == {**story[5], "worker": 1 - home, "emitted": 4}
    assert story[7]["emitted"] == 6
    assert story[8]["reason"] == "stop"


def test_a_rejected_request_has_a_story_too() -> None:
    node = Recorded()
    node.arrive(1, prompt=5000)
    assert [entry["what"] for entry in node.journal.story(FIRST)] == ["Arrived", "Reject"]
    assert node.journal.story(SECOND) == []


def test_the_story_of_a_request_that_moves_names_both_workers() -> None:
    header = JournalHeader(config=Recorded().config, workers=(), policy="fcfs")
    journal = Journal(header)
    request = Request(id=FIRST, arrived=0.0, prompt_tokens=40, max_tokens=9)
    source, target, move = WorkerId(0), WorkerId(1), MoveId(3)
    pull = Pull(worker=target, move=move, request=request, source=source)
    told: list[tuple[Input, list[Output]]] = [
        (
            Arrived(request=request),
            [
                Assign(worker=source, request=request, pull_from=target, pull_blocks=2),
                pull,
                Migrate(worker=source, move=move, request_id=FIRST, target=target),
            ],
        ),
        (prefix_pulled(source), []),
        (step(source, 1), []),
        (Prefilled(worker=source, move=move, request_id=FIRST, emitted_tokens=1), []),
        (
            kv_pulled(target, move),
            [Release(worker=source, move=move, request_id=FIRST)],
        ),
        (Released(worker=source, move=move, request_id=FIRST), []),
        (step(target, 2), []),
        (step(target, 3), []),
        (WorkerDown(worker=source, epoch=1, cause="not its business any more"), []),
        (WorkerDown(worker=target, epoch=1, cause="out of memory"), []),
    ]
    for at, (heard, said) in enumerate(told):
        journal.record(float(at), "test", heard, said)
    story = journal.story(FIRST)
    assert [(entry["what"], entry.get("worker")) for entry in story] == [
        ("Arrived", None),
        ("Assign", 0),
        ("Pull", 1),
        ("Migrate", 0),
        ("PrefixPulled", 0),
        ("FirstToken", 0),
        ("Prefilled", 0),
        ("KvPulled", 1),
        ("Release", 0),
        ("Released", 0),
        ("FirstToken", 1),
        ("WorkerDown", 1),
    ]
    assert story[7] == {**story[7], "bytes": 4096, "path": "shared memory", "source": 0}


def step(worker: WorkerId, number: int) -> StepReported:
    load = WorkerLoad(
        blocks_total=1,
        blocks_free=1,
        blocks_cached=0,
        blocks_held=0,
        blocks_leased=0,
        queued=0,
        running=0,
        backlog_tokens=0,
    )
    return StepReported(
        worker=worker,
        step=number,
        elapsed=0.0,
        prefill_tokens=0,
        decode_tokens=1,
        ids=(FIRST,),
        load=load,
    )


def kv_pulled(worker: WorkerId, move: MoveId) -> KvPulled:
    return KvPulled(
        worker=worker,
        move=move,
        request_id=FIRST,
        source=WorkerId(0),
        emitted_tokens=1,
        num_tokens=40,
        num_bytes=4096,
        seconds=0.001,
        path="shared memory",
    )


def prefix_pulled(worker: WorkerId) -> PrefixPulled:
    return PrefixPulled(
        worker=worker,
        request_id=FIRST,
        source=WorkerId(1),
        wanted=2,
        num_blocks=2,
        num_bytes=64,
        seconds=0.001,
        path="shared memory",
    )


def test_a_cancelled_request_has_a_story_too() -> None:
    node = Recorded()
    node.hear(Woke())
    node.up(0)
    node.arrive(1)
    node.cancel(1)
    node.hear(Aborted(worker=WorkerId(0), request_id=FIRST))
    assert [entry["what"] for entry in node.journal.story(FIRST)] == [
        "Arrived",
        "Assign",
        "Cancelled",
        "Abort",
        "Aborted",
        "Ended",
    ]
