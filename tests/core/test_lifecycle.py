"""The tables of legal moves, as promises one can read."""

from collections.abc import Mapping
from enum import StrEnum

import pytest

from appliance.core.lifecycle import (
    REQUEST_MOVES,
    WORKER_MOVES,
    IllegalTransition,
    RequestState,
    WorkerState,
    check_request_move,
    check_worker_move,
)


def reachable(table: Mapping[StrEnum, frozenset[StrEnum]], start: StrEnum) -> set[StrEnum]:
    found, todo = {start}, [start]
    while todo:
        fresh = table[todo.pop()] - found
        found |= fresh
        todo.extend(fresh)
    return found


def test_every_state_has_a_row_and_every_state_is_reached() -> None:
    assert set(REQUEST_MOVES) == set(RequestState)
    assert set(WORKER_MOVES) == set(WorkerState)
    assert reachable(REQUEST_MOVES, RequestState.WAITING) == set(RequestState)
    assert reachable(WORKER_MOVES, WorkerState.STARTING) == set(WorkerState)


@pytest.mark.parametrize("state", list(RequestState))
def test_R1_every_request_can_end_and_stays_ended(state: RequestState) -> None:
    assert RequestState.ENDED in reachable(REQUEST_MOVES, state)
    assert REQUEST_MOVES[RequestState.ENDED] == frozenset()


def test_R1_a_cancelled_request_only_ends() -> None:
    assert REQUEST_MOVES[RequestState.CANCELLING] == {RequestState.ENDED}


@pytest.mark.parametrize("state", [s for s in WorkerState if s is not WorkerState.QUARANTINED])
def test_R4_every_worker_may_die_unless_it_is_down(state: WorkerState) -> None:
    down = state is WorkerState.DEAD
    assert (WorkerState.DEAD in WORKER_MOVES[state]) != down


def test_R6_a_worker_serves_only_after_a_start() -> None:
    for state in (WorkerState.DEAD, WorkerState.QUARANTINED):
        assert WorkerState.READY not in WORKER_MOVES[state]
        assert WorkerState.STARTING in WORKER_MOVES[state]


def test_R9_a_flip_has_a_way_back() -> None:
    assert WorkerState.READY in WORKER_MOVES[WorkerState.FLIPPING]


def test_an_illegal_move_tells_the_story() -> None:
    check_request_move(RequestState.WAITING, RequestState.ASSIGNED, story="")
    check_worker_move(WorkerState.STARTING, WorkerState.READY, story="")
    with pytest.raises(IllegalTransition, match="from ended to waiting; request 7"):
        check_request_move(RequestState.ENDED, RequestState.WAITING, story="request 7")
    with pytest.raises(IllegalTransition, match="from dead to ready; worker 3"):
        check_worker_move(WorkerState.DEAD, WorkerState.READY, story="worker 3")
