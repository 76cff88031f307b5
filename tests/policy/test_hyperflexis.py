"""HyperFlexis at the node: budgets hold for whom it places and for who is there, nobody starves,
overload does not make it collapse."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from appliance.core.messages import Arrived, Assign, Degrade, Output
from appliance.core.node_config import DispatcherConfig
from appliance.core.types import ErrorKind, OnMiss, Phase, Slo, WorkerId
from appliance.metrics.outcome import Outcome
from appliance.metrics.score import attained
from appliance.policy import make_policy
from appliance.policy.choice import parse_choice
from appliance.sim.machine import parse_machine
from appliance.sim.simulation import SimulationResult, simulate
from appliance.workload.arrivals import parse_arrivals
from appliance.workload.generate import generate
from appliance.workload.items import Item
from appliance.workload.spec import load_spec
from tests.core.node_kit import assigns, request
from tests.policy.known_node import Known, placed, urgent

STEP = 0.004 + 512e-4
WIDE = DispatcherConfig(max_model_len=8192, max_queue=10**6, max_queue_tokens=10**9)

# --- who goes ---------------------------------------------------------------------------------


def test_about_two_steps_of_prompts_are_placed_and_the_rest_waits_in_order() -> None:
    node = Known()
    for number in range(1, 9):
        node.arrive(number, prompt=400, slo=urgent(9.0 - number))
    assert node.where == {1: 0, 2: 0, 3: 0, 4: 0, 5: 0, 6: 0, 7: 0, 8: 0}, (
        "each is more urgent than those before it"
    )
    node = Known()
    for number in range(1, 9):
        node.arrive(number, prompt=400, slo=urgent(1.0 + number))
    assert sorted(node.where) == [1, 2, 3], "1024 tokens are two steps"
    assert node.core.next_wakeup() is not None, "who holds names a time"
    outputs = node.step(0, [1])
    assert placed(outputs)[0] == 4


def test_an_urgent_one_is_placed_before_longer_prompts_that_have_begun() -> None:
    node = Known()
    node.arrive(1, prompt=8000, slo=urgent(8.0))
    node.arrive(2, prompt=8000, slo=urgent(9.0))
    node.arrive(3, prompt=100, slo=urgent(0.5))
    assert sorted(node.where) == [1, 3]


def test_what_would_be_late_there_goes_elsewhere() -> None:
    node = Known(2)
    node.arrive(1, prompt=800, slo=urgent(0.2))
    assert node.where[1] == 0
    node.arrive(2, prompt=800, slo=urgent(0.2))
    assert node.where[2] == 1


def test_a_worker_gets_no_more_decodes_than_its_tightest_budget_bears() -> None:
    fit = {}
    for budget in (True, False):
        node = Known(budget=budget)
        for number in range(1, 80):
            node.arrive(number, prompt=10, slo=urgent(60.0, tpot=0.0082))  # 4 ms and 42 x 0.1 ms
            node.exact_step(0, sorted(node.at(0)))
        fit[budget] = len(node.where)
    assert fit[False] == 64
    assert 36 <= fit[True] <= 42, "the tail of the prediction is what counts"


def test_memory_for_a_likely_answer_must_be_there() -> None:
    node = Known()
    for number in range(1, 200):
        node.arrive(number, prompt=4000, slo=urgent(1000.0))
        node.step(0, sorted(node.at(0)))
    held = sum(4000 for _ in node.where)
    assert held <= 4096 * 16


def test_max_tokens_is_never_a_length() -> None:
    def decisions(max_tokens: int) -> list[tuple[int, int, int]]:
        node = Known(2)
        found = []
        for number in range(1, 60):
            slo = urgent(0.3 * (number % 5 + 1), tpot=0.02) if number % 3 else Slo(e2e=9.0)
            said = node.arrive(
                number, prompt=50 * (number % 17 + 1), slo=slo, max_tokens=max_tokens
            )
            found += assigns(said)
            if number % 4 == 0:
                for worker in (0, 1):
                    found += assigns(node.step(worker, sorted(node.at(worker))))
        return found

    assert decisions(5000) == decisions(20)


def test_who_cannot_be_in_time_is_demoted_or_refused_and_the_demoted_are_served() -> None:
    node = Known()
    node.arrive(1, prompt=5000, slo=urgent(9.0))
    said = node.arrive(2, prompt=8000, slo=urgent(0.4))
    assert [each.request_id for each in said if isinstance(each, Degrade)] == [2]
    node.arrive(3, prompt=8000, slo=urgent(0.4, on_miss=OnMiss.REFUSE))
    assert node.ended[3].error is ErrorKind.BUDGET
    assert "is due in" in node.ended[3].message
    node.step(0, [1], finished=[1])
    assert node.where == {2: 0}


def test_being_late_makes_nobody_urgent() -> None:
    node = Known()
    node.arrive(1, prompt=5000, slo=urgent(9.0))
    node.arrive(2, prompt=8000, slo=urgent(0.4))
    node.arrive(3, prompt=8000, slo=urgent(0.4))
    outputs = node.arrive(4, prompt=200, slo=urgent(5.0))
    assert placed(outputs) == [4]
    assert 3 not in node.where, "one late prompt at a time while there is other work"


def test_an_idle_node_refuses_no_answer_that_it_can_give_within_its_end_to_end_budget() -> None:
    """One that decodes alone needs 4 ms a token, whatever a step full of prompts lasts."""
    node = Known()
    node.arrive(1, prompt=100, slo=Slo(e2e=4.0, on_miss=OnMiss.REFUSE))
    assert node.where == {1: 0}
    assert 1 not in node.ended


def test_a_longer_class_name_or_weight_changes_no_due_time() -> None:
    orders = []
    for weight in (1.0, 5.0):
        node = Known()
        for number in range(1, 9):
            node.arrive(number, prompt=400, slo=urgent(1.0 + number, weight=weight))
        orders.append(dict(node.where))
    assert orders[0] == orders[1]


@settings(max_examples=60, deadline=None)
@given(
    work=st.lists(st.tuples(st.integers(10, 3000), st.floats(0.05, 3.0)), min_size=1, max_size=25)
)
def test_what_was_not_demoted_is_in_time_when_nothing_more_comes(
    work: list[tuple[int, float]],
) -> None:
    """One worker that takes as long as predicted, its prompts in the order of their due times. One
    that is short may share its last step with others, and so be late by less than a step."""
    node = Known()
    due: dict[int, float] = {}
    left: dict[int, int] = {}
    demoted: set[int] = set()

    def hear(outputs: Sequence[Output]) -> None:
        for output in outputs:
            if isinstance(output, Assign):
                left[output.request.id] = output.request.prompt_tokens
            if isinstance(output, Degrade):
                demoted.add(output.request_id)

    for number, (prompt, ttft) in enumerate(work, 1):
        due[number] = node.now + ttft
        wanted = request(number, arrived=node.now, prompt=prompt, slo=urgent(ttft))
        hear(node.hear(Arrived(request=wanted), after=0.0))
    while node.core.num_live:
        if not left:
            hear(node.wake())
            continue
        budget, done = 512, []
        for number in sorted(left, key=lambda each: (each in demoted, due[each])):
            part = min(budget, left[number])
            budget -= part
            left[number] -= part
            if not left[number]:
                done.append(number)
        for number in done:
            del left[number]
        backlog, prefill = sum(left.values()), 512 - budget
        hear(node.exact_step(0, done, finished=done, prefill=prefill, backlog=backlog))
        for number in done:
            assert node.now <= due[number] + STEP or number in demoted


# --- where answers are decoded ------------------------------------------------------------------


@pytest.mark.parametrize(("placement", "chosen"), [("least", 2), ("fullest", 1)])
def test_a_decode_is_placed_with_the_newcomer_counted(placement: str, chosen: int) -> None:
    node = Known(3, placement="least")
    node.link_all()
    slo = urgent(60.0, tpot=0.05)
    node.arrive(1, prompt=10, slo=slo)
    source = node.where[1]
    for number in range(2, 40):
        node.arrive(number, prompt=10, slo=slo)
        node.step(node.where[number], [number])
    for number in node.at(2)[3:]:
        node.step(2, [number], finished=[number])
    node.step(source, [1])
    view = node.core.view
    assert source == 0
    assert view.workers[WorkerId(1)].decodes > view.workers[WorkerId(2)].decodes + 2
    place = make_policy("hyperflexis", {"placement": placement}).dispatch.place
    running = {each.request.id: each.request for each in view.running(WorkerId(source))}
    assert place(view, running[1], Phase.DECODE, node.now) == chosen


# --- whole runs -----------------------------------------------------------------------------------


def run(policy: str, items: Sequence[Item], num_workers: int = 1) -> SimulationResult:
    machine = parse_machine(f"h200:{num_workers}")
    return simulate(items, parse_choice(policy), machine, dispatcher=WIDE)


def five(rate: float, seconds: float, *, arrivals: str = "poisson", seed: int = 1) -> list[Item]:
    return generate(
        load_spec("five"),
        rate=rate,
        seconds=seconds,
        seed=seed,
        arrivals=parse_arrivals(arrivals),
    )


def share(outcomes: Sequence[Outcome], class_name: str = "") -> float:
    chosen = [each for each in outcomes if class_name in ("", each.class_name)]
    return sum(map(attained, chosen)) / len(chosen)


def test_overload_makes_earliest_deadline_first_collapse_and_not_this() -> None:
    """The domino effect: what is late delays what is not yet."""
    items = five(30.0, 12.0)  # about 1.7 times what one card can do
    ours, edf = run("hyperflexis", items).outcomes, run("edf", items).outcomes
    assert share(edf) < 0.45
    assert share(ours) > 0.7
    worst = min(share(ours, name) for name in {item.class_name for item in items})
    assert worst > 0.4


def test_nobody_starves_in_overload() -> None:
    items = five(35.0, 15.0)
    result = run("hyperflexis", items)
    assert result.extras.demotions > 20
    assert all(each.finished for each in result.outcomes)
    assert share(result.outcomes, "batch") == 1.0


def test_what_is_late_gets_its_share_while_overload_lasts() -> None:
    """Some of what was demoted is answered before the load ends."""
    items = five(35.0, 30.0)
    result = run("hyperflexis{lane_after=5}", items)
    late = [
        each
        for each in result.outcomes
        if each.first is not None
        and each.slo.ttft is not None
        and each.first - each.at > 3 * each.slo.ttft
    ]
    assert any(each.first is not None and each.first < 30.0 for each in late)


def test_without_budgets_tokens_are_late() -> None:
    items = five(18.0, 15.0)
    with_budgets, without = (
        run(name, items).outcomes for name in ("hyperflexis", "hyperflexis{budget=false}")
    )
    assert share(with_budgets, "code") > share(without, "code") + 0.1


def test_without_priorities_the_tight_classes_wait_behind_the_loose_ones() -> None:
    items = five(25.0, 15.0)
    with_order, without = (
        run(name, items).outcomes for name in ("hyperflexis", "hyperflexis{priority=false}")
    )
    assert share(with_order, "code") > share(without, "code") + 0.2


@pytest.mark.parametrize("setting", ["late=keep", "priority=false", "budget=false"])
def test_nobody_starves_whatever_is_switched_off(setting: str) -> None:
    outcomes = run(f"hyperflexis{{{setting}}}", five(35.0, 8.0)).outcomes
    assert all(each.finished for each in outcomes)


@pytest.mark.parametrize("setting", ["order=slack", "order=density", "overload=none", "late=keep"])
def test_each_choice_serves_everybody(setting: str) -> None:
    items = five(25.0, 6.0)
    assert all(each.finished for each in run(f"hyperflexis{{{setting}}}", items, 2).outcomes)


def test_equal_runs_are_equal() -> None:
    items = five(25.0, 5.0, arrivals="gamma:4")
    assert run("hyperflexis", items).outcomes == run("hyperflexis", items).outcomes


def test_laws_hold_in_a_validated_run() -> None:
    items = [replace(item, output_tokens=min(item.output_tokens, 60)) for item in five(20.0, 2.0)]
    machine = parse_machine("h200:2", max_num_seqs=8, num_blocks=1500)
    result = simulate(items, parse_choice("hyperflexis"), machine, validate=True)
    assert all(each.finished for each in result.outcomes)
