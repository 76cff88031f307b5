"""The same tokens wherever they are computed, on real CPU compute (R1, R2, R12, R25).

One mixed worker is the reference. Other fleets do the same work: as prefill and decode workers,
while roles flip, while workers are parked, and while workers die in prefill, in a transfer and in
decode. Every case also shows by the workers' own counters who did the work.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.e2e.conftest import Server
from tests.e2e.moves_kit import (
    Answer,
    Progress,
    answers,
    check_same,
    computed,
    demanding_work,
    linked,
    moved,
    post,
    settle,
    since,
    work,
)

pytestmark = [pytest.mark.procs, pytest.mark.timeout(900)]

SIZES = [pytest.param(20, id="20"), pytest.param(500, id="500", marks=pytest.mark.slow)]
FIXED = ("--set", "model.dtype=float32", "--set", "devices.threads=1")
ALWAYS = (*FIXED, "--validate", "--set", "kv.memory=32MiB")  # laws look at every block
ONE_EACH = ("--roles", "prefill,decode")
Serve = Callable[..., Server]


@pytest.fixture(scope="module", params=SIZES)
def size(request: Any) -> int:
    """Requests of one case."""
    return int(request.param)


@pytest.fixture(scope="module")
def bodies(size: int) -> list[dict[str, Any]]:
    """The work of every case."""
    return work(size)


@pytest.fixture(scope="module")
def demanding(size: int) -> list[dict[str, Any]]:
    """Work whose next token depends on more than KV."""
    return demanding_work(16 if size < 100 else 120)


@pytest.fixture(scope="module")
def reference(bodies: Any, demanding: Any, tmp_path_factory: Any) -> list[list[Answer]]:
    """What one mixed worker answers to both."""
    log = tmp_path_factory.mktemp("reference") / "server.log"
    server = Server(log, ["--devices", "cpu:1", *FIXED], {})
    try:
        server.wait_ready(1)
        found = [asyncio.run(answers(server, each)) for each in (bodies, demanding)]
    finally:
        server.stop()
    assert len({tuple(answer[1]) for answer in found[0]}) > len(bodies) // 2, "they say little"
    return found


@pytest.fixture(scope="module")
def expected(reference: list[list[Answer]]) -> list[Answer]:
    """The answers to `bodies`."""
    return reference[0]


async def fleet(serve: Serve, devices: str, *args: str, rules: Sequence[Any] = ()) -> Server:
    """A server whose workers are all up and linked."""
    count = int(devices.split(":")[1])
    env = {"APPLIANCE_FAULTS": json.dumps(rules)} if rules else {}
    server = serve("--devices", devices, *ALWAYS, *args, workers=count, env=env)
    await linked(server, count * (count - 1))
    return server


async def test_R12_mixed_workers(serve: Serve, bodies: Any, expected: Any) -> None:
    server = await fleet(serve, "cpu:2")
    check_same(await answers(server, bodies), expected)
    await settle(server)
    assert all(prefill and decode for prefill, decode in computed(server).values())


@pytest.mark.parametrize(
    ("devices", "roles"), [("cpu:2", "prefill,decode"), ("cpu:4", "prefill,prefill,decode,decode")]
)
async def test_R12_R25_prefill_and_decode_workers(
    serve: Serve, bodies: Any, expected: Any, devices: str, roles: str
) -> None:
    server = await fleet(serve, devices, "--roles", roles)
    check_same(await answers(server, bodies), expected)
    await settle(server)
    done = computed(server)
    half = len(done) // 2
    prefill = [tokens for tokens, _ in done.values()]
    decode = [tokens for _, tokens in done.values()]
    assert all(done[worker][0] for worker in range(half))
    assert sum(prefill[:half]) > 4 * sum(prefill[half:])
    assert sum(decode[half:]) > sum(decode[:half])
    asked = sum(body["max_tokens"] > 1 for body in bodies)
    assert moved(server)["hand-off done"] > asked // 3
    assert server.state()["totals"]["cached_tokens"] > 0, "prefixes were shared"


async def test_R12_R25_flips_under_load(serve: Serve, bodies: Any, expected: Any) -> None:
    """One worker changes its role, then both swap as one, again and again."""
    server = await fleet(serve, "cpu:2", *ONE_EACH)
    flips = max(4, len(bodies) // 25)
    outcomes: list[str] = []
    swapped = [{"0": "decode", "1": "prefill"}, {"0": "prefill", "1": "decode"}]

    async def flip(progress: Progress) -> None:
        for number in range(flips):
            if not await progress.until(number / (flips + 2)):
                return
            if number % 4 == 3:  # P->D and D->P of one, the other stays
                outcomes.append(
                    (await post(server, "workers/0/role", {"role": "decode"}))["outcome"]
                )
                role = {"role": "prefill"}
                outcomes.append((await post(server, "workers/0/role", role))["outcome"])
                role = {"role": "decode"}
                outcomes.append((await post(server, "workers/1/role", role))["outcome"])
            else:
                answer = await post(server, "roles", swapped[number % 2])
                outcomes.append(answer["outcome"])

    check_same(await answers(server, bodies, meanwhile=flip), expected)
    assert set(outcomes) == {"done"}
    assert len(outcomes) >= 2
    await settle(server)
    for roles, prefills in zip(swapped, (1, 0), strict=True):  # R25: the roles are where they say
        assert (await post(server, "roles", roles))["outcome"] == "done"
        before = computed(server)
        check_same(await answers(server, bodies[:10]), expected[:10])
        done = since(server, before)
        assert done[prefills][0] > done[1 - prefills][0]
        assert done[1 - prefills][1] > done[prefills][1]
    await settle(server)


async def test_R12_R25_migration_in_mid_decode(serve: Serve, bodies: Any, expected: Any) -> None:
    """Mixed workers are parked and woken in turn: what runs there goes on at the other one."""
    server = await fleet(serve, "cpu:2")
    turns = max(2, len(bodies) // 40)
    migrated: list[int] = []

    async def park(progress: Progress) -> None:
        for number in range(turns):
            if not await progress.until((number + 0.2) / (turns + 1)):
                return
            worker = number % 2
            parked = await post(server, f"workers/{worker}/park")
            assert parked["outcome"] == "done", parked
            before = computed(server)[worker]
            migrated.append(parked["migrated"])
            await progress.until((number + 0.5) / (turns + 1))
            assert computed(server)[worker] == before, "a parked worker computes nothing"
            assert (await post(server, f"workers/{worker}/wake"))["outcome"] == "done"

    check_same(await answers(server, bodies, meanwhile=park), expected)
    await settle(server)
    done = moved(server)
    assert sum(migrated) > 0
    assert done["migration done"] > 0
    assert done["migration done"] + done["hand-off done"] >= sum(migrated), "some had no token yet"


@pytest.mark.parametrize("depth", [2, *[pytest.param(n, marks=pytest.mark.slow) for n in (0, 1)]])
async def test_R12_what_a_sampler_remembers_moves_too(
    serve: Serve, demanding: Any, reference: Any, depth: int
) -> None:
    """Penalties, grammars, stop strings and smallest lengths, with steps planned ahead."""
    server = await fleet(serve, "cpu:2", *ONE_EACH, "--set", f"batch.depth={depth}")
    turns = max(4, len(demanding) // 10)

    async def swap(progress: Progress) -> None:
        for number in range(turns):
            if not await progress.until(number / (turns + 1)):
                return
            swapped = {"0": "decode", "1": "prefill"} if number % 2 == 0 else {"0": "mixed"}
            assert (await post(server, "roles", swapped))["outcome"] == "done"
            await asyncio.sleep(0.1)

    check_same(await answers(server, demanding, meanwhile=swap), reference[1])
    await settle(server)
    done = moved(server)
    assert done["hand-off done"] + done["migration done"] > len(demanding) // 4


KILLS = {
    "in prefill": [{"point": "worker.before_step", "worker": 0, "nth": 5}],
    "in transfer": [
        {"point": "move.before_copy", "worker": 1, "nth": 4},
        {"point": "move.before_final", "worker": 0, "nth": 6},
    ],
    "in decode": [{"point": "worker.before_step", "worker": 1, "nth": 25}],
}
"""Where the worker dies, in its first life."""
AGAIN = {
    "in prefill": [{"point": "worker.after_step", "worker": 0, "nth": 90, "epoch": 2}],
    "in transfer": [{"point": "move.before_pulled", "worker": 1, "nth": 70, "epoch": 2}],
    "in decode": [{"point": "worker.after_step", "worker": 1, "nth": 250, "epoch": 2}],
}
"""And in its second, of the large cases."""


@pytest.mark.parametrize("where", list(KILLS))
async def test_R5_R12_a_kill(serve: Serve, bodies: Any, expected: Any, where: str) -> None:
    rules = KILLS[where] + (AGAIN[where] if len(bodies) > 100 else [])
    plan = [{"epoch": 1, "action": "kill", **rule} for rule in rules]
    server = await fleet(serve, "cpu:2", *ONE_EACH, rules=plan)
    check_same(await answers(server, bodies), expected)
    await settle(server)
    deaths = sum(worker["deaths"] for worker in server.state()["workers"])
    assert deaths == len(plan)
    before = computed(server)
    check_same(await answers(server, bodies[:10]), expected[:10])
    done = since(server, before)
    assert done[1][1] > done[0][1], "roles are kept over a death"
    await settle(server)
