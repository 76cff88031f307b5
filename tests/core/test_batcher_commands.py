"""Batcher: commands that are not about a sequence, and the mistakes of others."""

import pytest

from appliance.core.batcher import Batcher
from appliance.core.committing import ProtocolError
from appliance.core.messages import (
    Abort,
    Assign,
    Command,
    Heartbeat,
    LoadWeights,
    Migrate,
    Park,
    Refused,
    RoleChanged,
    SetRole,
    Wake,
)
from appliance.core.planning import PolicyError
from appliance.core.slots import BatchSlots, Grant
from appliance.core.types import (
    ErrorKind,
    MoveId,
    Request,
    RequestId,
    Role,
    SeqResult,
    StepResult,
    WorkerId,
    WorkerLoad,
)
from appliance.core.view import LocalView
from appliance.policy.parts import fill_fcfs, victim_latest
from tests.core.toy_worker import (
    CONFIG,
    FCFS,
    WORKER,
    Task,
    paged,
    plain_batcher,
    prompt,
    result_of,
    shape,
    worker_with,
)

# --- other commands, and mistakes of others -------------------------------------------------------


def request_of(request_id: int = 1, **facts: object) -> Request:
    known: dict[str, object] = {"arrived": 0.0, "prompt_tokens": 5, "max_tokens": 5}
    return Request(id=RequestId(request_id), **(known | facts))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (
            Migrate(worker=WORKER, move=MoveId(1), request_id=RequestId(1), target=WorkerId(1)),
            "Migrate",
        ),
        (LoadWeights(worker=WORKER), "LoadWeights"),
    ],
)
def test_what_is_not_performed_here_is_refused_by_name(command: Command, name: str) -> None:
    (refused,) = worker_with().handle(command)
    assert isinstance(refused, Refused)
    assert refused.command == name
    assert refused.reason


@pytest.mark.parametrize("role", list(Role))
def test_each_role_is_taken_and_none_of_an_older_epoch(role: Role) -> None:
    worker = worker_with()
    reports = worker.handle(SetRole(worker=WORKER, role=role, epoch=3))
    assert reports == [RoleChanged(worker=WORKER, role=role, epoch=3)]
    (refused,) = worker.handle(SetRole(worker=WORKER, role=Role.MIXED, epoch=2))
    assert isinstance(refused, Refused)
    assert "role epoch 2 is over" in refused.reason
    assert worker.batcher.role is role


def test_a_parked_worker_refuses_new_work_until_it_wakes() -> None:
    worker = worker_with()
    worker.assign(Task(1, prompt(5)))
    assert worker.handle(Park(worker=WORKER)) == []
    (refused,) = worker.assign(Task(2, prompt(5)))
    assert isinstance(refused, Refused)
    assert refused.kind is ErrorKind.NO_WORKER
    worker.run()
    assert set(worker.finished) == {1}, "what is here goes on"
    worker.handle(Wake(worker=WORKER))
    worker.assign(Task(2, prompt(5)))
    worker.run()
    assert set(worker.finished) == {1, 2}


@pytest.mark.parametrize(
    ("facts", "emitted", "words"),
    [
        ({"prompt_tokens": 0}, 0, "prompt_tokens 0"),
        ({"max_tokens": 0}, 0, "max_tokens 0"),
        ({}, 5, "5 tokens were emitted already, 5 are allowed"),
        ({"prefix_hashes": (1, 2)}, 0, "2 prefix_hashes for 5 tokens in blocks of 4"),
    ],
)
def test_an_assignment_without_sense_is_refused(
    facts: dict[str, object], emitted: int, words: str
) -> None:
    batcher = Batcher(WORKER, CONFIG, groups=[paged(64)], policy=FCFS)
    command = Assign(worker=WORKER, request=request_of(**facts), emitted_tokens=emitted)
    (refused,) = batcher.handle(command, 0.0)
    assert isinstance(refused, Refused)
    assert refused.kind is ErrorKind.INTERNAL
    assert words in refused.reason


def test_a_second_assignment_of_what_is_here_is_a_protocol_error_with_its_story() -> None:
    batcher = plain_batcher()
    with pytest.raises(ProtocolError, match=r"given twice: request 1: WAITING.*5 prompt tokens"):
        batcher.handle(Assign(worker=WORKER, request=request_of()), 0.0)


