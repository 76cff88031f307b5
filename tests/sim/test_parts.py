"""Promises of the simulator's parts: names, clock, copies, clients, machines."""

import pytest

from appliance.core.blocks import BlockLedger
from appliance.core.messages import HOST_TIER
from appliance.core.peer import CopyDone, CopyJob, FetchDone, FetchJob
from appliance.core.types import CacheGroupSpec, FinishReason, MoveId, RequestId, Slo, WorkerId
from appliance.sim.clients import on_time
from appliance.sim.copies import Copier, Done, Traffic
from appliance.sim.events import Events
from appliance.sim.machine import parse_machine
from appliance.sim.truth import Names, Served, Truth


def test_prompts_share_names_as_far_as_their_prefixes_agree() -> None:
    names = Names(16)
    one = names.prompt(1, 200, prefix=(7, 8, 9, 1), prefix_block_tokens=48)
    two = names.prompt(2, 200, prefix=(7, 8, 4, 1), prefix_block_tokens=48)
    three = names.prompt(3, 200, prefix=(8, 7), prefix_block_tokens=48)
    assert len(one) == len(two) == 12
    assert one[:6] == two[:6]
    assert not set(one[6:]) & set(two[6:]), "equal ids after other ids are other content"
    assert not (set(one) | set(two)) & set(three)
    assert len(set(one)) == 12


def test_blocks_that_a_prefix_covers_in_part_are_nobody_elses() -> None:
    names = Names(16)
    one = names.prompt(1, 64, prefix=(5,), prefix_block_tokens=40)
    two = names.prompt(2, 64, prefix=(5,), prefix_block_tokens=40)
    assert one[:2] == two[:2]
    assert not set(one[2:]) & set(two[2:])
    short = names.prompt(3, 30, prefix=(5,), prefix_block_tokens=40)
    assert short == one[:1]


def test_small_prefix_blocks_join_into_blocks_of_the_ledger() -> None:
    names = Names(16)
    one = names.prompt(1, 32, prefix=(1, 2, 3, 4, 5, 6), prefix_block_tokens=6)
    two = names.prompt(2, 32, prefix=(1, 2, 3, 4, 5, 7), prefix_block_tokens=6)
    assert one[0] == two[0]
    assert one[1] != two[1]


def test_an_answer_ends_and_names_its_blocks_when_they_are_full() -> None:
    names = Names(16)
    prompt = names.prompt(4, 20, prefix=(), prefix_block_tokens=0)
    truth = Truth(4, prompt_tokens=20, length=30, names=prompt, tail=names.tail(4))
    served = Served(RequestId(9), truth, emitted=0, block_tokens=16)
    told = [served.push() for _ in range(30)]
    named = {place + 1: each.hashes for place, each in enumerate(told) if each.hashes}
    assert named == {12: truth.known_names(2)[1:], 28: truth.known_names(3)[2:]}
    assert [each.stopped for each in told] == [None] * 29 + [FinishReason.STOP]
    later = Served(RequestId(9), truth, emitted=12, block_tokens=16)
    assert [later.push() for _ in range(18)] == told[12:]
    silent = Served(RequestId(9), truth, emitted=0, block_tokens=0)
    assert not any(silent.push().hashes for _ in range(30))


def test_things_happen_in_order_and_equal_times_in_the_order_of_their_announcement() -> None:
    events, seen = Events(), []
    events.at(2.0, seen.append, "c")
    events.at(1.0, seen.append, "a")
    events.at(1.0, seen.append, "b")
    events.at(9.0, seen.append, "never")
    events.run(lambda: True, until=5.0)
    assert seen == ["a", "b", "c"]
    events.at(0.0, seen.append, "late")
    events.run(lambda: len(seen) < 4, until=50.0)
    assert seen[-1] == "late"
    assert events.now == 2.0, "what is late happens now, not in the past"


class Bench:
    """Two pools that can be read and copiers of workers 2 and 3."""

    def __init__(self) -> None:
        block = float(parse_machine("h200:1").block_bytes)
        self.machine = parse_machine(
            "h200:1",
            copy_bytes_per_second=block,
            copy_seconds=0.5,
            host_bytes_per_second=10.0 * block,
        )
        self.events = Events()
        group = CacheGroupSpec(num_blocks=8, block_tokens=16)
        self.pools = {WorkerId(n): BlockLedger([group]) for n in range(2)}
        self.traffic = Traffic()
        self.told: list[tuple[float, Done]] = []

    def copier(self) -> Copier:
        return Copier(
            self.machine,
            self.events,
            own=self.pools[WorkerId(0)],
            pools=self.pools,
            traffic=self.traffic,
            tell=lambda done: self.told.append((self.events.now, done)),
        )

    def run(self) -> None:
        self.events.run(lambda: True, until=1e9)


