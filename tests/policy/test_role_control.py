"""The controller of roles: what it predicts, and that it does not oscillate (R11)."""

import random
from collections.abc import Callable
from itertools import pairwise

import msgspec
import pytest

from appliance.core.asks import Decided
from appliance.core.types import Role, Slo, WorkerId
from appliance.core.view import Targets
from appliance.policy import PolicySettingsError, make_policy
from appliance.policy.demand import Division, Load, pressure
from appliance.policy.role_settings import RoleSettings
from tests.policy.virtual_node import Mix, VirtualNode

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
SLO = Slo(ttft=1.5, tpot=0.05)
STARTS = {"mixed": [M] * 4, "even": [P, P, D, D], "one for prompts": [P, D, D, D]}
DEFAULT = RoleSettings()


def load(
    *,
    prefill: float,
    decode: float,
    tpot: float | None = None,
    answer: float = 1e15,
    chunk: int = 512,
) -> Load:
    """Workers kept busy by prompts and by answers: 0.0002 s a prompt token, 0.02 s a step of at
    most 100 sequences."""
    full = 512 * 0.0002 + 0.02
    return Load(
        prompt_rate=prefill * 512 / full,
        token_rate=decode * 100 / 0.02,
        prompt_tokens=512.0,
        context_tokens=0.0,
        answer_tokens=answer,
        planes=((0.02, 0.0002, 0.0, 0.0, 0.0),) * 2,
        max_batch_tokens=512,
        max_num_seqs=100,
        chunk=chunk,
        targets=Targets(tpot=tpot),
    )


def split(prefill: int, decode: int, mixed: int = 0) -> Division:
    return Division(prefill=prefill, decode=decode, mixed=mixed)


def test_the_fullest_phase_is_the_pressure() -> None:
    assert load(prefill=1.0, decode=1.6).prefill == pytest.approx(1.0)
    assert load(prefill=1.0, decode=1.6).decode == pytest.approx(1.6)
    assert pressure(split(2, 2), load(prefill=1.0, decode=1.6)).worst == pytest.approx(0.8)
    assert pressure(split(1, 3), load(prefill=1.0, decode=1.6)).worst == pytest.approx(1.0)


def test_a_mixed_worker_shares_what_every_step_costs_between_both_phases() -> None:
    work = load(prefill=1.0, decode=1.6)
    mixed = pressure(split(0, 0, 4), work).worst
    assert 1.0 / 4 < mixed < (1.0 + 1.6) / 4, "its steps have one overhead for both"
    assert mixed <= pressure(split(1, 2, 1), work).worst < pressure(split(1, 3), work).worst


def test_what_a_worker_can_decode_is_bounded_by_the_tightest_time_per_token() -> None:
    bounds = [load(prefill=0.0, decode=1.0, tpot=tpot).full_batch for tpot in (None, 0.05)]
    assert bounds == [100.0, 100.0], "here a step takes as long whatever its batch"
    grows = msgspec.structs.replace(
        load(prefill=0.0, decode=1.0, tpot=0.03), planes=((0.02, 0.0, 0.0, 0.0002, 0.0),) * 2
    )
    assert grows.full_batch == pytest.approx(50.0)
    assert grows.decode == pytest.approx(5000.0 * 0.03 / 50)


def test_a_phase_without_workers_is_served_by_the_others_as_if_mixed() -> None:
    work = load(prefill=0.5, decode=1.0)
    assert pressure(split(0, 3), work) == pressure(split(0, 0, 3), work)
    assert pressure(split(3, 0), work) == pressure(split(0, 0, 3), work)


def test_prompts_beside_decodes_lengthen_the_steps_of_mixed_workers_only() -> None:
    work = load(prefill=2.4, decode=0.2, tpot=0.05)
    assert pressure(split(0, 0, 4), work).per_token > 0.8
    assert pressure(split(3, 1), work).worst == pytest.approx(0.8)
    assert pressure(split(3, 1), work).per_token == pytest.approx(0.4)


def test_where_the_policy_fits_prompts_into_the_slack_mixed_workers_do_as_well() -> None:
    bursts = load(prefill=2.0, decode=0.4, tpot=0.05, answer=8.0)
    fitted = load(prefill=2.0, decode=0.4, tpot=0.05, answer=8.0, chunk=0)
    assert pressure(split(0, 0, 4), bursts).per_token > 1.0
    assert pressure(split(0, 0, 4), fitted).per_token < 1.0
    assert pressure(split(3, 1), bursts).worst == pressure(split(3, 1), fitted).worst


def test_short_answers_are_judged_by_a_tail_and_not_by_the_mean() -> None:
    lengths = (1e15, 400.0, 40.0, 8.0)
    gaps = [
        pressure(split(0, 0, 4), load(prefill=1.6, decode=0.2, tpot=0.05, answer=length)).per_token
        for length in lengths
    ]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 1.4 * gaps[0]
    assert gaps[-1] <= (0.02 + 512 * 0.0002) / 0.05


def test_a_load_that_nothing_can_bear_is_a_number_and_no_loop() -> None:
    assert pressure(split(0, 0, 1), load(prefill=1e6, decode=1e6, tpot=0.001)).worst >= 50.0
    assert pressure(split(0, 0, 0), load(prefill=1.0, decode=1.0)).worst == 0.0
    assert pressure(split(0, 0, 2), load(prefill=0.0, decode=0.0)).worst == 0.0


def test_R20_a_setting_it_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(PolicySettingsError, match=r"no setting 'hgih'.*'high'"):
        make_policy("fcfs", {}, roles={"hgih": 1})
    assert make_policy("fcfs", {}).dispatch.roles is None
    assert make_policy("fcfs", {}, roles={}).dispatch.roles is not None


