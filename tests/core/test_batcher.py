"""Batcher: commands in, plans and reports out. What holds always is in
test_batcher_properties.py.
"""

from dataclasses import replace

import pytest

from appliance.core.messages import (
    Aborted,
    CacheChanged,
    Heartbeat,
    Refused,
    SetBudget,
    StepReported,
)
from appliance.core.types import (
    FinishReason,
    Phase,
)
from tests.core.toy_worker import (
    WORKER,
    Task,
    answer,
    only,
    prompt,
    shape,
    worker_with,
)

# --- one sequence ---------------------------------------------------------------------------------


def test_one_request_from_assign_to_its_last_token() -> None:
    worker = worker_with()
    (heartbeat,) = worker.assign(Task(1, prompt(5), max_tokens=3))
    assert isinstance(heartbeat, Heartbeat)
    assert heartbeat.load is not None
    assert (heartbeat.load.queued, heartbeat.load.backlog_tokens) == (1, 5)
    plan = worker.plan()
    assert plan is not None
    (item,) = plan.work
    assert (item.start, item.num_tokens, item.phase, item.samples) == (0, 5, Phase.PREFILL, True)
    assert item.fresh
    assert [len(blocks) for blocks in item.new_blocks] == [2]
    report = worker.finish()[0]
    assert isinstance(report, StepReported)
    assert (report.step, report.prefill_tokens, report.decode_tokens) == (1, 5, 0)
    assert report.ids == (1,)
    assert (report.load.running, report.load.backlog_tokens, report.load.blocks_held) == (1, 0, 2)
    plan = worker.plan()
    assert shape(plan) == [(1, 5, 1, "decode")]
    assert plan is not None
    assert not plan.work[0].fresh
    assert plan.work[0].new_blocks == ((),)
    worker.finish()
    report = worker.step()[0]
    assert isinstance(report, StepReported)
    (end,) = report.finished
    assert (end.id, end.reason, end.emitted_tokens, end.cached_tokens) == (
        1,
        FinishReason.LENGTH,
        3,
        0,
    )
    assert report.load.blocks_held == 0
    assert not worker.batcher.has_work()
    assert worker.plan() is None


def test_a_table_is_sent_once_and_then_only_what_was_appended() -> None:
    worker = worker_with()
    worker.assign(Task(1, prompt(4), max_tokens=6))
    sent: list[int] = []
    while worker.batcher.has_work():
        plan = worker.plan()
        assert plan is not None
        assert plan.work[0].fresh == (not sent)
        sent.extend(plan.work[0].new_blocks[0])
        worker.finish()
    assert len(sent) == len(set(sent)) == 3


def test_the_answer_ends_at_max_model_len() -> None:
    worker = worker_with(max_model_len=12)
    worker.assign(Task(1, prompt(9), max_tokens=50))
    worker.run()
    assert worker.finished[1].emitted_tokens == 3
    assert worker.finished[1].reason is FinishReason.LENGTH


def test_a_stop_ends_the_answer_at_once() -> None:
    task = Task(1, prompt(5), max_tokens=50, stop_every=3)
    expected, reason = answer(task)
    assert reason is FinishReason.STOP
    worker = worker_with()
    worker.assign(task)
    worker.run()
    assert worker.finished[1].reason is FinishReason.STOP
    assert worker.emitted[1] == expected


def test_R5_a_replaced_sequence_goes_on_after_what_was_sent() -> None:
    task = Task(1, prompt(6), max_tokens=10)
    expected, _ = answer(task)
    worker = worker_with()
    worker.assign(task, emitted=expected[:4])
    plan = worker.plan()
    assert shape(plan) == [(1, 0, 10, "prefill")]
    report = worker.finish()[0]
    assert isinstance(report, StepReported)
    assert report.ids == (1,)
    worker.run()
    assert worker.emitted[1] == expected
    assert worker.finished[1].emitted_tokens == 10, "counted over both workers"


# --- batching -------------------------------------------------------------------------------------


def test_chunks_of_a_long_prompt_share_each_step_with_every_decode() -> None:
    worker = worker_with(max_batch_tokens=8)
    worker.assign(Task(1, prompt(3), max_tokens=20))
    worker.step()
    worker.assign(Task(2, prompt(20, 30), max_tokens=2))
    shapes = []
    for _ in range(4):
        shapes.append(shape(worker.plan()))
        worker.finish()
    assert shapes == [
        [(1, 3, 1, "decode"), (2, 0, 7, "prefill")],
        [(1, 4, 1, "decode"), (2, 7, 7, "prefill")],
        [(1, 5, 1, "decode"), (2, 14, 6, "prefill")],
        [(1, 6, 1, "decode"), (2, 20, 1, "decode")],
    ]


