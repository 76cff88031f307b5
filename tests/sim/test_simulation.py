"""Promises of a simulated run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from appliance.core.asks import ParkAsked, RolesAsked, WakeAsked
from appliance.core.dispatcher import Dispatcher
from appliance.core.messages import Arrived, Assign, Cancelled, Input
from appliance.core.profiles import PROFILES
from appliance.core.types import RequestId, Role, WorkerId
from appliance.policy import POLICIES
from appliance.policy.choice import parse_choice
from appliance.sim.machine import UnknownMachine, parse_machine
from appliance.sim.node import Kill, Tape
from appliance.sim.simulation import Ablation, dispatcher_config, simulate
from tests.sim.sim_kit import MAX_LEN, one_item, run, sharing, small_machine, some_items

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_item_ends_once_and_the_laws_hold_under_every_policy(name: str) -> None:
    items = sharing(some_items())
    for roles in ("mixed", "1P2D"):
        result = run(f"{name}@{roles}", items, small_machine())
        assert [each.index for each in result.outcomes] == [each.index for each in items]
        for outcome, item in zip(result.outcomes, items, strict=True):
            assert outcome.finished, outcome
            assert outcome.num_tokens == min(item.output_tokens, item.max_tokens)
            assert outcome.first is not None
            assert outcome.last is not None
            assert item.at < outcome.first <= outcome.last


def test_hand_offs_move_and_workers_are_woken_when_they_are_needed() -> None:
    handed = run("fcfs@1P2D", some_items(90), small_machine())
    assert handed.extras.moves > 20
    assert any(len(each.workers) > 1 for each in handed.outcomes)
    auto = run("fcfs@auto", some_items(200, rate=200), small_machine(3, num_standby=1))
    assert all(each.finished for each in auto.outcomes)


@pytest.mark.parametrize("policy", ["fcfs", "hyperflexis"])
def test_answers_survive_flips_parks_and_cancels(policy: str) -> None:
    items = sharing(some_items(120, rate=120))
    prefill, decode = Role.PREFILL, Role.DECODE
    there = ((WorkerId(0), decode), (WorkerId(1), prefill))
    back = ((WorkerId(0), prefill), (WorkerId(1), decode))
    script: list[tuple[float, Input]] = [
        (0.15 * turn, RolesAsked(ask=turn, roles=there if turn % 2 else back))
        for turn in range(1, 9)
    ]
    script += [
        (0.2, ParkAsked(ask=91, worker=WorkerId(2))),
        (0.9, WakeAsked(ask=92, worker=WorkerId(2))),
        (0.3, Cancelled(request_id=RequestId(5))),
        (0.5, Cancelled(request_id=RequestId(55))),
    ]
    kills = [Kill(at=0.62, worker=WorkerId(1))]
    result = run(f"{policy}@1P3D", items, small_machine(4), script=script, kills=kills)
    assert result.extras.flips >= 6
    assert result.extras.moves > 20
    assert [each.index for each in result.outcomes] == [each.index for each in items]
    whole = [
        each.num_tokens == min(item.output_tokens, item.max_tokens) and each.finished
        for each, item in zip(result.outcomes, items, strict=True)
    ]
    assert len(items) - sum(whole) <= 2
    assert {each.error for each in result.outcomes} <= {"", "cancelled"}


def test_answers_survive_killed_workers() -> None:
    items = sharing(some_items(80))
    kills = [Kill(at=0.2, worker=WorkerId(0)), Kill(at=0.5, worker=WorkerId(1))]
    for policy in ("fcfs", "fcfs@1P2D"):
        result = run(policy, items, small_machine(), kills=kills)
        assert all(each.finished for each in result.outcomes)
        assert [each.num_tokens for each in result.outcomes] == [
            min(item.output_tokens, item.max_tokens) for item in items
        ]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_answers_are_as_long_at_every_depth(depth: int) -> None:
    items = some_items()
    result = run("fcfs@1P2D", items, small_machine(depth=depth))
    assert [each.num_tokens for each in result.outcomes] == [
        min(item.output_tokens, item.max_tokens) for item in items
    ]


def test_a_machine_that_does_not_listen_while_it_computes() -> None:
    items = some_items()
    result = run("fcfs@1P2D", items, small_machine(listens=False))
    assert all(each.finished for each in result.outcomes)


def test_a_host_tier_gives_back_what_the_pool_gave_up() -> None:
    items = [
        replace(each, prefix=(each.index % 4, 1, 2, 3, 4), prefix_block_tokens=32)
        for each in (one_item(200, 8, at=0.5 * n, index=n) for n in range(24))
    ]
    machine = small_machine(1, num_blocks=40, max_num_seqs=2)
    without = run("fcfs", items, machine)
    having = run("fcfs", items, replace(machine, host_blocks=200))
    assert sum(each.cached_tokens for each in having.outcomes) > sum(
        each.cached_tokens for each in without.outcomes
    )
    assert having.extras.copies


def test_equal_beginnings_are_found_in_the_cache_and_others_are_not() -> None:
    shared = [
        replace(each, prefix=(5, 6, 90 + each.index), prefix_block_tokens=64)
        for each in (one_item(192, 4, at=float(n), index=n) for n in range(4))
    ]
    cached = [each.cached_tokens for each in run("fcfs", shared, small_machine(1)).outcomes]
    assert cached == [0, 128, 128, 128]
    apart = [replace(each, prefix=(each.index, 6)) for each in shared]
    assert not any(each.cached_tokens for each in run("fcfs", apart, small_machine(1)).outcomes)
    off = Ablation(prefix_cache=True)
    result = run("fcfs", shared, small_machine(1), ablation=off)
    assert not any(each.cached_tokens for each in result.outcomes)


def test_the_same_seed_gives_the_same_bytes_in_every_process() -> None:
    program = (
        "import msgspec, hashlib\n"
        "from tests.sim.sim_kit import *\n"
        "r = run('fcfs@1P2D', sharing(some_items(120)), small_machine(), validate=False, seed=3)\n"
        "print(hashlib.sha256(msgspec.json.encode([r.outcomes, r.instance_seconds, r.extras]))"
        ".hexdigest())\n"
    )
    told = set()
    for hash_seed in ("1", "2", "3"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        told.add(done.stdout)
    assert len(told) == 1
    items = sharing(some_items(120))
    one, other = (run("fcfs", items, small_machine(), validate=False, seed=s) for s in (1, 2))
    assert one.outcomes != other.outcomes, "the seed does nothing"


def test_a_recorded_run_replays_through_a_fresh_dispatcher() -> None:
    tape: Tape = []
    machine = small_machine()
    run("fcfs@1P2D", some_items(), machine, tape=tape)
    assert len(tape) > 100
    choice = parse_choice("fcfs@1P2D")
    from appliance.sim.simulation import worker_specs

    fresh = Dispatcher(
        dispatcher_config(machine, Ablation()),
        workers=worker_specs(choice, machine),
        policy=choice.make().dispatch,
    )
    for now, message, outputs in tape:
        assert fresh.handle(message, now) == outputs


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_law_9_nothing_is_decided_by_what_answers_will_be(name: str) -> None:
    """Two worlds that differ in how long answers are *after* the shorter one would have ended say
    and decide the same until then."""
    items = [replace(each, max_tokens=200) for each in some_items(40)]
    longer = [replace(each, output_tokens=min(200, each.output_tokens + 40)) for each in items]
    tapes: list[Tape] = [[], []]
    for these, tape in zip((items, longer), tapes, strict=True):
        run(name, these, small_machine(noise=0.0), tape=tape, validate=False)
    first_end = next(
        index for index, (_, message, _) in enumerate(tapes[0]) if getattr(message, "finished", ())
    )
    assert first_end > 10
    assert tapes[0][:first_end] == tapes[1][:first_end]


def test_a_single_request_takes_the_time_of_its_steps() -> None:
    machine = small_machine(1, noise=0.0, max_batch_tokens=2048, num_blocks=1000)
    step = PROFILES["h200-8b"].step_seconds
    prompt, answer = 100, 5
    (outcome,) = run("fcfs", [one_item(prompt, answer)], machine).outcomes
    begin = step(
        num_tokens=prompt,
        num_samples=1,
        num_pairs=prompt * (prompt + 1) // 2,
        num_kv_tokens=prompt,
    )
    rest = sum(
        step(num_tokens=1, num_samples=1, num_pairs=known, num_kv_tokens=known)
        for known in range(prompt + 1, prompt + answer)
    )
    ways = 2 * machine.front_seconds + 2 * machine.pipe_seconds
    assert outcome.first == pytest.approx(begin + ways, abs=1e-9)
    assert outcome.last == pytest.approx(begin + rest + ways, abs=1e-9)
    assert outcome.on_time == 1.0


def test_what_cannot_be_served_is_refused_by_name() -> None:
    (outcome,) = run("fcfs", [one_item(MAX_LEN + 1, 5)], small_machine()).outcomes
    assert (outcome.finished, outcome.error) == (False, "context_length_exceeded")


def test_the_run_ends_when_its_time_is_over() -> None:
    items = [one_item(50, 400)]
    result = run("fcfs", items, small_machine(noise=0.0), drain_seconds=0.05)
    (outcome,) = result.outcomes
    assert outcome.error == "unfinished"
    assert 0 < outcome.num_tokens < 400


def test_a_killed_worker_costs_and_weights_take_their_time() -> None:
    items = [one_item(50, 20, at=0.4 * n, index=n) for n in range(10)]
    kill = [Kill(at=0.1, worker=WorkerId(0))]
    slow = {"start_seconds": 0.0, "weight_bytes": 10**9}
    rates = {"peer": 1e10, "host": 1e9, "disk": 2e8}
    ends = []
    for source in ("peer", "host", "disk"):
        machine = small_machine(1, weights_from=source, weight_rates=rates, **slow)
        outcomes = run("fcfs", items, machine, kills=kill).outcomes
        ends.append(max(each.ttft or 0.0 for each in outcomes))
    assert ends[0] < ends[1] < ends[2]
    assert ends[2] > 4.0


def test_blind_requests_say_no_targets() -> None:
    tape: Tape = []
    run("fcfs", some_items(10), small_machine(), ablation=Ablation(budgets=True), tape=tape)
    arrived = [message for _, message, _ in tape if isinstance(message, Arrived)]
    assert arrived
    assert all(message.request.slo.ttft is None for message in arrived)


def test_prompts_are_pulled_from_peers_unless_that_is_taken_away() -> None:
    items = [
        replace(each, prefix=(1, 2, 3), prefix_block_tokens=128)
        for each in (one_item(400, 60, at=0.01 * n + 0.1 * bool(n), index=n) for n in range(12))
    ]
    machine = small_machine(3, num_blocks=200, max_num_seqs=2, pipe_seconds=1e-5)
    tape: Tape = []
    run("fcfs", items, machine, tape=tape)
    pulls = [
        output
        for _, _, outputs in tape
        for output in outputs
        if isinstance(output, Assign) and output.pull_from is not None
    ]
    assert pulls
    tape.clear()
    run("fcfs", items, machine, tape=tape, ablation=Ablation(prefix_pull=True))
    assert not any(
        isinstance(output, Assign) and output.pull_from is not None
        for _, _, outputs in tape
        for output in outputs
    )


@pytest.mark.parametrize("words", ["h200:0", "h200:999", "gpu", "cpu:2@h200-8b", "paced:2@nothing"])
def test_unknown_machines_are_named(words: str) -> None:
    with pytest.raises(UnknownMachine, match="devices"):
        parse_machine(words)


def test_roles_must_fit_the_machine() -> None:
    from appliance.policy.settings import PolicySettingsError

    with pytest.raises(PolicySettingsError):
        simulate([], parse_choice("fcfs@2P2D"), small_machine(3))
