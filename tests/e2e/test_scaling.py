"""A node that wakes, parks and adds workers by itself, as users and operators see it (R1, R11)."""

import asyncio
from typing import Any

import pytest

from tests.e2e.test_roles import requests, settle, texts

pytestmark = [pytest.mark.procs, pytest.mark.timeout(400)]
SECONDS = 60.0


def state_of(server: Any, worker: int) -> str | None:
    """The state of that worker; None while there is none."""
    found = [each["state"] for each in server.state()["workers"] if each["id"] == worker]
    return found[0] if found else None


async def until(server: Any, worker: int, state: str) -> None:
    async with asyncio.timeout(SECONDS):
        while state_of(server, worker) != state:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def decided(session: Any, server: Any, kind: str) -> list[dict[str, Any]]:
    async with session.get(server.url + "/admin/decisions?limit=1000") as reply:
        decisions = (await reply.json())["decisions"]
    return [each for each in decisions if each["kind"] == kind]


async def load_until(server: Any, streaming: Any, work: Any, reached: Any) -> int:
    """Clients that ask again and again until `reached` is over; how many answers they got."""
    waiting, count = asyncio.create_task(reached), 0

    async def client(index: int) -> None:
        nonlocal count
        while not waiting.done():
            body = work[index % len(work)]
            texts([await streaming(server.url, body)])
            count += 1

    try:
        await asyncio.gather(*(client(index) for index in range(30)))
    finally:
        waiting.cancel()
    await waiting
    return count


async def test_a_standby_worker_is_woken_by_load_serves_and_is_parked_when_it_is_calm(
    serve: Any, streaming: Any, session: Any
) -> None:
    server = serve(
        *("--devices", "paced:2@fixed-20ms", "--validate"),
        *("--set", "standby.workers=1", "--set", "roles.scale=on"),
        *(
            "--set",
            "standby.min_workers=2",
            "--set",
            "batch.max_num_seqs=8",
            "--set",
            "kv.memory=256KiB",
        ),
        *("--set", "roles.settings={in_hold = 2.0, window = 2.0}"),
        workers=2,
    )
    assert state_of(server, 2) == "parked"
    work = requests(16, tokens=24)
    answers = await load_until(server, streaming, work, until(server, 2, "ready"))
    assert answers >= 30
    (wake, *_) = reversed(await decided(session, server, "wake"))
    assert (wake["by"], wake["workers"], wake["outcome"]) == ("controller", [2], "done")
    assert wake["cost"] > 0
    before = server.state()["totals"]["ended"]

    async def has_served() -> None:
        async with asyncio.timeout(SECONDS):
            while not server.state()["workers"][2]["tokens"]["decode"]:  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    answers = await load_until(server, streaming, work, has_served())
    ended = server.state()["totals"]["ended"]
    assert ended["length"] - before["length"] == answers, "every request ends once"
    assert set(ended) == {"length"}

    async with asyncio.timeout(SECONDS):
        while sum(w["state"] == "ready" for w in server.state()["workers"]) > 2:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    await settle(server)
    (park, *_) = await decided(session, server, "park")
    assert (park["by"], park["outcome"]) == ("controller", "done")
    cost = server.state()["totals"]["instance_seconds"]
    assert 2 * 2.0 < cost < 3 * server.state()["uptime"]
    texts([await streaming(server.url, work[0])])


async def test_a_worker_is_started_when_all_others_do_not_suffice(
    serve: Any, streaming: Any, session: Any
) -> None:
    server = serve(
        *("--devices", "paced:1@fixed-20ms", "--validate"),
        *("--set", "standby.add=1", "--set", "roles.scale=on"),
        *(
            "--set",
            "batch.max_num_seqs=8",
            "--set",
            "kv.memory=256KiB",
            "--set",
            "roles.settings={window = 2.0}",
        ),
        workers=1,
    )
    assert state_of(server, 1) is None
    assert server.state()["spares"] == 1
    work = requests(16, tokens=24)
    await load_until(server, streaming, work, until(server, 1, "ready"))
    (add,) = await decided(session, server, "add")
    assert (add["by"], add["workers"], add["outcome"]) == ("controller", [1], "done")
    assert server.state()["spares"] == 0
    await settle(server)
    async with session.post(server.url + "/admin/workers", json={}) as reply:
        assert (await reply.json())["worker"] == 2, "its number is not given twice"
