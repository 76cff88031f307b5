"""Flips as a transaction: done for all, or rolled back with the old roles serving (R9)."""

from collections.abc import Sequence

import pytest

from appliance.core.asks import Answered, Decided, Outcome, RolesAsked
from appliance.core.lifecycle import RequestState, WorkerState
from appliance.core.messages import DrainStarted, Output, Pull, Refused, RoleChanged, SetRole
from appliance.core.types import ErrorKind, RequestId, Role, WorkerId
from tests.core.test_moving import D2, D, P, Pair, kinds

PREFILL, DECODE, MIXED = Role.PREFILL, Role.DECODE, Role.MIXED


class Flips(Pair):
    """A node whose operator wants other roles."""

    asks = 0

    def flip(self, **roles: Role) -> list[Output]:
        """`flip(w0=DECODE)`."""
        self.asks += 1
        pairs = tuple((WorkerId(int(name[1:])), role) for name, role in roles.items())
        return self.hear(RolesAsked(ask=self.asks, roles=pairs))

    def obey(self, worker: int) -> list[Output]:
        """It takes the role that it was told last."""
        told = [o for o in self.said if isinstance(o, SetRole) and o.worker == worker][-1]
        return self.hear(RoleChanged(worker=told.worker, role=told.role, epoch=told.epoch))

    def refuse(self, worker: int) -> list[Output]:
        return self.hear(
            Refused(
                worker=WorkerId(worker),
                command="SetRole",
                kind=ErrorKind.INTERNAL,
                reason="not now",
            )
        )

    def role(self, worker: int) -> tuple[Role, WorkerState]:
        view = self.core.view.workers[WorkerId(worker)]
        return view.role, view.state

    def decoding(self, *numbers: int) -> None:
        """These have been handed off and decode."""
        for number in numbers:
            self.arrive(number)
            self.step(0, [number])
            self.prefilled(number)
            self.pulled(number)
            self.released(number)


def answer(outputs: Sequence[Output]) -> Answered:
    (found,) = [output for output in outputs if isinstance(output, Answered)]
    return found


def test_to_decode_nothing_is_waited_for() -> None:
    node = Flips(PREFILL, DECODE, PREFILL)
    node.arrive(1)
    said = node.flip(w0=DECODE)
    assert kinds(said) == ["Decided", "SetRole"]
    assert node.role(0) == (PREFILL, WorkerState.FLIPPING)
    said = node.obey(0)
    assert answer(said).outcome is Outcome.DONE
    assert answer(said).seconds == pytest.approx(0.001)
    assert isinstance(said[0], Decided)
    assert said[0].outcome == "done"
    assert node.role(0) == (DECODE, WorkerState.READY)
    assert node.core.view.workers[P].role_since == node.now


def test_to_prefill_running_decodes_are_migrated_first() -> None:
    node = Flips(PREFILL, DECODE, DECODE)
    node.decoding(1, 2)
    where = {number: node.move_of(number).worker for number in (1, 2)}
    assert where == {1: D, 2: D2}
    said = node.flip(w1=PREFILL)
    assert kinds(said) == ["Decided", "Pull", "Migrate"]
    assert node.role(1) == (DECODE, WorkerState.DRAINING)
    node.step(1, [1])
    assert node.role(1) == (DECODE, WorkerState.DRAINING)
    said = node.prefilled(1, emitted=2)
    assert kinds(said) == ["SetRole"], "nothing is left to move"
    node.pulled(1, emitted=2)
    said = node.obey(1)
    assert answer(said).outcome is Outcome.DONE
    assert answer(said).migrated == 1
    assert node.role(1) == (PREFILL, WorkerState.READY)
    assert node.state(1) is RequestState.DECODING


def test_law_10_a_draining_worker_gets_nothing() -> None:
    node = Flips(PREFILL, DECODE, DECODE)
    node.decoding(1)
    node.flip(w1=PREFILL)
    for number in range(2, 6):
        said = node.arrive(number)
        assert [o.worker for o in said if isinstance(o, Pull)] == [D2] * (number < 5)


