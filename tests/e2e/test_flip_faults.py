"""A fault at each step of a flip or a move, under load (R1, R5, R9).

Three paced workers, one for prompts and two for decoding, serve clients without a pause while roles
change there and back and a worker is parked and woken. At one step of the protocol one worker is
killed, raises, sleeps past every time-out, or refuses. Each change answers `done` or `rolled_back`
(or 409: that worker is down); the roles are then what the answers say; /health and /ready say 200
all the time; every answer has the tokens of the undisturbed server.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from appliance.core.faults import POINTS, REFUSABLE
from tests.e2e.conftest import Server
from tests.e2e.moves_kit import Answer, answers, check_same, computed, linked, post, settle, work

pytestmark = [pytest.mark.procs, pytest.mark.timeout(120)]

FLIP_SECONDS = 1.0
SHORT = (
    "kv.memory=256KiB",  # laws look at every block after every step
    "batch.max_batch_tokens=64",  # prompts take several steps, so blocks are offered between them
    f"roles.flip_seconds={FLIP_SECONDS}",
    "roles.drain_seconds=0.5",
    "roles.park_seconds=3.0",
    "transfer.lease_seconds=1.0",
)
DELAY = 1.6
"""Longer than a flip and a lease may take."""
SOURCES = frozenset(
    {
        "move.migrate",
        "move.offered",
        "move.before_prefilled",
        "move.before_final",
        "move.after_final",
        "move.release",
        "move.resume",
    }
)
"""Reached where a sequence comes from: worker 0 at first. The others where it goes: worker 1."""
STEPS = [point for point in sorted(POINTS) if point.startswith(("move.", "role.", "worker.park"))]
MATRIX = [
    (point, action)
    for point in STEPS
    for action in ("kill", "raise", "delay", "refuse")
    if action != "refuse" or point in REFUSABLE
]
CASES = [
    pytest.param(point, action, id=f"{point}-{action}", marks=[pytest.mark.slow] * (index % 3 > 0))
    for index, (point, action) in enumerate(MATRIX)
]
CHANGES: list[tuple[str, dict[str, str]]] = [
    ("workers/1/role", {"role": "prefill"}),
    ("workers/0/role", {"role": "decode"}),
    ("workers/1/park", {}),
    ("workers/1/wake", {}),
    ("roles", {"0": "prefill", "1": "decode"}),
]
Serve = Callable[..., Server]


@pytest.fixture(scope="module")
def bodies() -> list[dict[str, Any]]:
    """What the clients ask for, again and again."""
    return [{**body, "prompt": body["prompt"][:300]} for body in work(24, seed=3)]


@pytest.fixture(scope="module")
def expected(bodies: Any, tmp_path_factory: Any) -> list[Answer]:
    """The answers of an undisturbed mixed worker."""
    log = tmp_path_factory.mktemp("reference") / "server.log"
    server = Server(log, ["--devices", "paced:1@fixed-2ms"], {})
    try:
        server.wait_ready(1)
        return asyncio.run(answers(server, bodies))
    finally:
        server.stop()


@asynccontextmanager
async def watched(server: Server) -> AsyncIterator[None]:
    """Fails if the service is down at any moment meanwhile."""
    down: list[str] = []

    async def watch() -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                for path in ("/health", "/ready"):
                    async with session.get(server.url + path) as reply:
                        if reply.status != 200:
                            down.append(f"{path}: {reply.status} {await reply.text()}")
                await asyncio.sleep(0.03)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        ended = watching.done()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    assert not ended, watching
    assert not down, down[:3]


async def change(server: Server, path: str, body: dict[str, str]) -> str:
    """One change; how it ended. While a worker is down it cannot begin, and is asked again."""
    for _ in range(200):
        answer = await post(server, path, body)
        if answer["status"] != 409:
            assert answer["status"] == 200, answer
            assert answer["outcome"] in ("done", "rolled_back"), answer
            assert bool(answer["reason"]) == (answer["outcome"] == "rolled_back"), answer
            return str(answer["outcome"])
        await asyncio.sleep(0.05)
    pytest.fail(f"{path} could not begin in 10 s: {answer}")


async def reached(server: Server) -> None:
    """Wait, a bounded time, until some worker has died."""
    for _ in range(200):
        if any(worker["deaths"] for worker in server.state()["workers"]):
            return
        await asyncio.sleep(0.05)


def roles(server: Server) -> dict[str, str]:
    return {str(worker["id"]): worker["role"] for worker in server.state()["workers"]}


def wanted(path: str, body: dict[str, str]) -> dict[str, str]:
    """Roles that this change would give, if done."""
    if path.endswith("/role"):
        return {path.split("/")[1]: body["role"]}
    return body if path == "roles" else {}


def plan(point: str, action: str) -> list[dict[str, Any]]:
    """The fault, and what it takes to come to that step."""
    worker = 0 if point in SOURCES else 1
    rare = point.endswith("_copy") or point in ("move.offered", "move.resume")
    nth = 3 if point.startswith("move.") and not rare else 1
    found: list[dict[str, Any]] = []
    if point == "move.resume":
        found = [{"point": "move.after_copy", "action": "refuse", "nth": n} for n in (2, 4)]
    found.append({"point": point, "action": action, "worker": worker, "nth": nth})
    return [{**rule, "epoch": 1, "seconds": DELAY} for rule in found]


@pytest.mark.parametrize(("point", "action"), CASES)
async def test_R9_a_change_is_done_or_rolled_back_and_the_service_is_never_down(
    serve: Serve, bodies: Any, expected: Any, point: str, action: str
) -> None:
    settings = [part for each in SHORT for part in ("--set", each)]
    server = serve(
        *("--devices", "paced:3@fixed-2ms", "--roles", "prefill,decode,decode", "--validate"),
        *settings,
        workers=3,
        env={"APPLIANCE_FAULTS": json.dumps(plan(point, action))},
    )
    await linked(server, 6)
    now = roles(server)
    outcomes: list[str] = []
    over = False

    async def load() -> int:
        rounds = 0
        while not over or not rounds:
            check_same(await answers(server, bodies), expected)
            rounds += 1
        return rounds

    async with watched(server), asyncio.TaskGroup() as group:
        group.create_task(load())
        await asyncio.sleep(0.1)
        for path, body in CHANGES:
            outcomes.append(await change(server, path, body))
            if outcomes[-1] == "done":
                now |= wanted(path, body)
            assert roles(server) == now, outcomes
        if action in ("kill", "raise"):  # on a slow machine the load comes to it only now
            await reached(server)
        over = True

    await settle(server)
    deaths = [worker["deaths"] for worker in server.state()["workers"]]
    assert (sum(deaths) > 0) == (action in ("kill", "raise")), deaths
    if (point, action) == ("role.set", "delay"):
        assert outcomes[0] == "rolled_back", "it did not answer in time"
    if point.startswith("role.") and action in ("kill", "raise"):
        assert outcomes[0] == "rolled_back", "it died"
    swapped = {"0": "decode", "1": "prefill"}
    assert await change(server, "roles", swapped) == "done", "nothing of the fault has stayed"
    before = computed(server)
    check_same(await answers(server, bodies), expected)
    assert computed(server) != before
    await settle(server)