def test_several_short_prompts_fit_into_one_step() -> None:
    worker = worker_with(max_batch_tokens=16)
    for number in range(4):
        worker.assign(Task(number, prompt(5, 10 * number)))
    assert [work[:3] for work in shape(worker.plan())] == [
        (0, 0, 5),
        (1, 0, 5),
        (2, 0, 5),
        (3, 0, 1),
    ]


def test_no_more_sequences_run_than_allowed() -> None:
    worker = worker_with(max_num_seqs=2)
    for number in range(5):
        worker.assign(Task(number, (number + 1,), max_tokens=3))
    for _ in range(3):
        assert len(shape(worker.plan())) == 2
        worker.finish()
    assert worker.batcher.load().queued == 3
    worker.run()
    assert len(worker.finished) == 5


def test_first_come_first_served_by_arrival_not_by_assignment() -> None:
    worker = worker_with(max_num_seqs=1)
    worker.assign(Task(1, prompt(3), arrived=5.0))
    worker.assign(Task(2, prompt(3), arrived=1.0))
    assert shape(worker.plan())[0][0] == 2


def test_set_budget_bounds_prefill_tokens_and_decodes_of_a_step() -> None:
    worker = worker_with(max_batch_tokens=16)
    worker.assign(Task(1, prompt(3), max_tokens=9))
    worker.assign(Task(2, prompt(3), max_tokens=9))
    worker.step()
    worker.assign(Task(3, prompt(12, 40)))
    budget = SetBudget(worker=WORKER, prefill_tokens=5, max_decodes=1)
    assert worker.handle(budget) == []
    assert shape(worker.plan()) == [(1, 3, 1, "decode"), (3, 0, 5, "prefill")]
    worker.finish()
    worker.run()
    (refused,) = worker.handle(SetBudget(worker=WORKER, prefill_tokens=0, max_decodes=1))
    assert isinstance(refused, Refused)
    assert "prefill_tokens 0" in refused.reason


# --- prefix cache ---------------------------------------------------------------------------------


def test_a_prompt_seen_before_is_not_computed_again_but_for_its_last_tokens() -> None:
    worker = worker_with()
    worker.assign(Task(1, prompt(12), max_tokens=1))
    worker.run()
    worker.assign(Task(2, prompt(12), max_tokens=1))
    assert shape(worker.plan()) == [(2, 8, 4, "prefill")], "whole blocks, and one token at least"
    worker.finish()
    assert worker.finished[2].cached_tokens == 8
    worker.assign(Task(3, prompt(13), max_tokens=1))
    assert shape(worker.plan()) == [(3, 12, 1, "prefill")]
    worker.finish()
    assert worker.finished[3].cached_tokens == 12


def test_generated_blocks_are_found_by_the_next_turn_of_a_conversation() -> None:
    worker = worker_with()
    first = Task(1, prompt(6), max_tokens=7)
    worker.assign(first)
    worker.run()
    history = (*first.prompt, *answer(first)[0])
    worker.assign(Task(2, (*history, 1, 2, 3), max_tokens=2))
    assert shape(worker.plan()) == [(2, 12, 4, "prefill")], "13 were known, 12 had KV"
    worker.finish()


def test_sequences_that_run_together_share_what_is_computed() -> None:
    worker = worker_with()
    worker.assign(Task(1, prompt(12), max_tokens=9))
    worker.step()
    worker.assign(Task(2, (*prompt(8), 99), max_tokens=9))
    assert (2, 8, 1, "prefill") in shape(worker.plan())
    assert worker.batcher.load().blocks_held == 4 + 1, "of its three blocks, two are shared"
    worker.finish()
    worker.run()


def test_tokens_that_the_cache_gives_cost_no_budget() -> None:
    worker = worker_with(max_batch_tokens=8)
    worker.assign(Task(1, prompt(12), max_tokens=1))
    worker.run()
    for number in (2, 3):
        worker.assign(Task(number, (*prompt(12), number), max_tokens=1))
    assert shape(worker.plan()) == [(2, 12, 1, "prefill"), (3, 12, 1, "prefill")]
    worker.finish()


def test_without_prefix_cache_everything_is_computed() -> None:
    worker = worker_with(enable_prefix_cache=False)
    for number in (1, 2):
        worker.assign(Task(number, prompt(12), max_tokens=1))
        assert shape(worker.plan()) == [(number, 0, 12, "prefill")]
        assert only(worker.finish(), CacheChanged) == []


