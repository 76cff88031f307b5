"""Park, wake, add: who is in service, and that nothing is lost on the way."""

from collections.abc import Sequence

import pytest

from appliance.core.asks import Answered, Decided, Outcome, ParkAsked, WakeAsked, WorkerAsked
from appliance.core.lifecycle import WorkerState
from appliance.core.messages import DrainStarted, Output, Park, Pull, Refused, StartWorker, Wake
from appliance.core.types import ErrorKind, Role, WorkerId, WorkerSpec
from tests.core.node_kit import assigns
from tests.core.test_moving import Pair, kinds

MIXED = Role.MIXED


class Staff(Pair):
    """A node whose operator parks, wakes and adds."""

    asks = 0

    def park(self, worker: int) -> list[Output]:
        self.asks += 1
        return self.hear(ParkAsked(ask=self.asks, worker=WorkerId(worker)))

    def wake_up(self, worker: int) -> list[Output]:
        self.asks += 1
        return self.hear(WakeAsked(ask=self.asks, worker=WorkerId(worker)))

    def add(self, worker: int, **more: object) -> list[Output]:
        self.asks += 1
        spec = WorkerSpec(id=WorkerId(worker), devices=("cpu",), **more)  # type: ignore[arg-type]
        return self.hear(WorkerAsked(ask=self.asks, spec=spec))

    def state_of(self, worker: int) -> WorkerState:
        return self.core.view.workers[WorkerId(worker)].state


def answers(outputs: Sequence[Output]) -> list[tuple[Outcome, str]]:
    return [(o.outcome, o.reason) for o in outputs if isinstance(o, Answered)]


def test_an_idle_worker_is_parked_and_woken_at_once() -> None:
    node = Staff(MIXED, MIXED)
    said = node.park(1)
    assert kinds(said) == ["Decided", "Park", "Decided", "Answered"]
    assert node.state_of(1) is WorkerState.PARKED
    for number in range(1, 4):
        assert assigns(node.arrive(number)) == [(number, 0, 0)]
    assert answers(node.park(1)) == [(Outcome.DONE, "")], "it is parked already"
    said = node.wake_up(1)
    assert [o.worker for o in said if isinstance(o, Wake)] == [1]
    assert answers(said) == [(Outcome.DONE, "")]
    assert assigns(node.arrive(4)) == [(4, 1, 0)]
    assert answers(node.wake_up(1)) == [(Outcome.DONE, "")], "it serves already"


def test_what_runs_there_moves_away_first() -> None:
    node = Staff(MIXED, MIXED)
    node.arrive(1)
    node.step(0, [1])
    said = node.park(0)
    assert [(o.source, o.worker) for o in said if isinstance(o, Pull)] == [(0, 1)]
    assert node.state_of(0) is WorkerState.DRAINING
    node.prefilled(1)
    node.pulled(1)
    assert node.state_of(0) is WorkerState.DRAINING, "its lease has not ended"
    said = node.released(1)
    assert isinstance(said[0], Park)
    answer = next(o for o in said if isinstance(o, Answered))
    assert (answer.outcome, answer.migrated) == (Outcome.DONE, 1)


def test_off_a_worker_to_be_parked_decodes_go_to_prefill_workers_too() -> None:
    node = Staff(Role.PREFILL, Role.DECODE)
    node.arrive(1)
    node.step(0, [1])
    node.prefilled(1)
    node.pulled(1)
    said = node.park(1)
    assert [(o.source, o.worker) for o in said if isinstance(o, Pull)] == [(1, 0)]


def test_who_cannot_be_emptied_in_time_serves_on() -> None:
    node = Staff(MIXED, MIXED, linked=False, park_seconds=4.0)
    node.arrive(1)
    node.park(0)
    assert node.core.next_wakeup() == pytest.approx(node.now + 4.0)
    ((outcome, reason),) = answers(node.wake())
    assert outcome is Outcome.ROLLED_BACK
    assert "could not be moved" in reason
    assert node.state_of(0) is WorkerState.READY
    node.step(0, [1], finished=[1])


