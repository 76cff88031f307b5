"""The cost model learns from steps and orders workers by work."""

import pytest

from appliance.core.cost import CostModel
from appliance.core.lifecycle import WorkerState
from appliance.core.messages import PrefixPulled, SeqFinished, StepReported
from appliance.core.types import FinishReason, RequestId, Role, WorkerId
from appliance.core.view import WorkerView
from tests.core.node_kit import load


def step(
    *, elapsed: float, prefill: int = 0, decode: int = 0, worker: int = 0, answer: int = 0
) -> StepReported:
    end = SeqFinished(
        id=RequestId(1), reason=FinishReason.STOP, emitted_tokens=answer, cached_tokens=0
    )
    return StepReported(
        worker=WorkerId(worker),
        step=1,
        elapsed=elapsed,
        prefill_tokens=prefill,
        decode_tokens=decode,
        ids=(),
        load=load(),
        finished=(end,) if answer else (),
    )


def worker(*, pending: int = 0, assigned: int = 0, seqs: int = 10) -> WorkerView:
    return WorkerView(
        id=WorkerId(0),
        state=WorkerState.READY,
        role=Role.MIXED,
        as_of=0.0,
        load=load(),
        block_tokens=16,
        max_num_seqs=seqs,
        max_batch_tokens=512,
        assigned=assigned,
        pending_tokens=pending,
        step_seconds=0.0,
    )


def learnt() -> CostModel:
    cost = CostModel()
    for _ in range(200):
        cost.observe(step(elapsed=0.05, decode=8, answer=200))
        for prefill in (50, 100, 200):
            cost.observe(step(elapsed=0.05 + 0.002 * prefill, prefill=prefill, decode=8))
    return cost


def test_it_learns_seconds_of_prefill_decode_and_step() -> None:
    cost = learnt()
    assert cost.prefill_seconds(100) == pytest.approx(0.2, rel=0.05)
    assert cost.prefill_seconds(200) == pytest.approx(0.4, rel=0.05)
    assert cost.decode_seconds(10) == pytest.approx(200 * 0.05 / 10, rel=0.01)
    assert cost.step_seconds(WorkerId(0)) > 0.05
    assert cost.step_seconds(WorkerId(1)) == 0.0


def test_more_pending_more_assigned_and_more_new_tokens_are_more_work() -> None:
    for cost in (CostModel(), learnt()):
        least = cost.work_seconds(worker(), 10)
        assert cost.work_seconds(worker(pending=50), 10) > least
        assert cost.work_seconds(worker(assigned=2), 10) > least
        assert cost.work_seconds(worker(), 60) > least > 0


def test_a_backlog_is_shared_by_those_who_serve() -> None:
    cost = learnt()
    one = cost.backlog_seconds([worker(seqs=10)], num_waiting=20, waiting_tokens=1000)
    two = cost.backlog_seconds([worker(), worker()], num_waiting=20, waiting_tokens=1000)
    assert one == pytest.approx(2 * two)
    assert one == pytest.approx(cost.prefill_seconds(1000) + 20 * 1.0, rel=0.01)
    assert cost.backlog_seconds([], num_waiting=1, waiting_tokens=10) > 0


def test_a_prompt_after_a_long_prefix_never_costs_less_than_one_without() -> None:
    for cost in (CostModel(), learnt()):
        costs = [cost.prefill_seconds(64, prefix_tokens=prefix) for prefix in (0, 100, 4000)]
        assert 0.0 < costs[0] <= costs[1] <= costs[2]


def test_a_step_with_prefill_that_is_shorter_than_one_without_gives_no_negative_cost() -> None:
    cost = CostModel(memory=1.0)
    for _ in range(50):
        cost.observe(step(elapsed=1.0, decode=4))
        cost.observe(step(elapsed=0.1, prefill=10, decode=4))
    assert cost.prefill_seconds(10) >= 0.0
    assert cost.steps.seconds(prefill_tokens=10, decodes=4) > 0.0


def test_all_workers_teach_one_model_of_steps() -> None:
    cost = CostModel()
    for number in range(60):
        cost.observe(step(elapsed=0.04, decode=8, worker=number % 3))
    assert cost.steps.seconds(decodes=8) == pytest.approx(0.04, rel=0.05)
    assert cost.steps.error.num_steps == 59  # the first one only sets the size of the guess
    assert cost.tail == cost.steps.tail >= 1.0


def test_equal_reports_give_equal_answers() -> None:
    assert learnt().work_seconds(worker(), 9) == learnt().work_seconds(worker(), 9)


def test_a_burst_of_slow_copies_does_not_end_copying() -> None:
    model = CostModel(copy_overhead_seconds=1e-3)
    before = model.copy_seconds(0, 1e9)
    for _ in range(12):
        model.observe_copy(pulled(seconds=0.01), 1e9)
    burst = model.copy_seconds(0, 1e9)
    assert before < burst < 0.004
    for _ in range(12):
        model.observe_copy(pulled(seconds=0.001), 1e9)
    assert model.copy_seconds(0, 1e9) < 0.5 * (before + burst)


def pulled(*, seconds: float) -> PrefixPulled:
    return PrefixPulled(
        worker=WorkerId(0),
        request_id=RequestId(1),
        source=WorkerId(1),
        wanted=1,
        num_blocks=1,
        num_bytes=1,
        seconds=seconds,
        path="test",
    )