def square(now: float) -> Mix:
    return Mix(6, 1600, 8) if now // 25 % 2 == 0 else Mix(6, 60, 400)


def ramp(now: float) -> Mix:
    return Mix(1 + 11 * min(now, 100.0) / 120, 1000, 150)


def noise(now: float) -> Mix:
    rng = random.Random(int(now))
    prompt, answer = rng.choice([100, 700, 1500]), rng.choice([20, 150, 200])
    return Mix(7 * rng.uniform(0.5, 1.5), prompt, answer)


def run(
    roles: list[Role], mix: Callable[[float], Mix], *, seconds: float, seed: int
) -> tuple[VirtualNode, VirtualNode]:
    """The same arrivals with the controller and without flips."""
    nodes = []
    for controller in ({}, None):
        node = VirtualNode(roles, controller=controller, slo=SLO)
        node.serve(mix, seconds=seconds, seed=seed)
        assert len(node.ended) + node.num_turned_away == len(node.lengths)
        nodes.append(node)
    return nodes[0], nodes[1]


def check_bounds(node: VirtualNode, seconds: float) -> None:
    """R11: dwell and cool-down are kept, and with them the number of flips is bounded."""
    flips = [output for output in node.said if isinstance(output, Decided)]
    changes = sorted({each.at for each in flips if each.kind == "flip"})
    for one, two in pairwise(changes):
        assert two - one >= DEFAULT.cooldown - 1e-6
    for worker in node.workers:
        times = [at for at, id_, _ in node.flips if id_ == worker]
        for one, two in pairwise(times):
            assert two - one >= DEFAULT.dwell - 1e-6
    assert len(node.flips) <= len(node.workers) * (1 + seconds / DEFAULT.dwell)


@pytest.mark.parametrize("start", STARTS)
def test_R11_a_square_wave_is_followed_and_pays(start: str) -> None:
    seconds = 100.0
    with_it, never = run(STARTS[start], square, seconds=seconds, seed=1)
    assert with_it.flips
    check_bounds(with_it, seconds + 30)
    assert with_it.attainment >= never.attainment, (with_it.attainment, never.attainment)


@pytest.mark.parametrize("mix", [ramp, noise])
@pytest.mark.parametrize("start", ["mixed", "even"])
def test_R11_a_ramp_and_noise_are_answered_calmly(start: str, mix: Callable[[float], Mix]) -> None:
    seconds = 100.0
    with_it, never = run(STARTS[start], mix, seconds=seconds, seed=2)
    check_bounds(with_it, seconds + 30)
    if mix is noise:
        assert len({at for at, _, _ in with_it.flips}) <= seconds / DEFAULT.dwell
    assert with_it.attainment >= never.attainment, (with_it.attainment, never.attainment)


def test_R11_flips_are_rarer_than_the_noise_whatever_its_size() -> None:
    """Around the threshold itself nothing swings either."""
    for rate in (3, 5, 8, 10):
        node = VirtualNode([M] * 4, controller={}, slo=SLO)

        def mix(now: float, rate: int = rate) -> Mix:
            rng = random.Random(int(now * 2))
            return Mix(rate * rng.uniform(0.7, 1.3), rng.choice([200, 1600]), 60)

        node.serve(mix, seconds=60.0, seed=rate)
        check_bounds(node, 90.0)


def test_every_decision_is_on_record_and_a_no_only_when_its_reason_changes() -> None:
    node = VirtualNode(STARTS["even"], controller={}, slo=SLO, validate=True)
    node.serve(square, seconds=40.0, seed=3)
    decided = [output for output in node.said if isinstance(output, Decided)]
    flips = [each for each in decided if each.kind == "flip"]
    assert flips
    for each in flips:
        assert each.by == "controller"
        assert {"pressure", "pressure_after", "prefill_load", "decode_load"} <= set(each.prediction)
        assert each.cost > 0
        assert "bottleneck" in each.trigger or "mixed workers do" in each.trigger
    ended = {each.decision: each.outcome for each in flips}
    assert all(outcome.startswith("done") for outcome in ended.values()), ended
    noes = [each for each in decided if each.kind == "none"]
    assert noes
    assert all(one.trigger != two.trigger for one, two in pairwise(noes))


def test_with_low_load_the_node_goes_back_to_mixed_and_then_sleeps() -> None:
    node = VirtualNode(STARTS["even"], controller={"hold": 2.0, "dwell": 1.0}, slo=SLO)
    node.serve(lambda now: Mix(0.5, 50, 5), seconds=30.0)
    roles = {view.role for view in node.core.view.workers.values()}
    assert roles == {M}
    assert len(node.flips) == 4
    assert node.core.next_wakeup() is None or node.core.next_wakeup() > node.now


def test_without_mixed_one_worker_of_each_role_stays() -> None:
    node = VirtualNode(STARTS["even"], controller={"mixed": False, "dwell": 1.0}, slo=SLO)
    node.serve(square, seconds=60.0, seed=4)
    assert node.flips
    state = {WorkerId(0): P, WorkerId(1): P, WorkerId(2): D, WorkerId(3): D}
    for at in sorted({at for at, _, _ in node.flips}):
        state |= {worker: role for when, worker, role in node.flips if when == at}
        assert set(state.values()) == {P, D}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mix", [square, ramp, noise])
def test_R11_at_length(mix: Callable[[float], Mix]) -> None:
    sums = [0.0, 0.0]
    for seed in range(6):
        for roles in STARTS.values():
            pair = run(roles, mix, seconds=300.0, seed=seed)
            check_bounds(pair[0], 330.0)
            sums = [total + node.attainment for total, node in zip(sums, pair, strict=True)]
    assert sums[0] >= sums[1], sums
