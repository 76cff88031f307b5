"""Who is in service: woken and added under load, parked when calm, bounded in any case (R11)."""

import random
from itertools import pairwise

import pytest

from appliance.core.asks import ParkAsked
from appliance.core.lifecycle import WorkerState
from appliance.core.messages import WorkerDown
from appliance.core.types import Role, Slo, WorkerId
from appliance.policy.demand import Division, Load, pressure
from appliance.policy.role_settings import RoleSettings
from appliance.policy.scaler import Scaler, Signals
from tests.policy.virtual_node import START, Mix, VirtualNode

M = Role.MIXED
SLO = Slo(ttft=1.5, tpot=0.08)
DEFAULT = RoleSettings()
CALM, BUSY = Mix(0.5, 300, 30), Mix(7.0, 800, 60)


def node(standby: int = 0, spares: int = 0, **settings: object) -> VirtualNode:
    return VirtualNode(
        [M, M], controller=settings, slo=SLO, standby=standby, spares=spares, validate=True
    )


def check_actions(each: VirtualNode) -> None:
    """All are on record with what was predicted, what they cost and how they ended."""
    for kind in ("wake", "park", "add"):
        for decided in each.decided(kind):
            assert decided.by == "controller"
            assert {"pressure", "pressure_after", "workers_after"} <= set(decided.prediction)
            assert decided.cost > 0
            assert decided.outcome
            assert decided.trigger


def test_a_standby_worker_is_woken_under_load_and_parked_when_it_is_calm() -> None:
    each = node(standby=1)
    assert each.in_service() == [0, 1]
    each.serve(lambda now: BUSY, seconds=20.0)
    (wake,) = each.decided("wake")
    assert wake.workers == (2,)
    assert wake.outcome == "done"
    assert "bottleneck" in wake.trigger or "start in time" in wake.trigger
    assert wake.at - each.began < 10.0
    assert each.workers[WorkerId(2)].steps > 50
    calm_from = each.now
    each.serve(lambda now: CALM, seconds=60.0)
    (park,) = each.decided("park")
    assert park.outcome == "done"
    assert DEFAULT.in_hold <= park.at - calm_from <= DEFAULT.in_hold + 10.0
    assert len(each.in_service()) == 2
    check_actions(each)
    assert len(each.ended) + each.num_turned_away == len(each.lengths), "each ends once"


def test_waking_pays_and_costs_less_than_to_serve_with_all_all_the_time() -> None:
    def mix(now: float) -> Mix:
        return BUSY if 20.0 <= now < 60.0 else CALM

    with_it, without = node(standby=2), node(standby=2, scale="off")
    for each in (with_it, without):
        each.serve(mix, seconds=140.0, seed=3)
    assert without.decided("wake") == []
    assert with_it.attainment > without.attainment
    seconds = with_it.now - with_it.began
    cost = with_it.core.instance_seconds(with_it.now)
    assert 2 * seconds < cost < 3.5 * seconds
    assert without.core.instance_seconds(without.now) == pytest.approx(
        2 * (without.now - without.began)
    )


def test_flips_come_first_then_who_stands_by_and_only_then_new_workers() -> None:
    each = node(standby=1, spares=1)
    each.serve(lambda now: Mix(11.0, 900, 80), seconds=40.0)
    (wake,), (add,) = each.decided("wake"), each.decided("add")
    assert wake.at < add.at
    assert add.workers == (3,)
    assert add.outcome == "done"
    assert each.in_service() == [0, 1, 2, 3]
    assert each.core.view.num_spares == 0
    assert each.workers[WorkerId(3)].steps > 0
    check_actions(each)


def test_a_worker_that_is_being_started_is_paid_for_and_not_asked_for_twice() -> None:
    each = node(spares=3)
    each.serve(lambda now: Mix(7.0, 900, 60), seconds=12.0)
    adds = each.decided("add")
    began = adds[0].at
    assert all(add.at == began or add.at >= began + START for add in adds)
    assert each.core.instance_seconds(each.now) > 2 * (each.now - each.began)


