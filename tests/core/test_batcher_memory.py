"""Batcher when memory is short: preemption, admission, what can never fit."""

from collections.abc import Sequence

import pytest

from appliance.core.messages import (
    Heartbeat,
    Preempted,
    Refused,
    Report,
    StepReported,
)
from appliance.core.slots import BatchSlots, Grant
from appliance.core.types import (
    BatcherConfig,
    ErrorKind,
    RequestId,
)
from appliance.core.view import LocalView, SeqView
from appliance.policy.parts import fill_fcfs, victim_latest
from tests.core.toy_worker import (
    CONFIG,
    Task,
    ToyWorker,
    only,
    paged,
    prompt,
    shape,
    window,
    worker_with,
)

# --- memory ---------------------------------------------------------------------------------------


def test_when_memory_is_short_the_latest_is_preempted_and_recomputed() -> None:
    worker = worker_with(8, max_model_len=32)
    for number in (1, 2):
        worker.assign(Task(number, prompt(6, 20 * number), max_tokens=20))
    reports: list[Report] = []
    while not worker.preempted:
        reports = worker.step()
    (preempted,) = only(reports, Preempted)
    assert isinstance(preempted, Preempted)
    assert (preempted.request_id, preempted.lost_tokens) == (2, 16)
    assert isinstance(reports[0], StepReported)
    assert reports[0].load.queued == 1
    assert reports[0].load.backlog_tokens == 17
    worker.run()
    assert set(worker.finished) == {1, 2}


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    worker = worker_with(10, max_model_len=32)
    for number in (1, 2):
        worker.assign(Task(number, prompt(6, 20 * number), max_tokens=20))
    while not worker.preempted:
        worker.step()
    while not worker.finished:
        worker.step()
    again = worker.plan()
    assert again is not None
    (item,) = again.work
    assert item.fresh
    assert item.id == 2
    assert 0 < item.start < 6 + 20
    worker.finish()
    worker.run()
    assert worker.finished[2].cached_tokens == 0, "as it was at its first admission"


def test_R28_the_oldest_always_gets_on_whatever_the_policy_says() -> None:
    def newest_first(view: LocalView, budget: int, now: float) -> list[Grant]:
        return fill_fcfs(view, budget, now)[::-1]

    def oldest_victim(view: LocalView, candidates: Sequence[SeqView], now: float) -> RequestId:
        return candidates[0].id

    policy = BatchSlots(victim=oldest_victim, fill=newest_first)
    worker = worker_with(8, max_model_len=32, policy=policy)
    for number in range(1, 5):
        worker.assign(Task(number, prompt(2, 20 * number), max_tokens=28))
    for step in range(28):
        oldest = worker.batcher.queues.oldest()
        plan = worker.plan()
        assert plan is not None
        if step:
            assert oldest is not None
            assert plan.work[0].id == oldest.id, "each step computes a token of the oldest"
        worker.finish()
    assert len(worker.finished) == 1
    worker.run()
    assert len(worker.finished) == 4


def test_a_sequence_that_can_get_on_a_little_preempts_nobody() -> None:
    worker = worker_with(9, max_model_len=32, max_batch_tokens=20)
    worker.assign(Task(1, prompt(4), max_tokens=4))
    worker.assign(Task(2, prompt(4, 20), max_tokens=4))
    worker.step()
    worker.assign(Task(3, prompt(16, 40), max_tokens=2))
    worker.run()
    assert not worker.preempted
    assert len(worker.finished) == 3


def test_admission_leaves_running_sequences_room_to_grow() -> None:
    worker = worker_with(8, max_model_len=32, max_batch_tokens=32)
    worker.assign(Task(1, prompt(8), max_tokens=9))
    worker.step()
    worker.assign(Task(2, prompt(20, 30), max_tokens=2))
    for _ in range(7):
        assert [work[0] for work in shape(worker.plan())] == [1], "2 + 5 blocks, but 1 must grow"
        worker.finish()
    worker.run()
    assert not worker.preempted


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_memory() -> None:
    worker = worker_with(8, max_model_len=32, max_batch_tokens=32)
    worker.assign(Task(1, prompt(12), max_tokens=6))
    worker.step()
    worker.assign(Task(2, prompt(20, 30), max_tokens=2))
    worker.assign(Task(3, prompt(2, 60), max_tokens=2))
    worker.plan()
    assert worker.batcher.load().queued == 2
    worker.finish()
    worker.run()
    assert set(worker.finished) == {1, 2, 3}