def test_what_begins_to_come_is_called_off() -> None:
    node = Flips(PREFILL, DECODE, DECODE)
    node.arrive(1)
    said = node.flip(w1=PREFILL)
    assert kinds(said) == ["Decided", "Abort", "Resume", "Pull", "Migrate", "SetRole"]
    assert node.move_of(1).worker == D2


def test_what_cannot_move_stays_and_leaves_when_there_is_room() -> None:
    node = Flips(PREFILL, DECODE, DECODE, max_num_seqs=2)
    node.decoding(1, 2, 3, 4)
    said = [*node.flip(w1=PREFILL), *node.obey(1)]
    assert answer(said).outcome is Outcome.DONE
    decided = [o for o in said if isinstance(o, Decided)][-1]
    assert decided.outcome == "done; 2 requests stayed where they were"
    said = node.step(2, [2, 4], finished=[2])
    assert [o.source for o in said if isinstance(o, Pull)] == [D]


def test_the_time_to_drain_is_bounded() -> None:
    node = Flips(PREFILL, DECODE, DECODE, drain_seconds=2.0)
    node.decoding(1)
    node.flip(w1=PREFILL)
    assert node.core.next_wakeup() == pytest.approx(node.now + 2.0)
    assert kinds(node.wake()) == ["SetRole"]


@pytest.mark.parametrize("role", [PREFILL, MIXED])
def test_where_it_is_said_so_a_worker_finishes_its_answers_before_it_flips(role: Role) -> None:
    node = Flips(PREFILL, DECODE, DECODE, wind_down="wait", drain_seconds=60.0)
    node.decoding(1, 2)
    assert kinds(node.flip(w1=role)) == ["Decided"]
    assert node.role(1) == (DECODE, WorkerState.DRAINING)
    assert not any(isinstance(o, Pull) and o.worker == D for o in node.arrive(3))
    assert node.step(1, [1]) == []
    assert kinds(node.step(1, [1], finished=[1]))[-1] == "SetRole"
    said = node.obey(1)
    assert (answer(said).outcome, answer(said).migrated) == (Outcome.DONE, 0)
    assert node.role(1) == (role, WorkerState.READY)


def test_where_it_is_said_so_prompts_are_finished_before_a_flip_too() -> None:
    node = Flips(PREFILL, DECODE, PREFILL, wind_down="wait", drain_seconds=60.0)
    node.arrive(1)
    assert kinds(node.flip(w0=DECODE)) == ["Decided"]
    node.step(0, [1])
    node.prefilled(1)
    node.pulled(1)
    assert kinds(node.released(1)) == ["SetRole"], "it keeps nothing for a peer any more"
    assert answer(node.obey(0)).outcome is Outcome.DONE


def test_R9_two_swap_their_roles_as_one_and_no_phase_is_ever_without_a_worker() -> None:
    node = Flips(PREFILL, DECODE)
    node.decoding(1)
    said = node.flip(w0=DECODE, w1=PREFILL)
    assert [o.worker for o in said if isinstance(o, Pull)] == [P], "to the decode worker to be"
    node.prefilled(1)
    assert {node.role(0)[1], node.role(1)[1]} == {WorkerState.FLIPPING}
    assert [o for o in node.obey(0) if isinstance(o, Answered)] == []
    assert node.role(0) == (PREFILL, WorkerState.FLIPPING), "published together"
    said = node.obey(1)
    assert answer(said).outcome is Outcome.DONE
    assert (node.role(0), node.role(1)) == (
        (DECODE, WorkerState.READY),
        (PREFILL, WorkerState.READY),
    )


