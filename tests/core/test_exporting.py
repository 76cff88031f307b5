"""The source's side of a move, transition by transition; whole moves are in
test_moves_properties.py.
"""

import pytest

from appliance.core.batcher import Batcher
from appliance.core.messages import (
    Abort,
    Aborted,
    Assign,
    Heartbeat,
    Migrate,
    Preempted,
    Prefilled,
    Refused,
    Release,
    Released,
    Report,
    Resume,
    StepReported,
)
from appliance.core.peer import Asked, Dropped, Offered, Taken, Withdrawn
from appliance.core.sequence import SeqState
from appliance.core.types import (
    BatcherConfig,
    FinishReason,
    MoveId,
    Request,
    RequestId,
    SeqResult,
    StepResult,
    WorkerId,
)
from tests.core.toy_worker import FCFS, WORKER, paged, window

PEER = WorkerId(1)
MOVE = MoveId(7)
ID = RequestId(1)


def migrate(*, live: bool = False, move: MoveId = MOVE, request_id: RequestId = ID) -> Migrate:
    return Migrate(
        worker=WORKER, move=move, request_id=request_id, target=PEER, live=live, lease_seconds=10.0
    )


class Source:
    """A Batcher with one request of 9 prompt tokens (blocks of 4, 8 tokens a step)."""

    def __init__(self, *, depth: int = 0, max_tokens: int = 30, **facts: int) -> None:
        config = BatcherConfig(
            max_model_len=64, max_batch_tokens=8, depth=depth, max_num_seqs=facts.get("slots", 4)
        )
        groups = [paged(facts.get("blocks", 32))]
        self.batcher = Batcher(WORKER, config, groups=groups, policy=FCFS)
        self.now = 0.0
        self.stop_next = False
        self.assign(1, max_tokens=max_tokens)

    def assign(self, number: int, *, prompt_tokens: int = 9, max_tokens: int = 30) -> None:
        request = Request(
            id=RequestId(number), arrived=0.0, prompt_tokens=prompt_tokens, max_tokens=max_tokens
        )
        self.batcher.handle(Assign(worker=WORKER, request=request), self.now)

    def finish(self, plan: object = None) -> list[Report]:
        plan = plan or self.batcher.next_step(self.now)
        assert plan is not None
        stopped = FinishReason.STOP if self.stop_next else None
        results = [
            SeqResult(id=item.id, num_tokens=1, stopped=stopped)
            for item in plan.work
            if item.samples and self.batcher.is_live(item.id)
        ]
        result = StepResult(step=plan.step, results=tuple(results), elapsed=0.0)
        return self.batcher.finish_step(result, self.now)

    def hear(self, message: Asked | Taken | Dropped) -> list[Report]:
        return self.batcher.hear_peer(PEER, message, self.now)

    def said(self) -> list[object]:
        return [message for peer, message in self.batcher.drain_peer() if peer == PEER]

    def held(self) -> "Source":
        """Stopped after 9 prompt tokens and one more."""
        self.batcher.handle(migrate(), self.now)
        self.hear(Asked(move=MOVE, num_blocks=0, room=8))
        self.finish()
        self.finish()
        self.said()
        assert self.batcher.queues.by_id[ID].state is SeqState.HELD
        return self


def kinds(reports: list[Report]) -> list[str]:
    return [type(report).__name__ for report in reports]


