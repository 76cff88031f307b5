"""The Dispatcher: start, placement with late binding, cancelling, refusals, policies."""

import pytest

from appliance.core.dispatcher import PolicyMistake
from appliance.core.lifecycle import RequestState, WorkerState
from appliance.core.messages import (
    HOST_TIER,
    Abort,
    Aborted,
    Assign,
    CacheChanged,
    Ended,
    Heartbeat,
    Preempted,
    Refused,
    StepReported,
    Woke,
)
from appliance.core.slots import DispatchSlots
from appliance.core.types import ErrorKind, FinishReason, RequestId, Slo, WorkerId
from tests.core.node_kit import FCFS, Node, assigns, load, request, starts


def refuse(worker: int, number: int, *, kind: ErrorKind = ErrorKind.INTERNAL) -> Refused:
    return Refused(
        worker=WorkerId(worker),
        command="Assign",
        kind=kind,
        reason="no room",
        request_id=RequestId(number),
    )


# --- start ---------------------------------------------------------------------------------------


def test_the_first_word_starts_every_worker_and_none_gets_work_before_it_is_up() -> None:
    node = Node(3, boot=False)
    assert starts(node.hear(Woke())) == [(0, 1), (1, 1), (2, 1)]
    assert node.core.next_wakeup() is None
    assert assigns(node.arrive(1)) == []
    assert assigns(node.up(1)) == [(1, 1, 0)]


def test_reports_of_strangers_and_of_other_incarnations_change_nothing() -> None:
    node = Node(1, boot=False)
    node.hear(Woke())
    assert node.up(0, epoch=7) == []
    assert node.core.view.workers[WorkerId(0)].state is WorkerState.STARTING
    node.up(0)
    node.arrive(1)
    assert node.down(0, epoch=0) == []
    assert node.step(9, [1], finished=[1]) == []
    assert node.hear(Heartbeat(worker=WorkerId(9), step=0, load=load())) == []
    assert node.core.request_state(RequestId(1)) is RequestState.ASSIGNED


def test_workers_need_distinct_ids() -> None:
    with pytest.raises(ValueError, match="distinct"):
        Node(0)


# --- placement -----------------------------------------------------------------------------------


def test_one_request_one_command_one_end() -> None:
    node = Node(1)
    assert assigns(node.arrive(1)) == [(1, 0, 0)]
    node.step(0, [1])
    assert node.core.request_state(RequestId(1)) is RequestState.DECODING
    node.step(0, [1], counts=[3])
    assert node.core.emitted_tokens(RequestId(1)) == 4
    (end,) = node.step(0, [1], finished=[1])
    assert isinstance(end, Ended)
    assert (end.request_id, end.reason, end.error) == (1, FinishReason.STOP, None)
    assert end.cached_tokens == 3
    assert end.times is not None
    assert end.times.workers == (0,)
    assert node.core.request_state(RequestId(1)) is None
    assert node.core.num_live == 0


def test_least_predicted_work_gets_the_request() -> None:
    node = Node(3)
    node.arrive(1, prompt=500)
    node.arrive(2, prompt=100)
    node.arrive(3, prompt=200)
    assert [node.where[n] for n in (1, 2, 3)] == [0, 1, 2]
    node.arrive(4, prompt=50)
    assert node.where[4] == 1


def test_a_cached_prefix_counts_as_work_already_done() -> None:
    node = Node(2)
    node.hear(CacheChanged(worker=WorkerId(1), added=(11, 12, 13)))
    assert node.core.view.cached_blocks(WorkerId(1), (11, 12, 99)) == 2
    node.arrive(1, prompt=60, prefix_hashes=(11, 12, 13))
    assert node.where[1] == 1
    assert node.core.view.workers[WorkerId(1)].pending_tokens == 60 - 48
    node.hear(CacheChanged(worker=WorkerId(1), removed=(11,)))
    assert node.core.view.cached_blocks(WorkerId(1), (11, 12)) == 0


