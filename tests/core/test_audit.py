"""What is turned away at the door is on record: once while it lasts, and with its number after."""

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from appliance.core.asks import Decided
from appliance.core.audit import QUIET
from appliance.core.messages import DrainStarted, Output
from appliance.core.slots import Accept, Admission, Refuse
from appliance.core.types import ErrorKind, Request, Slo
from appliance.core.view import NodeView
from tests.core.node_kit import FCFS, Node


def turned_away(said: Sequence[Output]) -> list[tuple[str, str, str]]:
    """(by, trigger, outcome) of what was decided."""
    decided = [each for each in said if isinstance(each, Decided)]
    assert {each.kind for each in decided} <= {"turn_away"}
    return [(each.by, each.trigger, each.outcome) for each in decided]


def full(**more: object) -> Node:
    """One worker at work, and nobody else may wait."""
    node = Node(1, max_num_seqs=1, queue_ahead=0, max_queue=1, **more)  # type: ignore[arg-type]
    node.arrive(1)
    node.arrive(2)
    return node


def test_a_full_queue_is_said_once_and_its_refusals_are_counted() -> None:
    node = full()
    said = node.arrive(3)
    words = "queue_full: 1 requests wait already (queue.max_requests)"
    assert turned_away(said) == [("mechanism", words, "")]
    for number in range(4, 104):
        assert turned_away(node.arrive(number)) == []
    assert turned_away(node.hear_later(QUIET)) == [], "not yet"
    over = node.hear_later(0.01)
    assert turned_away(over) == [("mechanism", words, "101 refused within 0.100 s")]
    (begun,) = [each for each in said if isinstance(each, Decided)]
    (ended,) = [each for each in over if isinstance(each, Decided)]
    assert (ended.decision, ended.at) == (begun.decision, begun.at), "the same decision"
    assert turned_away(node.hear_later(10.0)) == []
    assert turned_away(node.arrive(200)) == [("mechanism", words, "")], "and once more"


def test_a_refusal_long_after_the_last_one_begins_a_new_record() -> None:
    node = full()
    first = node.arrive(3)
    node.now += 5.0
    second = node.arrive(4)
    assert [outcome for _, _, outcome in turned_away(second)] == ["1 refused within 0.000 s", ""]
    numbers = {each.decision for each in (*first, *second) if isinstance(each, Decided)}
    assert len(numbers) == 2


def test_each_reason_has_a_record_of_its_own() -> None:
    def admit(view: NodeView, request: Request, now: float) -> Admission:
        del view, now
        if request.slo.class_name == "default":
            return Accept()
        return Refuse(kind=ErrorKind.BUDGET, reason="hopeless")

    node = full(policy=replace(FCFS.dispatch, admit=admit))
    picky = Slo(class_name="picky")
    assert [by for by, _, _ in turned_away(node.arrive(3))] == ["mechanism"]
    node.step(0, [1], finished=[1])
    assert turned_away(node.arrive(4, slo=picky)) == [
        ("policy", "budget_unreachable: hopeless", "")
    ]
    node.hear(DrainStarted())
    ((by, trigger, outcome),) = turned_away(node.arrive(5))
    assert (by, outcome) == ("mechanism", "")
    assert trigger.startswith("draining: the server is shutting down")
    over = turned_away(node.hear_later(2 * QUIET))
    assert sorted(by for by, _, _ in over) == ["mechanism", "mechanism", "policy"]
    assert {outcome for _, _, outcome in over} == {"1 refused within 0.000 s"}


@pytest.mark.parametrize("prompt", [1000, 5000])
def test_what_fits_no_worker_is_the_clients_mistake_and_no_decision(prompt: int) -> None:
    node = Node(1)
    said = node.arrive(1, prompt=prompt)
    assert node.rejected[1].kind is ErrorKind.TOO_LONG
    assert turned_away(said) == []
