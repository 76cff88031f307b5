"""The slot `late`: who is demoted is served all the same, who is refused is told why, and what the
views count about requests is what is there."""

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from appliance.core.asks import Decided
from appliance.core.messages import Degrade
from appliance.core.slots import Late, PolicyMistake
from appliance.core.types import ErrorKind, RequestId, Slo, WorkerId
from appliance.core.view import NodeView
from appliance.policy import make_policy
from tests.core.node_kit import Node

FCFS = make_policy("fcfs", {}).dispatch


class Says:
    """A policy that names whom it is told to, once."""

    def __init__(self, *late: Late) -> None:
        self.late = list(late)

    def __call__(self, view: NodeView, now: float) -> Sequence[Late]:
        named, self.late = self.late, []
        return named


def node(says: Says, **more: object) -> Node:
    """One worker that runs one request, with one more in its queue."""
    return Node(1, max_num_seqs=1, policy=replace(FCFS, late=says), **more)  # type: ignore[arg-type]


def demote(number: int) -> Late:
    return Late(id=RequestId(number), action="demote", reason="hopeless")


def refuse(number: int) -> Late:
    return Late(id=RequestId(number), action="refuse", reason="hopeless")


def test_who_is_demoted_is_served_and_it_is_on_record() -> None:
    says = Says()
    core = node(says)
    for number in (1, 2, 3):
        core.arrive(number, slo=Slo(ttft=1.0))
    says.late = [demote(3)]
    said = core.step(0, [1])
    assert Degrade(request_id=RequestId(3), reason="hopeless") in said
    (decided,) = [each for each in said if isinstance(each, Decided)]
    assert (decided.kind, decided.by) == ("demote", "policy")
    assert "request 3 (default): hopeless" in decided.trigger
    assert core.core.view.is_demoted(RequestId(3))
    assert core.core.view.traffic.demoted == 1
    for number in (1, 2, 3):
        core.step(0, [number], finished=[number])
    assert core.ended[3].error is None
    assert core.ended[3].times is not None
    assert core.ended[3].times.demoted


def test_who_is_refused_is_told_why() -> None:
    says = Says()
    core = node(says)
    for number in (1, 2, 3):
        core.arrive(number, slo=Slo(ttft=1.0))
    says.late = [refuse(3)]
    core.step(0, [1])
    assert core.ended[3].error is ErrorKind.BUDGET
    assert core.ended[3].message == "hopeless"
    assert core.core.view.traffic.refused == 1


@pytest.mark.parametrize(
    ("late", "words"),
    [
        (demote(9), "no request 9"),
        (refuse(1), "under way"),
        (refuse(9), "no request 9"),
    ],
)
def test_what_cannot_be_is_a_mistake_of_the_policy(late: Late, words: str) -> None:
    says = Says()
    core = node(says)
    core.arrive(1)
    says.late = [late]
    with pytest.raises(PolicyMistake, match=words):
        core.arrive(2)


def test_nobody_is_demoted_twice() -> None:
    says = Says()
    core = node(says)
    core.arrive(1)
    says.late = [demote(1)]
    core.arrive(2)
    says.late = [demote(1)]
    with pytest.raises(PolicyMistake, match="demoted before"):
        core.arrive(3)


def test_views_count_what_decodes_and_how_tight_it_is() -> None:
    says = Says()
    core = Node(1, policy=replace(FCFS, late=says))
    core.arrive(1, prompt=10, slo=Slo(tpot=0.05))
    core.arrive(2, prompt=20, slo=Slo(tpot=0.02))
    core.arrive(3, prompt=30)

    def seen() -> tuple[int, int, float | None]:
        worker = core.core.view.workers[WorkerId(0)]
        return worker.decodes, worker.context_tokens, worker.tightest_tpot

    assert seen() == (0, 0, 0.02)
    prompts = core.core.view.prompts(WorkerId(0))
    assert [(each.request.id, each.tokens, each.heard) for each in prompts] == [
        (1, 10, False),
        (2, 20, False),
        (3, 30, False),
    ]
    core.step(0, [1, 2])
    assert seen() == (2, 32, 0.02)
    (prompt,) = core.core.view.prompts(WorkerId(0))
    assert (prompt.request.id, prompt.heard) == (3, True)
    core.step(0, [1, 2, 3], counts=[1, 2, 1])
    assert seen() == (3, 66, 0.02)
    says.late = [demote(2)]
    core.step(0, [1])
    assert seen() == (3, 67, 0.05), "the demoted bind nobody"
    core.step(0, [2], finished=[2])
    assert seen() == (2, 44, 0.05)
    core.down(0)
    assert seen() == (0, 0, None)


def test_the_queue_tells_what_came_and_what_left() -> None:
    core = Node(1, max_num_seqs=1, queue_ahead=0)
    view = core.core.view
    for number in (1, 2, 3):
        core.arrive(number)
    first = view.queue_changes(0)
    assert [(each.id, came) for each, came in first.changes] == [
        (1, True),
        (1, False),
        (2, True),
        (3, True),
    ]
    assert not view.queue_changes(first.mark).changes
    core.cancel(3)
    later = view.queue_changes(first.mark)
    assert [(each.id, came) for each, came in later.changes] == [(3, False)]
    for number in range(10, 3000):
        core.arrive(number)
        core.cancel(number)
    late = view.queue_changes(later.mark)
    assert late.whole
    assert [each.id for each, _ in late.changes] == [2]
    assert view.queue_changes(late.mark + 1000).whole, "a mark that it never gave"