def test_a_dead_workers_cache_is_forgotten() -> None:
    node = Node(2)
    node.hear(CacheChanged(worker=WorkerId(0), added=(11,)))
    node.down(0)
    assert node.core.view.cached_blocks(WorkerId(0), (11,)) == 0


def test_a_workers_own_host_tier_is_copied_from_where_that_is_cheaper() -> None:
    node = Node(2, block_bytes=1000)
    node.cache(1, (11,))
    tier = (12, 13, 14, 15, 16, 17, 18, 19)
    node.hear(CacheChanged(worker=WorkerId(1), tier_added=tier))
    plan = node.core.view.prefix_plan(WorkerId(1), (11, *tier, 99))
    assert (plan.local_blocks, plan.pull_from, plan.pull_blocks) == (1, HOST_TIER, 9)
    assert plan.copy_seconds == pytest.approx(1e-3 + 8 * 1000 / 10e9)
    assert node.core.view.prefix_plan(WorkerId(0), (11, *tier)).num_blocks == 0
    assert node.core.view.prefix_plan(WorkerId(1), (98, *tier)).num_blocks == 0
    said = node.arrive(1, prompt=150, prefix_hashes=(11, *tier))
    (assign,) = [each for each in said if isinstance(each, Assign)]
    assert (assign.worker, assign.pull_from, assign.pull_blocks) == (1, HOST_TIER, 9)
    assert node.core.view.workers[WorkerId(1)].tier_blocks == 8
    node.hear(CacheChanged(worker=WorkerId(1), tier_removed=tier[:4]))
    assert node.core.view.prefix_plan(WorkerId(1), (11, *tier)).pull_from is None
    node.down(1)
    assert node.core.view.workers[WorkerId(1)].tier_blocks == 0


def test_a_host_tier_is_too_slow_for_what_is_quickly_computed() -> None:
    node = Node(1, block_bytes=10**9)
    node.hear(CacheChanged(worker=WorkerId(0), tier_added=(11, 12)))
    assert node.core.view.prefix_plan(WorkerId(0), (11, 12)).num_blocks == 0


def test_late_binding_a_worker_takes_what_it_can_run_and_a_little_more() -> None:
    node = Node(2, max_num_seqs=2, queue_ahead=1)
    for number in range(1, 10):
        node.arrive(number)
    assert sorted(node.where) == [1, 2, 3, 4, 5, 6]
    assert node.core.view.num_waiting == 3
    outputs = node.step(0, [1], finished=[1])
    assert assigns(outputs) == [(7, 0, 0)]  # work-conserving: at once, and first come first


def test_a_group_goes_where_its_leader_is() -> None:
    node = Node(3)
    node.arrive(1, prompt=300, group=1)
    for number in (2, 3, 4):
        node.arrive(number, prompt=300, group=1)
    assert {node.where[n] for n in (1, 2, 3, 4)} == {node.where[1]}
    node.arrive(5, group=1)  # five fit: four run, one ahead
    node.arrive(6, group=1)  # the leader's worker is full: elsewhere rather than waiting
    assert node.where[5] == node.where[1]
    assert node.where[6] != node.where[1]


def test_a_group_moves_together_after_a_death() -> None:
    node = Node(3, max_num_seqs=8)
    for number in (1, 2, 3):
        node.arrive(number, group=1)
    home = node.where[1]
    node.down(home)
    assert len({node.where[n] for n in (1, 2, 3)}) == 1
    assert node.where[1] != home


def test_pools_of_different_size_get_what_fits() -> None:
    node = Node(2, boot=False)
    node.hear(Woke())
    node.up(0, num_blocks=2)
    node.up(1, num_blocks=32)
    node.arrive(1, prompt=100)
    assert node.where[1] == 1


