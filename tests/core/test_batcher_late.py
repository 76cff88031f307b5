"""Batcher when things are noticed late: aborts in a step, plans ahead, several tokens at once."""

import pytest

from appliance.core.committing import ProtocolError
from appliance.core.messages import (
    Aborted,
    Heartbeat,
    StepReported,
)
from appliance.core.types import (
    FinishReason,
    RequestId,
    SeqResult,
    StepResult,
)
from tests.core.toy_worker import (
    WORKER,
    Task,
    answer,
    only,
    plain_batcher,
    prompt,
    result_of,
    shape,
    worker_with,
)

# --- aborts ---------------------------------------------------------------------------------------


def test_R3_an_abort_in_the_queue_is_done_at_once() -> None:
    worker = worker_with()
    worker.assign(Task(1, prompt(5)))
    aborted, heartbeat = worker.abort(1)
    assert aborted == Aborted(worker=WORKER, request_id=RequestId(1))
    assert isinstance(heartbeat, Heartbeat)
    assert heartbeat.load == worker.batcher.load()
    assert heartbeat.load.queued == 0
    assert not worker.batcher.has_work()


def test_R3_an_abort_between_steps_is_done_at_once() -> None:
    worker = worker_with()
    worker.assign(Task(1, prompt(5)))
    worker.step()
    aborted, heartbeat = worker.abort(1)
    assert isinstance(aborted, Aborted)
    assert isinstance(heartbeat, Heartbeat)
    assert heartbeat.load is not None
    assert heartbeat.load.blocks_held == 0


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_R3_an_abort_in_a_step_is_answered_when_the_last_such_step_is_done(depth: int) -> None:
    worker = worker_with(depth=depth)
    worker.assign(Task(1, prompt(5), max_tokens=30))
    worker.assign(Task(2, prompt(5, 20), max_tokens=30))
    while worker.plan() is not None:
        pass
    (heartbeat,) = worker.abort(1)
    assert isinstance(heartbeat, Heartbeat)
    assert heartbeat.load is not None
    assert (heartbeat.load.running, heartbeat.load.blocks_held) == (1, 4)
    assert not worker.batcher.is_live(RequestId(1))
    for _ in range(depth):
        reports = worker.finish()
        assert not only(reports, Aborted)
    reports = worker.finish()
    assert isinstance(reports[0], StepReported)
    assert 1 not in reports[0].ids
    assert reports[0].load.blocks_held <= 3
    assert len(only(reports, Aborted)) == 1
    worker.run()


def test_R3_an_abort_of_the_unknown_is_answered() -> None:
    worker = worker_with()
    assert worker.abort(77) == [Aborted(worker=WORKER, request_id=RequestId(77))]


def test_R3_an_abort_that_crosses_a_late_finish_is_answered_when_the_blocks_are_free() -> None:
    task = next(
        task
        for task in (Task(1, prompt(5), 30, seed, stop_every=4) for seed in range(50))
        if len(answer(task)[0]) == 1
    )
    worker = worker_with(depth=1)
    worker.assign(task)
    worker.plan()
    worker.plan()
    report = worker.finish()[0]
    assert isinstance(report, StepReported)
    assert report.finished
    assert report.load.blocks_held > 0, "the second plan still holds it"
    assert worker.abort(1) == []
    assert len(only(worker.finish(), Aborted)) == 1
    worker.run()


def test_an_aborted_id_can_come_back() -> None:
    worker = worker_with()
    task = Task(1, prompt(5), max_tokens=6)
    worker.assign(task)
    worker.step()
    sent = list(worker.emitted[1])
    worker.abort(1)
    worker.assign(task, emitted=sent)
    worker.run()
    assert worker.emitted[1] == answer(task)[0]


# --- depth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_depth_plus_one_plans_are_outstanding_and_no_more(depth: int) -> None:
    worker = worker_with(depth=depth)
    worker.assign(Task(1, prompt(5), max_tokens=30))
    plans = [worker.plan() for _ in range(5)]
    assert [plan is not None for plan in plans] == [number <= depth for number in range(5)]
    starts = [plan.work[0].start for plan in plans if plan is not None]
    assert starts == [0, 5, 6][: depth + 1]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_late_stop_costs_depth_tokens_which_are_dropped(depth: int) -> None:
    task = Task(1, prompt(5), max_tokens=30, stop_every=4, seed=2)
    expected, reason = answer(task)
    assert reason is FinishReason.STOP
    worker = worker_with(depth=depth)
    worker.assign(task)
    worker.run()
    assert worker.emitted[1] == expected
    assert worker.engine.num_computed == 5 + len(expected) - 1 + depth


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_end_for_length_is_known_in_advance_and_costs_nothing(depth: int) -> None:
    worker = worker_with(depth=depth)
    worker.assign(Task(1, prompt(5), max_tokens=7))
    worker.run()
    assert worker.engine.num_computed == 5 + 7 - 1


def test_a_sequence_whose_last_token_is_planned_takes_no_slot() -> None:
    worker = worker_with(depth=1, max_num_seqs=1)
    worker.assign(Task(1, prompt(5), max_tokens=1))
    worker.assign(Task(2, prompt(5, 20), max_tokens=1))
    assert shape(worker.plan()) == [(1, 0, 5, "prefill")]
    assert shape(worker.plan()) == [(2, 0, 5, "prefill")]
    worker.finish()
    worker.run()


def test_a_sequence_preempted_while_planned_keeps_its_blocks_and_its_tokens() -> None:
    worker = worker_with(8, max_model_len=32, depth=1)
    for number in (1, 2):
        worker.assign(Task(number, prompt(6, 20 * number), max_tokens=20))
    stale = False
    while not worker.preempted:
        while worker.plan() is not None:
            pass
        stale = stale or bool(worker.batcher.queues.stale)
        worker.finish()
    assert stale, "it waited for its planned steps first"
    worker.run()
    assert set(worker.finished) == {1, 2}


# --- several tokens at once -----------------------------------------------------------------------


def test_a_step_may_give_several_tokens_of_a_sequence() -> None:
    batcher = plain_batcher()
    report = batcher.finish_step(result_of(batcher.next_step(0.0), 3), 0.0)[0]
    assert isinstance(report, StepReported)
    assert report.counts == (3,)
    plan = batcher.next_step(0.0)
    assert shape(plan) == [(1, 5, 3, "decode")]
    report = batcher.finish_step(result_of(plan, 9), 0.0)[0]
    assert isinstance(report, StepReported)
    assert report.counts == (6,), "what goes over max_tokens is cut off"
    assert report.finished[0].reason is FinishReason.LENGTH
    assert report.finished[0].emitted_tokens == 9


def test_a_stop_behind_the_cut_is_no_stop() -> None:
    batcher = plain_batcher(max_tokens=2)
    plan = batcher.next_step(0.0)
    several = SeqResult(id=RequestId(1), num_tokens=4, stopped=FinishReason.STOP)
    report = batcher.finish_step(StepResult(step=1, results=(several,), elapsed=0.0), 0.0)[0]
    assert plan is not None
    assert isinstance(report, StepReported)
    assert report.counts == (2,)
    assert report.finished[0].reason is FinishReason.LENGTH


def test_several_tokens_at_once_need_depth_0() -> None:
    batcher = plain_batcher(depth=1)
    first = batcher.next_step(0.0)
    batcher.next_step(0.0)
    with pytest.raises(ProtocolError, match="depth 0"):
        batcher.finish_step(result_of(first, 2), 0.0)
