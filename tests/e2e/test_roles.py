"""Prefill and decode on different workers, as users and operators see it (R5, R9, R12, R25)."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.procs, pytest.mark.timeout(400)]
ROLES = ("--roles", "prefill,decode")


def requests(count: int, *, tokens: int = 24) -> list[dict[str, Any]]:
    """Greedy and seeded completions of mixed lengths; every third begins as the one before."""
    found: list[dict[str, Any]] = []
    for index in range(count):
        words = " ".join(f"word{index * 7 + k}" for k in range(4 + (index * 37) % 90))
        if index % 3 == 2:
            words = found[-1]["prompt"] + " and then " + words
        body: dict[str, Any] = {"model": "tiny-tasks", "prompt": words, "ignore_eos": True}
        body |= {"max_tokens": tokens + index % 7}
        body |= {"temperature": 0} if index % 2 else {"temperature": 0.9, "seed": index}
        found.append(body)
    return found


async def all_of(server: Any, streaming: Any, work: Any) -> list[str]:
    answers = await asyncio.gather(*(streaming(server.url, body) for body in work))
    return texts(answers)


def texts(answers: Any) -> list[str]:
    """What was answered, once each was answered once and well (R1)."""
    for answer in answers:
        assert answer.error is None, answer.error
        assert (answer.terminal_events, answer.done, answer.finish) == (1, True, ["length"])
    return [answer.text for answer in answers]


async def during(
    server: Any, streaming: Any, new_answer: Any, work: Any, do: Callable[[], Any]
) -> list[str]:
    """Answer all of `work`; `do` something once half of the streams have begun."""
    answers = [new_answer() for _ in work]
    tasks = [
        asyncio.create_task(streaming(server.url, body, answer))
        for body, answer in zip(work, answers, strict=True)
    ]
    begun = [asyncio.create_task(answer.first_token.wait()) for answer in answers]
    for count, one in enumerate(asyncio.as_completed(begun), start=1):
        await one
        if count >= len(work) // 2:
            break
    done = do()
    if asyncio.iscoroutine(done):
        await done
    await asyncio.gather(*tasks)
    for each in begun:
        each.cancel()
    await asyncio.gather(*begun, return_exceptions=True)
    return texts(answers)


def computed(server: Any) -> list[tuple[int, int]]:
    """Tokens (prefill, decode) that each worker has computed so far."""
    workers = server.state()["workers"]
    return [(w["tokens"]["prefill"], w["tokens"]["decode"]) for w in workers]


def moved(server: Any) -> Counter[str]:
    """Moves that are over, by kind and outcome."""
    moves = server.state()["transfers"]["moves"]
    return Counter({f"{m['kind']} {m['outcome']}": m["count"] for m in moves})


def check_free(server: Any) -> None:
    """Nothing is held or leased any more (R2)."""
    for worker in server.state()["workers"]:
        blocks = worker["blocks"]
        assert blocks["free"] == blocks["total"], server.state()


async def settle(server: Any) -> None:
    """Wait for releases that are on their way."""

    def is_busy() -> bool:
        blocks = [worker["blocks"] for worker in server.state()["workers"]]
        return any(each["free"] != each["total"] for each in blocks)

    async with asyncio.timeout(15):
        while is_busy():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    check_free(server)


async def flip(session: Any, server: Any, roles: dict[str, str]) -> dict[str, Any]:
    async with session.post(server.url + "/admin/roles", json=roles) as reply:
        document = await reply.json()
        assert reply.status == 200, document
        return dict(document)


def wait_links(server: Any, count: int) -> None:
    """Until so many links have been probed."""
    import time

    end = time.monotonic() + 20
    while len(server.state()["links"]) < count:
        assert time.monotonic() < end, server.state()["links"]
        time.sleep(0.05)


@pytest.mark.parametrize("devices", ["cpu:2", "paced:2"])
async def test_R12_R25_answers_are_those_of_mixed_workers_wherever_they_are_computed(
    serve: Any, streaming: Any, new_answer: Any, session: Any, devices: str
) -> None:
    work = requests(20)
    mixed = serve("--devices", devices, "--validate", workers=2)
    expected = await all_of(mixed, streaming, work)
    mixed.stop()

    server = serve("--devices", devices, *ROLES, "--validate", workers=2)
    wait_links(server, 2)
    assert await all_of(server, streaming, work) == expected
    await settle(server)
    (prefill_0, decode_0), (prefill_1, decode_1) = computed(server)
    assert prefill_0 > 4 * prefill_1
    assert decode_1 > decode_0
    assert moved(server)["hand-off done"] >= 10
    paths = server.state()["transfers"]["paths"]
    assert {(p["source"], p["target"]) for p in paths if p["kind"] == "hand-off"} == {(0, 1)}
    assert all(p["path"] == "shared memory" for p in paths)

    # both flips, while streams run
    swapped = {"0": "decode", "1": "prefill"}
    back = {"0": "prefill", "1": "decode"}
    for roles in (swapped, back):
        answers = []

        async def turn(roles: dict[str, str] = roles, kept: list[Any] = answers) -> None:
            kept.append(await flip(session, server, roles))

        assert await during(server, streaming, new_answer, work, turn) == expected
        assert answers[0]["outcome"] == "done"
        before = computed(server)
        assert await all_of(server, streaming, work) == expected
        grown = [new[1] - old[1] for old, new in zip(before, computed(server), strict=True)]
        decodes, other = (0, 1) if roles["0"] == "decode" else (1, 0)
        assert grown[decodes] > grown[other], grown
    await settle(server)

    # a kill of each while it works
    for worker in (1, 0):
        victim = server.pid(worker)
        killed = await during(
            server, streaming, new_answer, work, lambda pid=victim: os.kill(pid, signal.SIGKILL)
        )
        assert killed == expected
        server.wait_ready(2, 30)
        roles = [each["role"] for each in server.state()["workers"]]
        assert roles == ["prefill", "decode"]
    wait_links(server, 2)
    assert await all_of(server, streaming, work) == expected
    await settle(server)


async def test_R9_flips_under_load_lose_and_double_nothing(
    serve: Any, streaming: Any, session: Any
) -> None:
    """Ten flips, alternating, while streams come and go."""
    server = serve(
        "--devices", "paced:4", "--roles", "prefill,prefill,decode,decode", "--validate", workers=4
    )
    wait_links(server, 12)
    work = requests(16, tokens=48)
    expected = await all_of(server, streaming, work)
    over = asyncio.Event()

    async def load() -> int:
        rounds = 0
        while not over.is_set() or not rounds:
            assert await all_of(server, streaming, work) == expected
            rounds += 1
        return rounds

    loads = [asyncio.create_task(load()) for _ in range(2)]
    outcomes: Counter[str] = Counter()
    for number in range(10):
        role = "decode" if number % 2 == 0 else "prefill"
        url = f"{server.url}/admin/workers/1/role"
        async with session.post(url, json={"role": role}) as reply:
            document = await reply.json()
            assert reply.status == 200, document
            outcomes[document["outcome"]] += 1
    over.set()
    assert sum(await asyncio.gather(*loads)) >= 2
    assert outcomes["done"] == 10
    await settle(server)
    async with session.get(server.url + "/admin/decisions") as reply:
        decisions = (await reply.json())["decisions"]
    flips = [each for each in decisions if each["kind"] == "flip" and each["by"] == "operator"]
    assert len(flips) == 10
    assert all(each["outcome"].startswith("done") for each in flips)
    assert server.state()["workers"][1]["flips"] == 10


async def test_a_worker_is_parked_woken_added_and_stands_by_under_load(
    serve: Any, streaming: Any, new_answer: Any, session: Any
) -> None:
    server = serve("--devices", "paced:2", "--set", "standby.workers=1", "--validate", workers=2)
    work = requests(16, tokens=48)
    expected = await all_of(server, streaming, work)

    async def post(path: str, body: Any = None) -> Any:
        async with session.post(f"{server.url}/admin/{path}", json=body or {}) as reply:
            document = await reply.json()
            assert (reply.status, document.get("outcome")) == (200, "done"), document
            return document

    assert server.state()["workers"][2]["state"] == "parked"

    async def change() -> None:
        await post("workers/2/wake")
        await post("workers/0/park")
        added = await post("workers", {"role": "decode"})
        assert added["worker"] == 3

    assert await during(server, streaming, new_answer, work, change) == expected
    states = [worker["state"] for worker in server.state()["workers"]]
    assert states == ["parked", "ready", "ready", "ready"]
    before = computed(server)
    assert await all_of(server, streaming, work) == expected
    after = computed(server)
    assert after[0] == before[0], "a parked worker computes nothing"
    assert after[2] != before[2]
    await post("workers/0/wake")
    await settle(server)


async def test_a_request_tells_where_it_was_served(
    serve: Any, streaming: Any, session: Any
) -> None:
    server = serve("--devices", "paced:2", *ROLES, workers=2)
    wait_links(server, 2)
    body = {**requests(1)[0], "max_tokens": 200}
    async with session.post(server.url + "/v1/completions", json=body) as reply:
        assert reply.status == 200
        name = reply.headers["x-request-id"]
    async with session.get(f"{server.url}/admin/requests/{name}") as reply:
        (answer,) = (await reply.json())["answers"]
    told = [event["what"] for event in answer["events"]]
    assert told[:2] == ["Arrived", "Assign"]
    for what in ("Pull", "Migrate", "Prefilled", "KvPulled", "Release", "Released", "Ended"):
        assert what in told, told
    pulled = next(event for event in answer["events"] if event["what"] == "KvPulled")
    assert (pulled["source"], pulled["worker"], pulled["path"]) == (0, 1, "shared memory")


async def test_R17_a_drain_during_a_flip_finishes_what_runs_and_ends_well(
    serve: Any, streaming: Any, new_answer: Any, session: Any
) -> None:
    server = serve("--devices", "paced:2", *ROLES, "--validate", workers=2)
    wait_links(server, 2)
    work = requests(12, tokens=150)
    statuses: list[int] = []

    async def turn_and_stop() -> None:
        async def turn() -> None:
            swapped = {"0": "decode", "1": "prefill"}
            async with session.post(server.url + "/admin/roles", json=swapped) as reply:
                statuses.append(reply.status)

        asking = asyncio.create_task(turn())
        await asyncio.sleep(0.002)
        server.process.send_signal(signal.SIGTERM)
        await asking

    await during(server, streaming, new_answer, work, turn_and_stop)
    assert statuses[0] in (200, 409, 503)
    assert await asyncio.to_thread(server.process.wait, 30) == 0