def test_a_view_has_an_age() -> None:
    node = Node(2)
    node.step(0, [], after=1.0)
    before = node.now
    node.step(1, [], after=1.0)
    workers = node.core.view.workers
    assert workers[WorkerId(0)].as_of == before
    assert workers[WorkerId(1)].as_of == node.now
    assert workers[WorkerId(0)].step_seconds == 0.02


def test_preempted_work_is_pending_again() -> None:
    node = Node(1)
    node.arrive(1, prompt=40)
    worker = WorkerId(0)
    assert node.core.view.workers[worker].pending_tokens == 40
    node.step(0, [1])
    assert node.core.view.workers[worker].pending_tokens == 0
    node.hear(Preempted(worker=worker, request_id=RequestId(1), lost_tokens=41))
    assert node.core.view.workers[worker].pending_tokens == 41
    node.step(0, [1])
    assert node.core.view.workers[worker].pending_tokens == 0


# --- cancelling ----------------------------------------------------------------------------------


def test_R3_a_waiting_request_is_gone_at_once() -> None:
    node = Node(1, max_num_seqs=1, queue_ahead=0)
    node.arrive(1)
    node.arrive(2)
    node.cancel(2)
    assert node.error(2) is ErrorKind.CANCELLED
    assert assigns(node.step(0, [1], finished=[1])) == []


def test_R3_at_a_worker_it_is_aborted_and_ends_when_the_worker_says_so() -> None:
    node = Node(1)
    node.arrive(1)
    node.step(0, [1])
    assert node.cancel(1) == [Abort(worker=WorkerId(0), request_id=RequestId(1))]
    assert node.cancel(1) == []  # once is enough
    node.step(0, [1])
    assert node.core.emitted_tokens(RequestId(1)) == 1  # nobody reads them any more
    assert 1 not in node.ended
    node.hear(Aborted(worker=WorkerId(0), request_id=RequestId(1)))
    assert node.error(1) is ErrorKind.CANCELLED
    assert node.hear(Aborted(worker=WorkerId(0), request_id=RequestId(1))) == []


def test_R3_a_cancelled_request_may_finish_first_be_refused_or_lose_its_worker() -> None:
    node = Node(3)
    for number in (1, 2, 3):
        node.arrive(number)
        node.cancel(number)
    node.step(node.where[1], [1], finished=[1])
    node.hear(refuse(node.where[2], 2))
    node.down(node.where[3])
    assert [node.error(n) for n in (1, 2, 3)] == [ErrorKind.CANCELLED] * 3


def test_cancelling_the_unknown_or_the_ended_says_nothing() -> None:
    node = Node(1)
    assert node.cancel(77) == []
    node.arrive(1)
    node.step(0, [1], finished=[1])
    assert node.cancel(1) == []


def test_a_cancelled_request_still_counts_at_its_worker_until_it_is_gone() -> None:
    node = Node(1, max_num_seqs=1, queue_ahead=0)
    node.arrive(1)
    node.arrive(2)
    assert assigns(node.cancel(1)) == []
    gone = node.hear(Aborted(worker=WorkerId(0), request_id=RequestId(1)))
    assert assigns(gone) == [(2, 0, 0)]


# --- refusals ------------------------------------------------------------------------------------


def test_a_refused_request_goes_elsewhere() -> None:
    node = Node(2)
    node.arrive(1)
    first = node.where[1]
    assert assigns(node.hear(refuse(first, 1))) == [(1, 1 - first, 0)]


def test_a_refusal_is_not_repeated_until_something_changed_there() -> None:
    node = Node(1)
    node.arrive(1)
    node.arrive(2)
    assert assigns(node.hear(refuse(0, 2))) == []
    assert assigns(node.step(0, [1])) == []
    assert assigns(node.step(0, [1], finished=[1])) == [(2, 0, 0)]