def test_a_command_for_another_worker_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="worker 0 was handed"):
        plain_batcher().handle(Abort(worker=WorkerId(5), request_id=RequestId(1)), 0.0)


def test_results_that_do_not_belong_to_the_plan_are_protocol_errors() -> None:
    batcher = plain_batcher()
    with pytest.raises(ProtocolError, match="step 1 came"):
        batcher.finish_step(StepResult(step=1, results=(), elapsed=0.0), 0.0)
    plan = batcher.next_step(0.0)
    with pytest.raises(ProtocolError, match="lacks a token of request 1"):
        batcher.finish_step(StepResult(step=1, results=(), elapsed=0.0), 0.0)
    batcher = plain_batcher()
    plan = batcher.next_step(0.0)
    good = result_of(plan, 1)
    extra = (*good.results, SeqResult(id=RequestId(9), num_tokens=1))
    with pytest.raises(ProtocolError, match="request 9 out of turn"):
        batcher.finish_step(StepResult(step=1, results=extra, elapsed=0.0), 0.0)


@pytest.mark.parametrize(
    ("grants", "words"),
    [
        ([Grant(id=RequestId(1), num_tokens=17)], "exceed the budget of 16"),
        ([Grant(id=RequestId(8), num_tokens=1)], "no such sequence"),
        ([Grant(id=RequestId(1), num_tokens=0)], "at least one token"),
    ],
)
def test_a_policy_that_grants_what_it_may_not_is_stopped(grants: list[Grant], words: str) -> None:
    policy = BatchSlots(victim=victim_latest, fill=lambda view, budget, now: grants)
    batcher = Batcher(WORKER, CONFIG, groups=[paged(64)], policy=policy)
    batcher.handle(Assign(worker=WORKER, request=request_of()), 0.0)
    with pytest.raises(PolicyError, match=words):
        batcher.next_step(0.0)


def test_a_policy_that_chooses_a_victim_that_is_none_is_stopped() -> None:
    policy = BatchSlots(victim=lambda view, candidates, now: RequestId(99), fill=fill_fcfs)
    worker = worker_with(8, max_model_len=32, policy=policy)
    for number in (1, 2):
        worker.assign(Task(number, prompt(6, 20 * number), max_tokens=20))
    with pytest.raises(PolicyError, match="chose request 99 as victim"):
        worker.run()


def test_a_repeated_or_generous_grant_is_trimmed() -> None:
    def twice(view: LocalView, budget: int, now: float) -> list[Grant]:
        ids = [seq.id for seq in (*view.running, *view.waiting)]
        return [Grant(id=request_id, num_tokens=4) for request_id in (*ids, *ids)]

    worker = worker_with(policy=BatchSlots(victim=victim_latest, fill=twice))
    worker.assign(Task(1, prompt(6)))
    assert shape(worker.plan()) == [(1, 0, 4, "prefill")]
    worker.finish()
    assert shape(worker.plan()) == [(1, 4, 2, "prefill")]


def test_heartbeats_say_how_long_the_step_has_been_running() -> None:
    worker = worker_with()
    (idle,) = worker.assign(Task(1, prompt(5)))
    assert isinstance(idle, Heartbeat)
    assert idle.in_step is None
    worker.plan()
    worker.now += 2.0
    (busy,) = worker.assign(Task(2, prompt(5)))
    assert isinstance(busy, Heartbeat)
    assert busy.in_step == pytest.approx(2.001)
    assert busy.step == 0
    worker.finish()
    (later,) = worker.assign(Task(3, prompt(5)))
    assert isinstance(later, Heartbeat)
    assert later.step == 1


def test_the_load_of_a_worker_adds_up() -> None:
    worker = worker_with(20, max_batch_tokens=8)
    worker.assign(Task(1, prompt(6), max_tokens=9))
    worker.assign(Task(2, prompt(9, 30), max_tokens=9))
    worker.assign(Task(3, prompt(9, 50), max_tokens=9))
    worker.step()
    assert worker.batcher.load() == WorkerLoad(
        blocks_total=20,
        blocks_free=17,
        blocks_cached=0,
        blocks_held=3,
        blocks_leased=0,
        queued=1,
        running=2,
        backlog_tokens=7 + 9,
    )
    assert worker.batcher.next_wakeup() is None
