"""Fault plans fire at the named point, as often as asked, and never otherwise."""

import msgspec
import pytest

from appliance.core.faults import ACTIONS, POINTS, FaultPlan, FaultPlanError, FaultRule
from appliance.core.types import WorkerId

STEP = "worker.before_step"


def plan(*rules: FaultRule, worker: int = 0, epoch: int = 1) -> FaultPlan:
    return FaultPlan(rules, worker=WorkerId(worker), epoch=epoch)


def test_nothing_happens_without_a_rule() -> None:
    quiet = plan()
    assert not quiet.active
    assert all(quiet.hit(point) is None for point in POINTS for _ in range(3))


def test_a_rule_fires_at_its_nth_hit_and_once() -> None:
    rule = FaultRule(point=STEP, action="kill", nth=3)
    faults = plan(rule)
    assert [faults.hit(STEP) for _ in range(5)] == [None, None, rule, None, None]
    assert faults.hit("worker.after_step") is None


def test_a_repeating_rule_fires_from_then_on() -> None:
    rule = FaultRule(point=STEP, action="raise", nth=2, repeat=True)
    faults = plan(rule)
    assert [faults.hit(STEP) for _ in range(4)] == [None, rule, rule, rule]


def test_rules_hold_for_the_worker_and_the_incarnation_they_name() -> None:
    rules = (
        FaultRule(point=STEP, action="kill", worker=WorkerId(1)),
        FaultRule(point=STEP, action="exit", epoch=2),
    )
    assert not plan(*rules, worker=0, epoch=1).active
    assert plan(*rules, worker=1, epoch=1).hit(STEP) == rules[0]
    assert plan(*rules, worker=0, epoch=2).hit(STEP) == rules[1]


def test_a_rule_may_wait_for_a_token() -> None:
    rule = FaultRule(point=STEP, action="segv", token=666, nth=2)
    faults = plan(rule)
    assert faults.wants_tokens()
    hits = [faults.hit(STEP, tokens=frozenset(t)) for t in ([1], [666], [1, 2], [1, 666], [666])]
    assert hits == [None, None, None, rule, None]
    assert not plan(FaultRule(point=STEP, action="kill")).wants_tokens()


def test_of_two_rules_at_once_the_first_fires_and_both_count() -> None:
    first = FaultRule(point=STEP, action="delay", seconds=0.1)
    second = FaultRule(point=STEP, action="kill", nth=2)
    faults = plan(first, second)
    assert [faults.hit(STEP), faults.hit(STEP)] == [first, second]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (FaultRule(point="worker.lunch", action="kill"), "worker.lunch"),
        (FaultRule(point=STEP, action="tickle"), "tickle"),
    ],
)
def test_unknown_points_and_actions_are_refused_by_name(rule: FaultRule, words: str) -> None:
    with pytest.raises(FaultPlanError, match=words):
        plan(rule)


def test_a_plan_is_strict_json() -> None:
    text = b'[{"point": "worker.start", "action": "exit", "epoch": 1}]'
    (rule,) = msgspec.json.decode(text, type=tuple[FaultRule, ...])
    assert rule == FaultRule(point="worker.start", action="exit", epoch=1)
    assert rule.action in ACTIONS
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(b'{"point": "worker.start", "action": "exit", "at": 1}', type=FaultRule)