def test_blocks_are_offered_as_they_are_complete_and_the_last_ones_with_the_stop() -> None:
    source = Source()
    assert source.batcher.handle(migrate(), 0.0) == []
    assert source.hear(Asked(move=MOVE, num_blocks=1, room=4)) == []
    assert kinds(source.finish()) == ["StepReported"]
    (offer,) = source.said()
    assert isinstance(offer, Offered)
    assert (offer.first, len(offer.blocks), offer.num_tokens, offer.final) == (1, 1, 8, False)
    source.now = 3.0
    reports = source.finish()
    assert kinds(reports) == ["StepReported", "Prefilled"]
    assert reports[1] == Prefilled(worker=WORKER, move=MOVE, request_id=ID, emitted_tokens=1)
    assert isinstance(reports[0], StepReported)
    assert reports[0].load.blocks_leased == 3, "the load of the step is that after the stop"
    (final,) = source.said()
    assert isinstance(final, Offered)
    assert (final.first, len(final.blocks), final.num_tokens, final.final) == (2, 1, 9, True)
    assert (final.num_emitted, final.stopped_at) == (1, 3.0)
    assert final.generations == (1,)
    assert not source.batcher.has_work()
    assert source.batcher.is_live(ID), "it may go on"
    assert source.batcher.next_wakeup() == 13.0


def test_R28_without_room_at_the_target_it_decodes_on() -> None:
    source = Source()
    source.batcher.handle(migrate(), 0.0)
    for _ in range(6):
        assert "Prefilled" not in kinds(source.finish()), "nobody has asked"
    source.hear(Asked(move=MOVE, num_blocks=0, room=3))
    for _ in range(3):
        assert "Prefilled" not in kinds(source.finish()), "it has outgrown the room"
    reports = source.hear(Taken(move=MOVE, num_blocks=3, room=5))
    assert kinds(reports) == ["Prefilled", "Heartbeat"], "nothing is planned: it stops at once"


def test_live_it_goes_on_until_little_is_left_to_copy() -> None:
    source = Source()
    for _ in range(10):
        source.finish()
    source.batcher.handle(migrate(live=True), 0.0)
    assert source.hear(Asked(move=MOVE, num_blocks=0, room=8)) == []
    source.finish()
    assert source.hear(Taken(move=MOVE, num_blocks=1, room=8)) == [], (
        "three blocks are to be copied"
    )
    reports = source.hear(Taken(move=MOVE, num_blocks=2, room=8))
    assert kinds(reports) == ["Prefilled", "Heartbeat"]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_planned_steps_are_finished_before_it_is_held(depth: int) -> None:
    source = Source(depth=depth)
    source.batcher.handle(migrate(), 0.0)
    source.hear(Asked(move=MOVE, num_blocks=0, room=8))
    plans, reports = [], []
    for _ in range(10):
        while (plan := source.batcher.next_step(0.0)) is not None:
            plans.append(plan)
        if plans:
            reports = source.finish(plans.pop(0))
    assert source.batcher.queues.by_id[ID].state is SeqState.HELD
    stopped = Prefilled(worker=WORKER, move=MOVE, request_id=ID, emitted_tokens=depth + 1)
    assert reports[-1] == stopped, "one token was emitted, `depth` more were planned"


def test_a_late_end_in_a_planned_step_withdraws_it() -> None:
    source = Source(depth=1)
    source.batcher.handle(migrate(), 0.0)
    source.hear(Asked(move=MOVE, num_blocks=0, room=8))
    source.finish()
    source.batcher.next_step(0.0)
    second = source.batcher._outstanding[0].plan
    third = source.batcher.next_step(0.0)
    source.finish(second)
    source.stop_next = True
    assert "Prefilled" not in kinds(source.finish(third))
    assert source.said()[-1] == Withdrawn(move=MOVE, reason="ended")


def test_what_ends_or_is_aborted_is_withdrawn() -> None:
    source = Source(max_tokens=1)
    source.batcher.handle(migrate(), 0.0)
    source.finish()
    source.finish()
    assert source.said() == [Withdrawn(move=MOVE, reason="ended")]
    source = Source()
    source.batcher.handle(migrate(), 0.0)
    reports = source.batcher.handle(Abort(worker=WORKER, request_id=ID), 0.0)
    assert kinds(reports) == ["Aborted", "Heartbeat"]
    assert source.said() == [Withdrawn(move=MOVE, reason="aborted")]