def test_a_worker_that_dies_while_it_is_emptied_comes_back_in_service() -> None:
    node = Staff(MIXED, MIXED)
    node.arrive(1)
    node.park(0)
    ((outcome, reason),) = answers(node.down(0))
    assert outcome is Outcome.ROLLED_BACK
    assert "died" in reason
    node.respawn(0)
    assert node.state_of(0) is WorkerState.READY


def test_a_parked_worker_that_dies_comes_back_parked() -> None:
    node = Staff(MIXED, MIXED)
    node.park(1)
    node.down(1)
    node.respawn(1)
    assert node.state_of(1) is WorkerState.PARKED
    assert isinstance(node.said[-1], Park)


def test_the_last_worker_in_service_is_not_parked() -> None:
    node = Staff(MIXED, MIXED)
    node.park(0)
    ((outcome, reason),) = answers(node.park(1))
    assert outcome is Outcome.REFUSED
    assert "only one in service" in reason
    node.down(1)
    assert answers(node.park(1))[0][0] is Outcome.REFUSED


def test_a_worker_that_a_live_request_needs_is_not_parked() -> None:
    node = Staff(MIXED, MIXED)
    node.down(1)
    while node.state_of(1) is not WorkerState.STARTING:
        node.wake()
    node.up(1, num_blocks=16)
    node.arrive(1, prompt=400)
    ((outcome, reason),) = answers(node.park(0))
    assert outcome is Outcome.REFUSED
    assert "memory enough" in reason
    assert node.core.view.workers[WorkerId(0)].state is WorkerState.READY


def test_when_all_others_are_quarantined_a_parked_worker_is_woken() -> None:
    node = Staff(MIXED, MIXED)
    node.park(1)
    node.down(0)
    for _ in range(2):
        node.respawn(0)
        node.down(0)
    assert node.state_of(0) is WorkerState.QUARANTINED
    assert node.state_of(1) is WorkerState.READY
    decided = [o for o in node.said if isinstance(o, Decided)][-1]
    assert (decided.kind, decided.by) == ("wake", "mechanism")


def test_a_worker_may_refuse_to_be_parked() -> None:
    node = Staff(MIXED, MIXED)
    node.park(1)
    node.hear(
        Refused(worker=WorkerId(1), command="Park", kind=ErrorKind.INTERNAL, reason="not here")
    )
    assert node.state_of(1) is WorkerState.READY


def test_one_more_worker_serves_when_it_is_up() -> None:
    node = Staff(MIXED, MIXED)
    said = node.add(5, role=Role.DECODE)
    assert [o.worker for o in said if isinstance(o, StartWorker)] == [5]
    assert not answers(said)
    said = node.up(5)
    assert answers(said) == [(Outcome.DONE, "")]
    view = node.core.view.workers[WorkerId(5)]
    assert (view.state, view.role) == (WorkerState.READY, Role.DECODE)
    assert answers(node.add(5))[0][0] is Outcome.REFUSED


def test_one_more_worker_may_come_up_parked_and_is_woken_when_it_is_wanted() -> None:
    node = Staff(MIXED, MIXED)
    node.add(2, parked=True)
    said = node.up(2)
    assert answers(said) == [(Outcome.DONE, "")]
    assert node.state_of(2) is WorkerState.PARKED
    node.add(3, parked=True)
    assert answers(node.wake_up(3))[0][0] is Outcome.REFUSED, "it is being started"
    node.up(3)
    assert answers(node.wake_up(3)) == [(Outcome.DONE, "")]
    assert node.state_of(3) is WorkerState.READY


def test_one_more_worker_that_never_comes_up_is_said() -> None:
    node = Staff(MIXED, MIXED)
    said = node.add(2)
    for _ in range(3):
        while not any(isinstance(o, StartWorker) for o in said):
            said = node.wake()
        said = node.down(2, silent=True, cause="exit code 3")
    ((outcome, reason),) = answers(said)
    assert outcome is Outcome.ROLLED_BACK
    assert "exit code 3" in reason


def test_nothing_is_added_while_the_server_shuts_down() -> None:
    node = Staff(MIXED, MIXED)
    node.hear(DrainStarted())
    assert answers(node.add(2))[0][0] is Outcome.REFUSED