def test_changes_of_the_cache_are_reported_with_the_step_that_made_them() -> None:
    worker = worker_with(6)
    worker.assign(Task(1, prompt(12), max_tokens=1))
    (changed,) = only(worker.step(), CacheChanged)
    assert isinstance(changed, CacheChanged)
    assert (len(changed.added), changed.removed) == (3, ())
    worker.assign(Task(2, prompt(16, 50), max_tokens=1))
    (after,) = only(worker.step(), CacheChanged)
    assert isinstance(after, CacheChanged)
    assert len(after.added) == 4
    assert after.removed == (changed.added[2],), "the end of the chain goes first"


# --- n > 1 ----------------------------------------------------------------------------------------


def group_of(size: int, length: int = 13) -> list[Task]:
    return [Task(i, prompt(length), max_tokens=4, seed=i, group=1) for i in range(1, size + 1)]


def test_choices_of_one_prompt_compute_it_once_and_share_its_blocks() -> None:
    worker = worker_with(max_batch_tokens=64)
    for task in group_of(3):
        worker.assign(task)
    assert worker.batcher.load().queued == 3
    assert shape(worker.plan()) == [(1, 0, 13, "prefill")], "siblings wait for the leader's KV"
    worker.finish()
    assert shape(worker.plan()) == [
        (1, 13, 1, "decode"),
        (2, 12, 1, "prefill"),
        (3, 12, 1, "prefill"),
    ]
    worker.finish()
    assert worker.batcher.load().blocks_held == 3 + 3
    worker.run()
    assert len(worker.finished) == 3


def test_siblings_are_released_when_the_prompt_is_there_not_when_the_leader_ends() -> None:
    worker = worker_with(max_batch_tokens=8)
    for task in group_of(2):
        worker.assign(replace(task, max_tokens=30))
    for _ in range(3):
        worker.step()
    assert worker.batcher.load().running == 2


def test_siblings_do_not_wait_for_a_leader_that_finds_the_prompt_in_the_cache() -> None:
    worker = worker_with(max_batch_tokens=64)
    worker.assign(Task(9, prompt(13), max_tokens=1))
    worker.run()
    for task in group_of(2):
        worker.assign(task)
    worker.plan()
    assert worker.batcher.queues.num_blocked == 0
    worker.finish()
    worker.run()


@pytest.mark.parametrize("steps", [0, 1])
def test_R3_siblings_go_on_when_the_leader_is_aborted(steps: int) -> None:
    worker = worker_with(max_batch_tokens=4)
    for task in group_of(3):
        worker.assign(task)
    for _ in range(steps):
        worker.step()
    worker.abort(1)
    assert shape(worker.plan())[0][0] == 2
    worker.finish()
    worker.run()
    assert set(worker.finished) == {2, 3}


def test_siblings_do_not_wait_for_a_leader_that_never_came_or_has_ended() -> None:
    worker = worker_with(max_batch_tokens=64)
    _, second, third = group_of(3)
    worker.assign(second)
    assert shape(worker.plan())[0][0] == 2
    worker.finish()
    worker.run()
    worker.assign(third)
    assert shape(worker.plan())[0][0] == 3
    worker.finish()


def test_siblings_do_not_wait_for_a_leader_whose_abort_is_under_way() -> None:
    worker = worker_with(max_batch_tokens=4)
    leader, sibling = group_of(2)
    worker.assign(leader)
    worker.plan()
    worker.abort(1)
    worker.assign(sibling)
    assert worker.batcher.queues.num_blocked == 0
    worker.run()
    assert set(worker.finished) == {2}


def test_siblings_of_a_prompt_without_a_full_block_wait_for_nobody() -> None:
    worker = worker_with()
    for task in group_of(3, length=4):
        worker.assign(task)
    assert len(shape(worker.plan())) == 3


def test_R3_a_sibling_that_waits_is_aborted_at_once() -> None:
    worker = worker_with()
    for task in group_of(2):
        worker.assign(task)
    aborted, heartbeat = worker.abort(2)
    assert isinstance(aborted, Aborted)
    assert isinstance(heartbeat, Heartbeat)
    worker.run()
    assert set(worker.finished) == {1}


def test_siblings_wait_through_the_leaders_preemption() -> None:
    worker = worker_with(8, max_model_len=32, max_batch_tokens=4)
    worker.assign(Task(9, prompt(4, 70), max_tokens=16))
    worker.step()
    for task in group_of(2):
        worker.assign(task)
    worker.run()
    assert set(worker.finished) == {9, 1, 2}