def test_what_is_preempted_is_withdrawn() -> None:
    source = Source(blocks=16)
    source.assign(2, prompt_tokens=9, max_tokens=50)
    source.batcher.handle(migrate(request_id=RequestId(2)), 0.0)
    for _ in range(60):
        if any(isinstance(report, Preempted) for report in source.finish()):
            break
    assert source.said() == [Withdrawn(move=MOVE, reason="preempted")]


def test_release_frees_what_was_leased() -> None:
    source = Source().held()
    reports = source.batcher.handle(Release(worker=WORKER, move=MOVE, request_id=ID), 0.0)
    assert reports[0] == Released(worker=WORKER, move=MOVE, request_id=ID)
    assert isinstance(reports[1], Heartbeat)
    assert not source.batcher.is_live(ID)
    assert source.batcher.load().blocks_free == 32
    again = source.batcher.handle(Release(worker=WORKER, move=MOVE, request_id=ID), 0.0)
    assert kinds(again) == ["Released"]


def test_release_of_what_has_not_stopped_is_refused() -> None:
    source = Source()
    source.batcher.handle(migrate(), 0.0)
    (refused,) = source.batcher.handle(Release(worker=WORKER, move=MOVE, request_id=ID), 0.0)
    assert isinstance(refused, Refused)


def test_resume_makes_it_go_on_with_its_blocks() -> None:
    source = Source().held()
    reports = source.batcher.handle(Resume(worker=WORKER, move=MOVE, request_id=ID), 0.0)
    assert kinds(reports) == ["Heartbeat"]
    plan = source.batcher.next_step(0.0)
    assert plan is not None
    (item,) = plan.work
    assert (item.start, item.num_tokens, item.fresh) == (9, 1, True)
    assert len(item.new_blocks[0]) == 3
    assert source.batcher.load().blocks_leased == 0
    assert source.said() == [Withdrawn(move=MOVE, reason="it goes on at the source")]


def test_resume_without_a_free_slot_puts_it_back_into_the_queue() -> None:
    source = Source(slots=1).held()
    source.assign(2)
    source.finish()
    reports = source.batcher.handle(Resume(worker=WORKER, move=MOVE, request_id=ID), 0.0)
    assert reports[0] == Preempted(worker=WORKER, request_id=ID, lost_tokens=9)
    assert source.batcher.queues.by_id[ID].state is SeqState.WAITING


def test_resume_before_the_stop_ends_the_move_and_changes_nothing_else() -> None:
    source = Source()
    source.batcher.handle(migrate(), 0.0)
    assert source.batcher.handle(Resume(worker=WORKER, move=MOVE, request_id=ID), 0.0) == []
    source.hear(Asked(move=MOVE, num_blocks=0, room=8))
    for _ in range(4):
        assert "Prefilled" not in kinds(source.finish())


@pytest.mark.parametrize("how", ["resume", "dropped", "lost"])
def test_a_stop_that_is_not_complete_can_be_taken_back(how: str) -> None:
    source = Source(depth=1)
    source.batcher.handle(migrate(), 0.0)
    source.hear(Asked(move=MOVE, num_blocks=0, room=8))
    source.finish()
    second, third = source.batcher.next_step(0.0), source.batcher.next_step(0.0)
    source.finish(second)
    assert source.batcher.queues.by_id[ID].state is SeqState.STOPPING
    if how == "resume":
        source.batcher.handle(Resume(worker=WORKER, move=MOVE, request_id=ID), 0.0)
    elif how == "dropped":
        source.hear(Dropped(move=MOVE, reason="full"))
    else:
        source.batcher.peer_lost(PEER, 0.0)
    assert source.batcher.queues.by_id[ID].state is SeqState.RUNNING
    assert "Prefilled" not in kinds(source.finish(third))
    assert source.batcher.next_step(0.0) is not None


def test_what_has_stopped_for_a_lost_peer_waits_for_the_node() -> None:
    source = Source().held()
    assert source.batcher.peer_lost(PEER, 0.0) == []
    assert source.batcher.queues.by_id[ID].state is SeqState.HELD
    source.batcher.handle(Resume(worker=WORKER, move=MOVE, request_id=ID), 0.0)
    assert source.batcher.queues.by_id[ID].state is SeqState.RUNNING


