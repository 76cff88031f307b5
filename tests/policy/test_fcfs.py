"""First come, first served, and the table of policies."""

import pytest

from appliance.core.types import ErrorKind, Role
from appliance.policy import POLICIES, PolicySettingsError, make_policy
from tests.core.node_kit import Node, assigns


def test_the_table_knows_its_policies_by_name() -> None:
    assert "fcfs" in POLICIES
    assert make_policy("fcfs", {}).name == "fcfs"


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("fcsf", {}, "no policy 'fcsf'; did you mean 'fcfs'?"),
        ("lottery", {}, "no policy 'lottery'; known: all-mixed, edf, fcfs"),
        ("fcfs", {"max_waitin": 3}, "no setting 'max_waitin'; did you mean 'max_waiting'?"),
        ("fcfs", {"colour": 3}, "known: max_waiting, max_waiting_tokens"),
        ("fcfs", {"max_waiting": "many"}, r"\$\.max_waiting"),
        ("fcfs", {"max_waiting": -1}, r"\$\.max_waiting"),
    ],
)
def test_R20_what_is_not_known_is_refused_by_name(
    name: str, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(PolicySettingsError, match=words):
        make_policy(name, settings)


def test_requests_are_placed_in_the_order_of_arrival() -> None:
    node = Node(1, max_num_seqs=1, queue_ahead=0)
    for number in range(1, 8):
        node.arrive(number, prompt=100 - number, priority=number)
    placed = [1]
    while node.core.num_live:
        outputs = node.step(0, placed[-1:], finished=placed[-1:])
        placed += [number for number, _, _ in assigns(outputs)]
    assert placed == [1, 2, 3, 4, 5, 6, 7]


def test_its_own_bounds_on_the_queue() -> None:
    policy = make_policy("fcfs", {"max_waiting": 2, "max_waiting_tokens": 50}).dispatch
    node = Node(1, max_num_seqs=1, queue_ahead=0, policy=policy)
    node.arrive(1)
    node.arrive(2, prompt=45)
    node.arrive(3, prompt=10)
    assert node.rejected[3].kind is ErrorKind.QUEUE_FULL
    assert "max_waiting_tokens" in node.rejected[3].reason
    assert node.rejected[3].retry_after is not None
    node.arrive(4, prompt=5)
    node.arrive(5, prompt=1)
    assert "max_waiting)" in node.rejected[5].reason


def test_prompts_go_to_workers_that_are_meant_for_them_and_to_others_if_there_are_none() -> None:
    node = Node(2, max_num_seqs=1, queue_ahead=0, roles=(Role.DECODE, Role.MIXED))
    node.arrive(1)
    node.arrive(2)
    assert node.where == {1: 1}
    node.down(1)
    assert node.where == {1: 0}
