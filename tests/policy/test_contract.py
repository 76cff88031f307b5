"""What every policy must keep, whatever it is for: each one goes through the same laws.

A new policy is in this suite by being in `POLICIES`.
"""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.core.slots import Accept, Policy, Refuse
from appliance.core.types import CacheGroupSpec, Phase, Request, RequestId, WorkerId
from appliance.policy import POLICIES, PolicySettingsError, make_policy
from tests.core.node_kit import Node, request
from tests.core.node_world import World
from tests.core.test_dispatched_properties import storm
from tests.core.test_node_properties import check, tasks
from tests.core.whole_node import Setting
from tests.policy.dressed import SLOS, dress, serve, traffic

NAMES = sorted(POLICIES)
READS_MAX_TOKENS = {
    "fcfs-peak-kv": "it reserves memory for the longest answer: that is what it is",
}
"""Policies whose decisions may depend on `max_tokens`, and why; also srf with lengths =
"max_tokens", which is not its default."""


@pytest.fixture(params=NAMES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return make_policy(request.param, {})


def test_it_knows_its_name(policy: Policy) -> None:
    assert policy.name in POLICIES
    assert make_policy(policy.name, {}).name == policy.name


@pytest.mark.parametrize("name", NAMES)
def test_R20_an_unknown_setting_is_refused_by_name(name: str) -> None:
    with pytest.raises(PolicySettingsError, match="no setting 'sttings_of_nobody'"):
        make_policy(name, {"sttings_of_nobody": 1})


def busy(policy: Policy) -> Node:
    """Three workers, one of them dead, one nearly full, and a queue."""
    node = Node(3, max_num_seqs=2, policy=policy.dispatch)
    node.down(2)
    for number in range(1, 12):
        node.arrive(number, prompt=number * 7)
    return node


def test_admission_answers_with_accept_or_a_reason(policy: Policy) -> None:
    node = busy(policy)
    answer = policy.dispatch.admit(node.core.view, request(50), node.now)
    assert isinstance(answer, Accept | Refuse)
    assert isinstance(answer, Accept) or answer.reason


def test_order_invents_and_repeats_nobody(policy: Policy) -> None:
    node = busy(policy)
    for number in range(60, 80):
        node.arrive(number, prompt=number, slo=SLOS[number % len(SLOS)])
    waiting: dict[int, Request] = {}
    for each, came in node.core.view.queue_changes(0).changes:
        if came:
            waiting[each.id] = each
        else:
            del waiting[each.id]
    queue = list(waiting.values())
    assert len(queue) > 20
    before = list(queue)
    ordered = list(policy.dispatch.order(queue, node.core.view, node.now))
    assert queue == before, "the queue is not the policy's to change"
    ids = [each.id for each in ordered]
    assert len(set(ids)) == len(ids)
    assert set(ids) <= {each.id for each in queue}


def test_place_names_a_willing_worker_or_none(policy: Policy) -> None:
    node = Node(3, max_num_seqs=2, policy=policy.dispatch)
    node.down(1)
    for number in range(1, 9):
        new = request(number, arrived=node.now)
        strange = policy.dispatch.place(node.core.view, new, Phase.PREFILL, node.now)
        assert strange is None, "a request that does not wait has no willing worker"
        node.arrive(number)
    assert set(node.where.values()) <= {0, 2}


def test_law_9_a_decision_depends_on_what_it_may_see_alone(policy: Policy) -> None:
    """Two fresh copies that hear the same say the same, and asking twice changes nothing."""
    said = []
    for asks in (1, 3):
        node = busy(make_policy(policy.name, {}))
        for _ in range(asks):
            policy.dispatch.order([], node.core.view, node.now)
            policy.dispatch.wakeup(node.core.view, node.now)
        while node.core.num_live:
            for worker in (0, 1):
                if here := node.at(worker):
                    node.step(worker, here[:2], finished=here[:1])
        said.append(node.said)
    assert said[0] == said[1]


def test_a_wakeup_is_a_time_to_come(policy: Policy) -> None:
    node = busy(policy)
    wakeup = policy.dispatch.wakeup(node.core.view, node.now)
    assert wakeup is None or wakeup > node.now


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_R1_the_laws_of_the_node_hold_under_deaths(name: str, data: st.DataObject) -> None:
    world = World(data.draw(st.integers(1, 4)), policy=make_policy(name, {}).dispatch)
    actions = st.tuples(st.sampled_from("aaauuossddk"), st.integers(0, 3), st.integers(1, 9))
    for what, number, amount in data.draw(st.lists(actions, min_size=20, max_size=80)):
        worker = WorkerId(number % len(world.wire))
        match what:
            case "a":
                world.arrive(prompt=amount * 5, length=amount, poison=amount == 9)
            case "u":
                world.come_up(worker)
            case "o":
                world.obey(worker, refuse=amount == 1)
            case "s":
                world.obey(worker)
                world.step(worker)
            case "d":
                world.deliver(worker, count=amount)
            case _:
                world.die(worker)
    world.settle()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_R12_answers_do_not_depend_on_the_policy(name: str, data: st.DataObject) -> None:
    setting = Setting(
        policy=make_policy(name, {}),
        groups=(CacheGroupSpec(num_blocks=data.draw(st.integers(14, 30)), block_tokens=2),),
        num_workers=data.draw(st.integers(1, 2)),
        depth=data.draw(st.integers(0, 2)),
    )
    kills = data.draw(st.lists(st.tuples(st.integers(0, 1), st.floats(0.03, 0.3)), max_size=2))
    check(setting, data.draw(tasks()), kills=kills, cancels=[])


def maker(name: str) -> Callable[[], Policy]:
    """Makes fresh copies of that policy."""
    return lambda: make_policy(name, {})


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rng=st.randoms(use_true_random=False),
    acts=st.integers(1, 500),
    deaths=st.sampled_from([0.0, 0.02, 0.1]),
)
def test_R1_R9_R12_R28_all_laws_hold_under_moves_flips_deaths_and_aborts(
    name: str, rng: random.Random, acts: int, deaths: float
) -> None:
    """Also law 8 (no willing worker idles beside a waiting request) and law 12 (a fresh copy that
    hears the same says the same)."""
    storm(rng, acts=acts, deaths=deaths, make=maker(name), dress=dress)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_R1_R9_R12_R28_all_laws_hold_at_length(name: str) -> None:
    for seed in range(300):
        rng = random.Random(seed)
        deaths = rng.choice([0.0, 0.0, 0.02, 0.1])
        storm(rng, acts=rng.choice([100, 600]), deaths=deaths, make=maker(name), dress=dress)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_R5_with_budgets_of_all_kinds_every_request_ends_with_its_answer(
    name: str, data: st.DataObject
) -> None:
    """Little memory, kills and cancellations; every decision is in the journal and replays."""
    setting = Setting(
        policy=make_policy(name, {}),
        groups=(CacheGroupSpec(num_blocks=data.draw(st.integers(14, 24)), block_tokens=2),),
        num_workers=data.draw(st.integers(1, 3)),
        depth=data.draw(st.integers(0, 2)),
        max_num_seqs=data.draw(st.integers(1, 4)),
        max_batch_tokens=data.draw(st.integers(4, 20)),
    )
    moments = st.floats(0.03, 0.3)
    kills = data.draw(st.lists(st.tuples(st.integers(0, 2), moments), max_size=2))
    cancels = data.draw(st.lists(st.tuples(st.integers(1, 20), moments), max_size=3))
    work = [dress(task) for task in data.draw(tasks())]
    check(setting, work, kills=kills, cancels=cancels)


