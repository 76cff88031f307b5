"""The soak finds what it looks for, and a small one passes (R1, R2, R3, R5, R15, R16, R19)."""

import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tools.soak import main, unsettled
from tools.soak_clients import Accounts, Clients, Reply, make_prompts
from tools.soak_moves import Goals
from tools.soak_watch import MIB, Sample, trends

CHUNK = b'data: {"choices": [{"index": 0, "text": "a", "finish_reason": null}]}\n\n'
LAST = b'data: {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}\n\n'
ERROR = b'data: {"error": {"code": "worker_lost"}}\n\n'
DONE = b"data: [DONE]\n\n"


def read(*events: bytes) -> Reply:
    reply = Reply()
    for event in events:
        reply.line(event)
    return reply


def test_R1_one_end_is_right() -> None:
    assert read(CHUNK, LAST, DONE).fault(n=1, streamed=True) == ""
    assert read(CHUNK, ERROR).fault(n=1, streamed=False) == ""


@pytest.mark.parametrize(
    "events",
    [
        (CHUNK,),
        (CHUNK, LAST),
        (CHUNK, DONE),
        (CHUNK, LAST, LAST, DONE),
        (CHUNK, LAST, DONE, DONE),
        (CHUNK, LAST, CHUNK, DONE),
        (CHUNK, ERROR, ERROR),
        (CHUNK, ERROR, DONE),
    ],
)
def test_R1_no_end_two_ends_and_text_after_the_end_are_found(events: Sequence[bytes]) -> None:
    assert read(*events).fault(n=1, streamed=True)


def test_R1_a_choice_that_never_ended_is_found() -> None:
    assert read(CHUNK, LAST, DONE).fault(n=2, streamed=True)


def test_R5_an_answer_that_changed_is_found() -> None:
    accounts = Accounts()
    accounts.compare(1, 0, "abcd")
    accounts.compare(1, 0, "abcd")
    assert accounts.num_violations == 0
    accounts.compare(1, 0, "abXd")
    assert accounts.violations[0].kind == "answer differs"
    assert "character 2" in accounts.violations[0].detail


def samples(count: int, **growth: float) -> list[Sample]:
    names = [name for name in Sample.__struct_fields__ if name not in ("at", "settled")]
    return [
        Sample(
            at=60.0 * index,
            settled=True,
            **{name: int(100 * MIB + growth.get(name, 0) * index) for name in names},
        )
        for index in range(count)
    ]


def test_R19_what_stays_level_is_not_growth() -> None:
    assert not any(trend.grew for trend in trends(samples(30)))
    assert not any(trend.grew for trend in trends(samples(30, server_rss=-MIB)))


@pytest.mark.parametrize(
    ("name", "growth"), [("server_rss", MIB), ("spared_rss", MIB), ("descriptors", 0.3)]
)
def test_R19_growth_is_found_with_its_slope(name: str, growth: float) -> None:
    found = {trend.name: trend for trend in trends(samples(30, **{name: growth}))}
    assert [each for each, trend in found.items() if trend.grew] == [name]
    assert found[name].slope_per_hour == pytest.approx(60 * growth, rel=0.1)


def test_R19_a_few_samples_do_not_judge_memory_but_descriptors() -> None:
    found = {trend.name: trend for trend in trends(samples(4, server_rss=9 * MIB, threads=1))}
    assert not found["server_rss"].grew
    assert found["threads"].grew


def test_R2_blocks_kept_and_answers_lost_are_found() -> None:
    blocks = {"total": 10, "free": 9, "held": 1, "leased": 0}
    worker = {"id": 0, "state": "ready", "running": 0, "queued": 0, "blocks": blocks}
    totals = {"live": 0, "sequences": 5, "ended": {"stop": 4}}
    faults = unsettled({"workers": [worker], "totals": totals, "moves": []})
    assert len(faults) == 2
    blocks.update(free=10, held=0)
    totals["sequences"] = 4
    assert unsettled({"workers": [worker], "totals": totals, "moves": []}) == []


@pytest.fixture
async def careless() -> AsyncIterator[str]:
    """A server that forgets the end of its streams."""

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not body["stream"]:
            return web.json_response({"choices": []})
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(CHUNK)
        return response

    app = web.Application()
    app.add_routes([web.post("/v1/completions", handle)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield "http://{}:{}".format(*runner.addresses[0])
    await runner.cleanup()


async def test_R1_the_clients_notice_a_server_that_forgets_ends(careless: str) -> None:
    accounts, rng = Accounts(), random.Random(1)
    clients = Clients(careless, make_prompts(rng, 4, longest_answer=9), accounts, hold_seconds=1)
    await clients.open()
    for _ in range(6):
        await clients.ask(rng)
    await clients.close()
    assert accounts.num_violations == 6
    assert {violation.kind for violation in accounts.violations} == {"terminal events"}


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "soak.json"
    code = main([*arguments, "--laws", "--json", str(file)])
    report: dict[str, Any] = json.loads(file.read_text())
    assert report["violations"] == []
    assert code == 0
    return report


@pytest.mark.procs
def test_R19_a_few_seconds_of_soak(tmp_path: Path) -> None:
    options = ("--round-seconds", "2.5", "--users", "8", "--burst", "90", "--hit-seconds", "1")
    report = run(tmp_path, "--devices", "paced:3", "--minutes", "0.08", *options)
    assert report["counts"]["requests accepted and ended"] > 20
    assert report["counts"]["status 429"] > 0
    assert sum(worker["deaths"] for worker in report["workers"]) > 0


def test_what_was_not_reached_is_said() -> None:
    goals = Goals(kills=3, flips=2, aborts=0)
    counts = {"workers hit by SIGKILL": 1, "workers hit by SIGSTOP": 2, "flips done": 1}
    assert goals.missing(Counter(counts)) == ["1 flips of 2"]
    assert goals.missing(Counter(counts | {"flips done": 2})) == []


@pytest.mark.procs
def test_R9_R19_a_few_seconds_of_soak_with_operators(tmp_path: Path) -> None:
    options = ("--round-seconds", "4", "--users", "6", "--burst", "20", "--hit-seconds", "1")
    goals = ("--roles", "prefill,decode,mixed", "--flips", "4", "--aborts", "20", "--kills", "1")
    report = run(tmp_path, "--devices", "paced:3", "--minutes", "0.12", *options, *goals)
    assert sum(worker["flips"] for worker in report["workers"]) >= 4
    moves = {move["kind"] for move in report["transfers"]["moves"]}
    assert moves & {"hand-off", "migration"}


@pytest.mark.procs
@pytest.mark.slow
@pytest.mark.parametrize("devices", ["paced:4", "cpu:2"])
def test_R19_a_longer_soak(tmp_path: Path, devices: str) -> None:
    report = run(
        tmp_path, "--devices", devices, "--minutes", "0.6", "--round-seconds", "9", "--users", "8"
    )
    assert report["rounds"] >= 1
    assert report["counts"]["answers compared"] > 20
    assert sum(worker["deaths"] for worker in report["workers"]) > 0