def test_a_lease_ends_by_itself_and_a_late_resume_hears_so() -> None:
    source = Source().held()
    assert source.batcher.wake(9.9) == []
    reports = source.batcher.wake(10.0)
    gone = Released(worker=WORKER, move=MOVE, request_id=ID, expired=True)
    assert reports[0] == gone
    assert source.said() == [Withdrawn(move=MOVE, reason="the lease has expired")]
    assert source.batcher.load().blocks_free == 32
    assert source.batcher.next_wakeup() is None
    late = source.batcher.handle(Resume(worker=WORKER, move=MOVE, request_id=ID), 11.0)
    assert late == [gone]


def test_an_abort_ends_a_lease() -> None:
    source = Source().held()
    reports = source.batcher.handle(Abort(worker=WORKER, request_id=ID), 0.0)
    assert reports[0] == Aborted(worker=WORKER, request_id=ID)
    assert source.said() == [Withdrawn(move=MOVE, reason="aborted")]
    assert source.batcher.load().blocks_free == 32


def test_a_peer_may_speak_before_the_node() -> None:
    source = Source()
    assert source.hear(Asked(move=MOVE, num_blocks=0, room=8)) == []
    source.batcher.handle(migrate(), 0.0)
    source.finish()
    assert "Prefilled" in kinds(source.finish())
    source = Source()
    source.hear(Asked(move=MOVE, num_blocks=0, room=8))
    source.hear(Dropped(move=MOVE, reason="aborted"))
    source.batcher.handle(migrate(), 0.0)
    source.finish()
    assert "Prefilled" not in kinds(source.finish())


def test_nobody_but_the_target_is_listened_to() -> None:
    source = Source()
    source.batcher.handle(migrate(), 0.0)
    source.batcher.hear_peer(WorkerId(2), Asked(move=MOVE, num_blocks=0, room=8), 0.0)
    source.finish()
    assert "Prefilled" not in kinds(source.finish())


def test_what_cannot_move_is_refused_and_the_target_told() -> None:
    source = Source()
    source.batcher.handle(migrate(), 0.0)
    (twice,) = source.batcher.handle(migrate(move=MoveId(8)), 0.0)
    (unknown,) = source.batcher.handle(migrate(move=MoveId(9), request_id=RequestId(5)), 0.0)
    assert isinstance(twice, Refused)
    assert isinstance(unknown, Refused)
    assert "moving already" in twice.reason
    assert "not here" in unknown.reason
    assert source.said() == [
        Withdrawn(move=MoveId(8), reason=twice.reason),
        Withdrawn(move=MoveId(9), reason=unknown.reason),
    ]


def test_a_worker_with_window_groups_hands_nothing_over() -> None:
    groups = [paged(64), window(64, tokens=9)]
    batcher = Batcher(WORKER, BatcherConfig(max_model_len=64), groups=groups, policy=FCFS)
    request = Request(id=ID, arrived=0.0, prompt_tokens=5, max_tokens=5)
    batcher.handle(Assign(worker=WORKER, request=request), 0.0)
    (refused,) = batcher.handle(migrate(), 0.0)
    assert isinstance(refused, Refused)
    assert "one paged cache group" in refused.reason


def test_checksums_are_of_the_offered_blocks() -> None:
    config = BatcherConfig(max_model_len=64, max_batch_tokens=8)
    batcher = Batcher(
        WORKER, config, groups=[paged(32)], policy=FCFS, checksum=lambda block: 100 + block
    )
    source = Source()
    source.batcher = batcher
    source.assign(1)
    batcher.handle(migrate(), 0.0)
    source.hear(Asked(move=MOVE, num_blocks=0, room=8))
    source.finish()
    (offer,) = source.said()
    assert isinstance(offer, Offered)
    assert offer.checksums == tuple(100 + block for block in offer.blocks)