def test_never_more_than_allowed_nor_fewer() -> None:
    each = node(standby=3, max_workers=3)
    each.serve(lambda now: Mix(14.0, 900, 80), seconds=30.0)
    assert len(each.in_service()) == 3
    each = node(scale="on", min_workers=1)
    each.serve(lambda now: CALM, seconds=60.0)
    assert len(each.in_service()) == 1
    each.rest(200.0)
    assert len(each.in_service()) == 1
    each = node()
    each.serve(lambda now: CALM, seconds=60.0)
    assert each.in_service() == [0, 1], "without standby workers nobody is parked"


def test_who_was_parked_by_an_operator_is_not_woken_by_the_controller() -> None:
    each = node(standby=1)
    each.hear(ParkAsked(ask=1, worker=WorkerId(2)))
    each.serve(lambda now: BUSY, seconds=20.0)
    assert each.core.view.workers[WorkerId(2)].state is WorkerState.PARKED
    assert each.decided("wake") == []


def test_when_calm_and_nobody_is_left_to_park_the_node_sleeps() -> None:
    each = node(standby=1)
    each.serve(lambda now: BUSY, seconds=15.0)
    each.rest(200.0)
    assert each.in_service() == [0, 1] or len(each.in_service()) == 2
    wakeup = each.core.next_wakeup()
    assert wakeup is None or wakeup > each.now


def test_budgets_that_no_number_of_workers_can_meet_wake_nobody() -> None:
    each = VirtualNode(
        [M, M], controller={}, slo=Slo(ttft=0.001, tpot=0.001), standby=2, validate=True
    )
    each.serve(lambda now: Mix(1.0, 100, 20), seconds=30.0)
    assert each.attainment == 0.0
    assert each.decided("wake") == []


@pytest.mark.parametrize("seed", [1, 2])
def test_R11_waves_and_noise_never_make_it_swing(seed: int) -> None:
    """Actions of one kind keep their cool-down, and what was woken serves for a while."""

    def mix(now: float) -> Mix:
        rng = random.Random(int(now) + 1000 * seed)
        return Mix(5.0 * rng.uniform(0.2, 1.8), rng.choice([200, 900]), rng.choice([20, 90]))

    each = node(standby=2)
    each.serve(mix, seconds=150.0, seed=seed)
    for kind, cooldown in (("wake", DEFAULT.wake_cooldown), ("park", DEFAULT.park_cooldown)):
        times = sorted({decided.at for decided in each.decided(kind)})
        assert all(two - one >= cooldown - 1e-6 for one, two in pairwise(times)), (kind, times)
    parks = [decided.at for decided in each.decided("park")]
    for wake in each.decided("wake"):
        assert all(not wake.at < at < wake.at + DEFAULT.in_hold for at in parks)
    assert len(parks) <= 1 + (each.now - each.began) / DEFAULT.in_hold
    check_actions(each)


def test_while_no_worker_is_ready_those_on_standby_are_woken() -> None:
    """A start takes many seconds, waking a parked worker some milliseconds."""
    each = VirtualNode([M], controller={}, slo=SLO, standby=1, validate=True)
    each.serve(lambda now: CALM, seconds=10.0)
    assert each.decided("wake") == []
    only = WorkerId(0)
    each.hear(WorkerDown(worker=only, epoch=each.core.epoch(only), cause="killed by signal 9"))
    each.serve(lambda now: CALM, seconds=15.0)
    (wake,) = each.decided("wake")
    assert wake.workers == (1,)
    assert wake.trigger == "no worker is ready"


def test_a_flip_spends_no_cool_down_of_actions_that_were_not_taken() -> None:
    each = node(standby=1)
    each.serve(lambda now: CALM, seconds=5.0)
    scaler = Scaler(DEFAULT)
    view = each.core.view
    plane = (0.004, 1e-4, 0.0, 1e-4, 0.0)
    load = Load(
        prompt_rate=50_000.0,
        token_rate=100.0,
        prompt_tokens=500.0,
        context_tokens=600.0,
        answer_tokens=100.0,
        planes=(plane, plane),
        max_batch_tokens=512,
        max_num_seqs=64,
    )
    signals = Signals(met=0, missed=0, overdue=0, arrived=0)
    present = pressure(Division(prefill=0, decode=0, mixed=2), load)
    assert present.worst > DEFAULT.high
    for tick in range(5):
        said = scaler.step(view, load, signals, present=present, flip_to=2.0, now=float(tick))
        assert said is None
    taken = scaler.step(view, load, signals, present=present, flip_to=None, now=5.0)
    assert taken is not None
    assert taken.wake == (2,)