def setting_for(name: str, *, num_blocks: int = 64) -> Setting:
    """Two workers of four sequences."""
    groups = (CacheGroupSpec(num_blocks=num_blocks, block_tokens=4),)
    return Setting(policy=make_policy(name, {}), groups=groups)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(2))
def test_nobody_starves_below_saturation(name: str, seed: int) -> None:
    """At two thirds of what the node can do, the least urgent of 200 is done within two seconds: a
    request alone takes a tenth of one."""
    work = traffic(seed, num_tasks=200, rate=75.0)
    node = serve(setting_for(name), work)
    took = {task.slo.class_name: 0.0 for task in work}
    for task in work:
        seconds = node.done[RequestId(task.id)] - task.arrived
        took[task.slo.class_name] = max(took[task.slo.class_name], seconds)
    assert max(took.values()) < 2.0, took


@pytest.mark.parametrize("name", NAMES)
def test_every_request_is_done_soon_after_an_overload_ends(name: str) -> None:
    """Twice what the node can do: the backlog takes about as long as its work. (A step lasts the
    same here whatever it computes, so whoever bounds it by budgets pays without a return.)"""
    work = traffic(5, num_tasks=200, rate=230.0)
    node = serve(setting_for(name), work)
    assert max(node.done.values()) < 2.0 * 200 / 115


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(READS_MAX_TOKENS)))
def test_law_9_max_tokens_is_not_a_length(name: str) -> None:
    """Answers that end by themselves: whatever the clients allow, every decision is the same."""
    work = traffic(1, num_tasks=100, rate=150.0)
    logs = []
    for max_tokens in (34, 40):
        given = [replace(task, max_tokens=max_tokens) for task in work]
        logs.append(serve(setting_for(name, num_blocks=16), given).log)
    assert logs[0] == logs[1]


@pytest.mark.parametrize("name", sorted(READS_MAX_TOKENS))
def test_who_reads_max_tokens_says_so(name: str) -> None:
    work = traffic(1, num_tasks=100, rate=150.0)
    logs = []
    for max_tokens in (34, 40):
        given = [replace(task, max_tokens=max_tokens) for task in work]
        logs.append(serve(setting_for(name, num_blocks=24), given).log)
    assert logs[0] != logs[1]


@pytest.mark.parametrize("name", NAMES)
def test_priorities_matter_to_those_who_say_so_alone(name: str) -> None:
    work = traffic(2, num_tasks=120, rate=90.0)
    plain = [replace(task, priority=0) for task in work]
    same = serve(setting_for(name), work).log == serve(setting_for(name), plain).log
    assert same is not make_policy(name, {}).uses_priority