def job(move: int, peer: int, *, blocks: int = 1, slack: float | None = None) -> CopyJob:
    return CopyJob(
        move=MoveId(move),
        peer=WorkerId(peer),
        sources=tuple(range(blocks)),
        targets=tuple(range(blocks)),
        generations=(0,) * blocks,
        slack=slack,
    )


def test_one_worker_copies_one_after_the_other_the_least_slack_first() -> None:
    bench = Bench()
    copier = bench.copier()
    copier.put(job(1, 0))
    copier.put(job(2, 0))
    copier.put(job(3, 0, slack=0.1))
    copier.put(job(3, 0, blocks=2, slack=0.1))
    bench.run()
    order = [(at, done.move) for at, done in bench.told if isinstance(done, CopyDone)]
    assert order == [(1.5, 1), (3.0, 3), (5.5, 3), (7.0, 2)]
    assert bench.traffic.num_bytes == 5 * bench.machine.block_bytes


def test_readers_of_one_worker_share_its_link() -> None:
    bench = Bench()
    bench.copier().put(job(1, 0))
    bench.copier().put(job(2, 0))
    bench.copier().put(job(3, 1))
    bench.run()
    assert [at for at, _ in bench.told] == [1.5, 1.5, 2.5]


def test_a_block_that_was_reused_meanwhile_is_not_believed() -> None:
    bench = Bench()
    copier = bench.copier()
    copier.put(job(1, 0, blocks=2))
    ledger = bench.pools[WorkerId(0)]
    table = ledger.open((), 0)
    ledger.grow(table, 8)
    bench.run()
    ((_, done),) = bench.told
    assert isinstance(done, CopyDone)
    assert "reused" in done.failed


def test_fetches_take_the_leading_blocks_that_are_there() -> None:
    bench = Bench()
    ledger = bench.pools[WorkerId(1)]
    table = ledger.open((), 0)
    ledger.grow(table, 3)
    ledger.register(table, [11, 12, 13], 3)
    fetch = FetchJob(
        request_id=RequestId(5), peer=WorkerId(1), hashes=(11, 12, 99), targets=(0, 1, 2)
    )
    bench.copier().put(fetch)
    bench.run()
    ((at, done),) = bench.told
    assert isinstance(done, FetchDone)
    assert (at, done.num_blocks, bool(done.reason)) == (2.5, 2, True)
    nothing = FetchJob(request_id=RequestId(6), peer=HOST_TIER, hashes=(1,), targets=(0,))
    bench.copier().put(nothing)
    bench.run()
    last = bench.told[-1][1]
    assert isinstance(last, FetchDone)
    assert last.num_blocks == 0


def test_tokens_are_on_time_against_the_deadline_of_each() -> None:
    slo = Slo(ttft=1.0, tpot=0.1)
    assert on_time([0.9, 1.05, 1.3], slo, sent=0.0) == pytest.approx(2 / 3)
    assert on_time([], slo, sent=0.0) == 0.0
    assert on_time([9.0, 9.05], Slo(tpot=0.1), sent=0.0) == 1.0
    assert on_time([9.0, 99.0], Slo(ttft=1.0), sent=0.0) == 1.0


def test_machines_are_what_they_say() -> None:
    card, paced, cpu = (parse_machine(each) for each in ("h200:8", "paced:4", "cpu:2"))
    assert (card.num_workers, paced.num_workers, cpu.num_workers) == (8, 4, 2)
    assert card.block_bytes == 16 * 147456
    assert paced.profile == card.profile
    assert paced.noise == 0.0
    assert card.kv_tokens > 700_000
    assert parse_machine("paced:1@fixed-20ms").profile.name == "fixed-20ms"
    disk = parse_machine("h200:1", weights_from="disk").weights_seconds
    assert disk > 10 * parse_machine("h200:1", weights_from="host").weights_seconds / 2