def test_a_refusal_is_not_repeated_before_a_pause_if_nothing_changes() -> None:
    node = Node(1, refusal_pause=0.5)
    node.arrive(1)
    assert assigns(node.hear(refuse(0, 1))) == []
    refused_at = node.now
    assert assigns(node.wake()) == [(1, 0, 0)]
    assert node.now == refused_at + 0.5
    node.hear(refuse(0, 1))
    refused_at = node.now
    assert assigns(node.wake()) == [(1, 0, 0)]
    assert node.now == refused_at + 1.0


def test_a_request_that_everyone_refuses_ends_with_the_refusal() -> None:
    node = Node(1, max_refusals=3)
    node.arrive(1)
    for _ in range(3):
        node.hear(refuse(0, 1))
        node.wake()
    node.hear(refuse(0, 1))
    assert node.error(1) is ErrorKind.INTERNAL
    assert node.ended[1].message == "no room"


def test_too_long_for_the_worker_is_a_typed_end() -> None:
    node = Node(2)
    node.arrive(1)
    node.hear(refuse(node.where[1], 1, kind=ErrorKind.TOO_LONG))
    assert node.error(1) is ErrorKind.TOO_LONG


def test_an_answer_that_its_worker_cannot_go_on_with_is_a_typed_end_in_mid_stream() -> None:
    node = Node(2)
    node.arrive(1)
    worker = node.where[1]
    node.step(worker, [1])
    node.hear(refuse(worker, 1, kind=ErrorKind.GRAMMAR))
    assert node.error(1) is ErrorKind.GRAMMAR
    assert node.hear(Aborted(worker=WorkerId(worker), request_id=RequestId(1))) == []


def test_a_request_that_its_worker_dropped_is_placed_again() -> None:
    node = Node(2)
    node.arrive(1)
    node.step(node.where[1], [1])
    first = node.where[1]
    outputs = node.hear(Aborted(worker=WorkerId(first), request_id=RequestId(1)))
    assert assigns(outputs) == [(1, 1 - first, 1)]


# --- policies ------------------------------------------------------------------------------------


def test_an_impossible_decision_is_named_and_not_carried_out() -> None:
    def nowhere(*_: object) -> WorkerId:
        return WorkerId(9)

    slots = FCFS.dispatch
    node = Node(
        1,
        policy=DispatchSlots(
            admit=slots.admit, order=slots.order, place=nowhere, wakeup=slots.wakeup
        ),
    )
    with pytest.raises(PolicyMistake, match="worker 9 may not get request 1"):
        node.arrive(1)


def test_a_policy_that_holds_a_request_names_when_to_ask_again() -> None:
    slots = FCFS.dispatch
    held = DispatchSlots(
        admit=slots.admit,
        order=slots.order,
        place=lambda view, request, phase, now: (
            slots.place(view, request, phase, now) if now >= 105.0 else None
        ),
        wakeup=lambda view, now: 105.0 if now < 105.0 else None,
    )
    node = Node(1, policy=held)
    assert assigns(node.arrive(1)) == []
    assert node.core.next_wakeup() == 105.0
    assert assigns(node.wake()) == [(1, 0, 0)]


def test_an_order_of_strangers_is_a_mistake() -> None:
    slots = FCFS.dispatch
    wrong = DispatchSlots(
        admit=slots.admit,
        order=lambda queue, view, now: [request(5)],
        place=slots.place,
        wakeup=slots.wakeup,
    )
    node = Node(1, policy=wrong)
    with pytest.raises(PolicyMistake, match="request 5 is not in the queue"):
        node.arrive(1)


def test_the_slo_travels_with_the_request() -> None:
    node = Node(1)
    slo = Slo(class_name="chat", ttft=0.5, tpot=0.05)
    (assign,) = node.arrive(1, slo=slo)
    assert assign.request.slo == slo  # type: ignore[union-attr]


def test_a_report_without_change_says_nothing() -> None:
    node = Node(1)
    report = StepReported(
        worker=WorkerId(0),
        step=1,
        elapsed=0.1,
        prefill_tokens=0,
        decode_tokens=0,
        ids=(),
        load=load(),
    )
    assert node.hear(report) == []