def test_blocks_about_to_come_back_are_waited_for() -> None:
    """At depth 1 the last token of one sequence is in flight while the youngest needs a block."""
    worker = worker_with(6, max_model_len=16, depth=1, enable_prefix_cache=False)
    worker.assign(Task(1, prompt(7), max_tokens=3))
    worker.assign(Task(2, prompt(3, 20), max_tokens=6))
    worker.assign(Task(3, prompt(3, 30), max_tokens=6))
    worker.run()
    assert len(worker.finished) == 3
    assert not worker.preempted


def test_what_was_just_admitted_is_left_room_for_the_rest_of_its_prompt() -> None:
    def four_each(view: LocalView, budget: int, now: float) -> list[Grant]:
        everyone = [*view.running, *view.waiting]
        return [Grant(id=seq.id, num_tokens=4) for seq in everyone if seq.id not in view.stale]

    policy = BatchSlots(victim=victim_latest, fill=four_each)
    worker = worker_with(10, max_model_len=40, policy=policy)
    worker.assign(Task(1, prompt(2), max_tokens=20))
    worker.step()
    worker.assign(Task(2, prompt(24, 30), max_tokens=2))
    worker.assign(Task(3, prompt(12, 60), max_tokens=2))
    assert [work[0] for work in shape(worker.plan())] == [1, 2]
    worker.finish()
    worker.run()
    assert not worker.preempted


def test_a_long_prompt_is_not_kept_out_by_a_small_window_group() -> None:
    config = BatcherConfig(max_model_len=64, max_num_seqs=4, max_batch_tokens=16)
    worker = ToyWorker(config, groups=[paged(64), window(8, tokens=6)])
    worker.assign(Task(1, prompt(4), max_tokens=20))
    worker.step()
    worker.assign(Task(2, prompt(40, 30), max_tokens=2))
    assert [work[0] for work in shape(worker.plan())] == [1, 2]
    worker.finish()
    worker.run()


def test_leased_blocks_are_waited_for() -> None:
    worker = worker_with(4, max_model_len=16)
    worker.assign(Task(1, prompt(4), max_tokens=1))
    worker.run()
    ledger = worker.batcher.ledger
    table = ledger.open([], 0)
    ledger.grow(table, 3)
    ledger.lease(RequestId(99), table)
    ledger.close(table)
    worker.assign(Task(2, (*prompt(4), 5), max_tokens=1))
    assert worker.plan() is None, "the one free block holds its prefix, and it needs a second"
    assert worker.batcher.load().blocks_cached == 1
    ledger.release(RequestId(99))
    worker.run()
    assert worker.finished[2].cached_tokens == 4


def test_R20_what_can_never_fit_is_refused_with_the_numbers() -> None:
    worker = worker_with(4, max_model_len=64)
    (refused,) = worker.assign(Task(1, prompt(10), max_tokens=20))
    assert isinstance(refused, Refused)
    assert (refused.command, refused.kind, refused.request_id) == ("Assign", ErrorKind.TOO_LONG, 1)
    assert "need 8 blocks of 4 tokens in cache group 'kv', there are 4" in refused.reason
    assert "lower max_tokens" in refused.reason
    (heartbeat,) = worker.assign(Task(2, prompt(10), max_tokens=7))
    assert isinstance(heartbeat, Heartbeat), "16 tokens of KV fit: the last token needs none"
    worker.run()


def test_R20_a_prompt_over_max_model_len_is_refused_with_the_numbers() -> None:
    worker = worker_with(max_model_len=16)
    (refused,) = worker.assign(Task(1, prompt(16)))
    assert isinstance(refused, Refused)
    assert refused.kind is ErrorKind.TOO_LONG
    assert "16 tokens; with max_model_len 16 it may have 15" in refused.reason


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_two_cache_groups_share_preempt_and_slide(depth: int) -> None:
    config = BatcherConfig(max_model_len=40, max_num_seqs=4, max_batch_tokens=9, depth=depth)
    worker = ToyWorker(config, groups=[paged(14), window(9, tokens=6)])
    for number in range(8):
        worker.assign(Task(number, (*prompt(9), number), max_tokens=24, seed=number))
    worker.run()
    assert len(worker.finished) == 8
    assert worker.preempted
    assert any(end.cached_tokens for end in worker.finished.values())


def test_a_window_group_too_small_for_its_window_is_named() -> None:
    worker = ToyWorker(CONFIG, groups=[paged(64), window(2, tokens=6)])
    (refused,) = worker.assign(Task(1, prompt(10)))
    assert isinstance(refused, Refused)
    assert "need 3 blocks of 4 tokens in cache group 'window', there are 2" in refused.reason
