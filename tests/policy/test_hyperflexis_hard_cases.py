"""HyperFlexis where something is missing: workers that get no prompts, budgets that nothing can
keep, requests that come back, a queue whose head fits nowhere."""

import pytest

from appliance.core.messages import Degrade
from appliance.core.types import ErrorKind, OnMiss, RequestId, Role, Slo
from tests.policy.known_node import Known, placed, urgent

HOPELESS = 1e-4
"""Seconds per token that no step is as short as."""


def busy(node: Known, *, first: int = 1, prompts: int = 6) -> None:
    """Every ready worker has prompts for more than two steps, and the head of the queue waits."""
    for number in range(first, first + prompts):
        node.arrive(number, prompt=2000, slo=urgent(60.0))


def test_a_refused_request_is_offered_to_nobody_while_others_wait() -> None:
    node = Known()
    busy(node)
    waiting = node.core.view.num_waiting
    node.arrive(9, prompt=8000, slo=urgent(0.4, on_miss=OnMiss.REFUSE))
    assert node.ended[9].error is ErrorKind.BUDGET
    assert node.core.view.num_waiting == waiting


def test_one_of_several_answers_is_never_refused_alone() -> None:
    node = Known()
    busy(node)
    leader = RequestId(9)
    for number in (9, 10):
        slo = urgent(0.4, on_miss=OnMiss.REFUSE)
        node.arrive(number, prompt=8000, slo=slo, group=leader)
    assert 9 not in node.ended
    assert 10 not in node.ended


def test_R3_after_a_death_an_answer_that_was_in_time_goes_on_first() -> None:
    node = Known(2)
    node.arrive(1, prompt=100, slo=urgent(0.5, tpot=0.05))
    where = node.where[1]
    node.step(where, [1])
    node.hear_later(3.0)
    busy(node, first=20, prompts=12)
    outputs = node.down(where)
    assert not [each for each in outputs if isinstance(each, Degrade)]
    assert placed(outputs)[:1] == [1]
    assert node.where[1] == 1 - where


def test_best_effort_is_served_though_one_worker_is_gone() -> None:
    node = Known(2, lane_after=5.0)
    node.down(1)
    busy(node)
    node.arrive(9, prompt=8000, slo=urgent(0.4))
    assert 9 not in node.where, "all are full"
    node.hear_later(6.0)
    assert node.where.get(9) == 0, "its turn has come"


def test_a_worker_for_answers_counts_for_no_prompt() -> None:
    node = Known(3, roles=[Role.PREFILL, Role.DECODE, Role.DECODE], lane_after=5.0)
    busy(node)
    said = node.arrive(9, prompt=200, slo=urgent(0.1))
    assert not [each for each in said if isinstance(each, Degrade)]
    assert node.where[9] == 0
    node.arrive(10, prompt=8000, slo=urgent(0.4))
    assert 10 not in node.where, "the one for prompts has two steps of them"
    node.hear_later(6.0)
    node.exact_step(0, [1, 9], finished=[1, 9], prefill=512)
    assert node.where[10] == 0, "before those that are in time, since it has waited so long"


@pytest.mark.parametrize("on_miss", list(OnMiss))
def test_a_budget_per_token_that_no_step_keeps_holds_up_nobody(on_miss: OnMiss) -> None:
    node = Known()
    node.arrive(1, prompt=10, slo=urgent(60.0, tpot=0.05))
    node.step(0, [1])
    for number in range(2, 8):
        said = node.arrive(number, prompt=10, slo=urgent(60.0, tpot=HOPELESS, on_miss=on_miss))
        if on_miss is OnMiss.REFUSE:
            assert node.ended[number].error is ErrorKind.BUDGET
            assert "no step is that short" in node.ended[number].message
        else:
            assert [each.request_id for each in said if isinstance(each, Degrade)] == [number]
            assert node.where[number] == 0, "what its budget asks for is nobody's measure now"
    node.arrive(8, prompt=10, slo=urgent(60.0, tpot=0.05))
    assert node.where[8] == 0


def test_a_budget_that_only_an_empty_worker_keeps_is_not_waited_for() -> None:
    node = Known()
    for number in range(1, 10):
        node.arrive(number, prompt=10, slo=urgent(60.0, tpot=0.05))
        node.step(0, [number])
    node.arrive(20, prompt=10, slo=urgent(60.0, tpot=0.0042))
    assert node.where[20] == 0


def test_who_has_only_a_budget_per_token_is_not_refused_for_having_waited() -> None:
    node = Known(patience=5.0)
    busy(node, prompts=4)
    node.arrive(9, prompt=4000, slo=Slo(tpot=0.05, on_miss=OnMiss.REFUSE))
    said = node.hear_later(30.0)
    said += node.wake()
    assert 9 not in node.ended
    assert not [each for each in said if isinstance(each, Degrade) and each.request_id == 9]


def test_best_effort_that_has_waited_for_long_need_not_fit_beside_what_is_there() -> None:
    node = Known(lane_after=5.0)
    for number in range(1, 60):
        node.arrive(number, prompt=10, slo=urgent(600.0, tpot=0.0082))
        node.exact_step(0, sorted(node.at(0)))
    node.arrive(90, prompt=3000, slo=urgent(0.01))
    assert 90 not in node.where, "decodes there bear no more"
    node.hear_later(6.0)
    node.exact_step(0, sorted(node.at(0)))
    node.wake()
    assert node.where[90] == 0
