"""What the slot `roles` wants is carried out as far as it is legal, and put on record."""

from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from appliance.core.asks import Decided, ParkAsked
from appliance.core.lifecycle import WorkerState
from appliance.core.messages import DrainStarted, Output, Park, SetRole, StartWorker, Wake
from appliance.core.slots import PolicyMistake, RolePlan
from appliance.core.types import Role, WorkerId, WorkerSpec
from appliance.core.view import NodeView
from tests.core.node_kit import FCFS, assigns
from tests.core.test_moving import Pair

MIXED = Role.MIXED
SPARES = tuple(WorkerSpec(id=WorkerId(w), devices=("cpu",)) for w in (5, 6))


class Told:
    """The slot `roles`, answering what a test tells it to, once."""

    def __init__(self) -> None:
        self.wants: dict[str, Any] = {}
        self.count = 0

    def __call__(self, view: NodeView, now: float) -> RolePlan:
        wants, self.wants = self.wants, {}
        self.count += bool(wants)
        trigger = f"told {self.count}" if wants else "nothing"
        fields: dict[str, Any] = {"trigger": trigger, "again": now + 0.0005, "cost": 2.0}
        return RolePlan(**{**fields, **wants})


class Steered(Pair):
    """A node whose controller does what the test says."""

    def __init__(self, *roles: Role, **config: object) -> None:
        self.slot = Told()
        policy = replace(FCFS.dispatch, roles=self.slot)
        super().__init__(*roles, policy=policy, **config)

    def want(self, **wants: Any) -> list[Output]:
        self.slot.wants = wants
        return self.hear_later(0.01)

    def state_of(self, worker: int) -> WorkerState:
        return self.core.view.workers[WorkerId(worker)].state


def decisions(said: Sequence[Output]) -> list[tuple[str, tuple[int, ...], str]]:
    return [(o.kind, o.workers, o.outcome) for o in said if isinstance(o, Decided)]


def test_the_controller_parks_and_wakes_like_an_operator_and_says_why() -> None:
    node = Steered(MIXED, MIXED)
    said = node.want(park=(WorkerId(1),), prediction={"pressure": 0.2})
    assert [o.worker for o in said if isinstance(o, Park)] == [1]
    first = next(o for o in said if isinstance(o, Decided))
    assert (first.by, first.trigger, first.cost) == ("controller", "told 1", 2.0)
    assert first.prediction == {"pressure": 0.2}
    assert decisions(said)[-1] == ("park", (1,), "done")
    assert node.state_of(1) is WorkerState.PARKED
    for number in (1, 2):
        assert assigns(node.arrive(number)) == [(number, 0, 0)]
    said = node.want(wake=(WorkerId(1),))
    assert [o.worker for o in said if isinstance(o, Wake)] == [1]
    assert decisions(said) == [("wake", (1,), ""), ("wake", (1,), "done")]
    assert assigns(node.arrive(3)) == [(3, 1, 0)]


def test_spare_workers_are_started_in_their_order_and_no_more_than_there_are() -> None:
    node = Steered(MIXED, MIXED, spares=SPARES)
    assert node.core.view.num_spares == 2
    said = node.want(add=1)
    assert [o.worker for o in said if isinstance(o, StartWorker)] == [5]
    assert decisions(said) == [("add", (5,), "")]
    assert node.core.view.num_spares == 1
    ((kind, _, reason),) = decisions(node.want(add=1))
    assert kind == "none"
    assert "another change of the mixed workers is under way" in reason
    assert ("add", (5,), "done") in decisions(node.up(5))
    node.want(add=1)
    node.up(6)
    ((kind, _, reason),) = decisions(node.want(add=1))
    assert (kind, "no worker is left" in reason) == ("none", True)
    with pytest.raises(PolicyMistake, match="add is -1"):
        node.want(add=-1)


def test_one_structural_action_is_in_flight_in_each_pool() -> None:
    node = Steered(Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
    node.arrive(1)
    worker = next(iter(node.where.values()))
    assert worker in (0, 1)
    other = WorkerId(1 - worker)
    node.want(park=(WorkerId(worker),))
    assert node.state_of(worker) is WorkerState.DRAINING, "its prompt is still there"
    said = node.want(roles={other: Role.MIXED})
    assert "another change of the prefill workers" in decisions(said)[0][2]
    said = node.want(roles={WorkerId(2): Role.MIXED})
    assert [o.worker for o in said if isinstance(o, SetRole)] == [2], "another pool"


def test_a_park_may_be_called_off_by_the_controller_at_once() -> None:
    node = Steered(MIXED, MIXED)
    node.arrive(1)
    node.want(park=(WorkerId(0),))
    assert node.state_of(0) is WorkerState.DRAINING
    said = node.want(wake=(WorkerId(0),))
    assert ("park", (0,), "rolled back: it is needed") in decisions(said)
    assert ("wake", (0,), "done") in decisions(said)
    assert node.state_of(0) is WorkerState.READY
    node.step(0, [1], finished=[1])
    assert node.ended[1].error is None


def test_what_an_operator_parked_is_left_alone_until_an_operator_wakes_it() -> None:
    node = Steered(MIXED, MIXED)
    node.hear(ParkAsked(ask=1, worker=WorkerId(1)))
    assert not node.core.view.workers[WorkerId(1)].on_call
    ((kind, workers, reason),) = decisions(node.want(wake=(WorkerId(1),)))
    assert (kind, workers) == ("none", (1,))
    assert "parked by an operator" in reason
    assert node.state_of(1) is WorkerState.PARKED


def test_the_last_worker_in_service_is_not_parked_and_nobody_is_while_the_server_ends() -> None:
    node = Steered(MIXED, MIXED)
    said = node.want(park=(WorkerId(0), WorkerId(1)))
    outcomes = decisions(said)
    assert ("park", (0,), "") in outcomes
    assert [each for each in outcomes if each[0] == "none"], "one at a time"
    ((kind, _, reason),) = decisions(node.want(park=(WorkerId(1),)))
    assert (kind, "only one in service" in reason) == ("none", True)
    node.hear(DrainStarted())
    assert decisions(node.want(wake=(WorkerId(0),))) == []
    assert decisions(node.want(wake=(WorkerId(77),))) == []


def test_instance_seconds_are_those_of_workers_that_are_not_on_standby() -> None:
    node = Steered(MIXED, MIXED, spares=SPARES)
    start, before = node.now, node.core.instance_seconds(node.now)
    node.hear_later(10.0)
    assert node.core.instance_seconds(node.now) - before == pytest.approx(2 * (node.now - start))
    node.want(park=(WorkerId(1),))
    start, before = node.now, node.core.instance_seconds(node.now)
    node.hear_later(10.0)
    assert node.core.instance_seconds(node.now) - before == pytest.approx(node.now - start)
    node.want(add=1)
    start, before = node.now, node.core.instance_seconds(node.now)
    node.hear_later(4.0)
    assert node.core.instance_seconds(node.now) - before == pytest.approx(2 * (node.now - start)), (
        "a worker that is being started costs too"
    )
    assert node.core.instance_seconds(node.now + 5.0) == pytest.approx(
        node.core.instance_seconds(node.now) + 10.0
    )
    assert node.core.view.traffic.instance_seconds == node.core.instance_seconds(node.now)