@pytest.mark.parametrize("fault", ["death", "refusal", "time-out", "death of the other"])
@pytest.mark.parametrize("when", ["draining", "told", "one has changed"])
def test_R9_a_fault_at_any_step_puts_the_old_roles_back(fault: str, when: str) -> None:
    node = Flips(PREFILL, DECODE, DECODE)
    node.decoding(1, 2)
    node.flip(w0=DECODE, w1=PREFILL)
    if when != "draining":
        node.prefilled(1)
        node.pulled(1)
    if when == "one has changed":
        node.obey(0)
    match fault:
        case "death":
            said = node.down(1)
        case "death of the other":
            said = node.down(0)
        case "refusal" if when == "draining":
            return  # nothing was said that could be refused
        case "refusal":
            said = node.refuse(1)
        case _ if when == "draining":
            return  # the drain's end is no fault
        case _:
            said = node.hear_later(5.0)
    assert answer(said).outcome is Outcome.ROLLED_BACK
    assert answer(said).reason
    back = [(o.worker, o.role) for o in said if isinstance(o, SetRole)]
    alive = {"death": [(P, PREFILL)], "death of the other": [(D, DECODE)]}
    both = [(P, PREFILL), (D, DECODE)]
    assert back == ([] if when == "draining" else alive.get(fault, both))
    assert (node.role(0)[0], node.role(1)[0]) == (PREFILL, DECODE)
    for worker, _ in back:
        assert node.obey(worker) == [], "an older transaction's epoch is only noted"
        assert node.role(worker)[1] is WorkerState.READY
    dead = {"death": 1, "death of the other": 0}.get(fault)
    if dead is not None:
        node.respawn(dead)
        node.link_all()
    assert kinds(node.flip(w1=PREFILL))[0] == "Decided", "it may be tried again"


def test_an_answer_of_an_older_epoch_publishes_nothing() -> None:
    node = Flips(PREFILL, DECODE, DECODE)
    node.flip(w1=PREFILL)
    node.hear_later(5.0)
    node.flip(w1=PREFILL)
    old = next(o for o in node.said if isinstance(o, SetRole))
    node.hear(RoleChanged(worker=D, role=PREFILL, epoch=old.epoch))
    assert node.role(1) == (DECODE, WorkerState.FLIPPING)
    node.obey(1)
    assert node.role(1) == (PREFILL, WorkerState.READY)


def test_asks_that_cannot_be_begun_are_refused_with_the_reason() -> None:
    node = Flips(PREFILL, DECODE, DECODE)
    node.flip(w1=PREFILL)
    for asked, reason in (
        ({"w1": DECODE}, "changing its role already"),
        ({"w7": DECODE}, "there is no worker 7"),
        ({}, "no worker is named"),
    ):
        refusal = answer(node.flip(**asked))
        assert refusal.outcome is Outcome.REFUSED
        assert reason in refusal.reason
    node.obey(1)
    node.down(2)
    assert "not ready" in answer(node.flip(w2=PREFILL)).reason
    assert answer(node.flip(w1=PREFILL)).outcome is Outcome.DONE, "it has that role"
    node.hear(DrainStarted())
    assert "shutting down" in answer(node.flip(w1=DECODE)).reason


def test_a_successor_serves_in_the_role_of_its_predecessor() -> None:
    node = Flips(PREFILL, MIXED)
    node.flip(w1=DECODE)
    node.obey(1)
    node.down(1)
    assert node.role(1)[0] is DECODE
    node.respawn(1)
    assert node.role(1) == (DECODE, WorkerState.READY)
    assert not [o for o in node.said if isinstance(o, SetRole)][1:]


def test_R10_a_flip_keeps_what_is_cached() -> None:
    node = Flips(PREFILL, DECODE)
    node.cache(1, range(5))
    node.flip(w1=MIXED)
    node.obey(1)
    assert node.core.view.cached_blocks(D, tuple(range(5))) == 5
    assert node.core.num_live == 0
    assert node.core.request_state(RequestId(1)) is None
