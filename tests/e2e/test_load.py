"""Aborts, overload, drain: every request ends once and blocks come back (R1, R2, R3, R16, R17)."""

import asyncio
import random
import signal
import time
from typing import Any

import aiohttp
import pytest

pytestmark = [pytest.mark.procs, pytest.mark.timeout(600)]


async def abandon(session: aiohttp.ClientSession, url: str, body: Any, seconds: float) -> str:
    """Send a request and hang up after `seconds`; how it went."""
    try:
        async with asyncio.timeout(seconds):
            async with session.post(url + "/v1/completions", json=body) as reply:
                await reply.read()
                return f"status {reply.status}"
    except TimeoutError:
        return "abandoned"


async def settle(server: Any, seconds: float = 20) -> Any:
    """The state once nothing runs, nothing waits and nothing cancelled still ends with its step."""
    end = time.monotonic() + seconds
    while True:
        state = server.state()
        busy = [w for w in state["workers"] if w["running"] or w["queued"] or w["blocks"]["held"]]
        if not busy and state["totals"]["live"] == 0:
            return state
        assert time.monotonic() < end, state
        await asyncio.sleep(0.05)


async def storm(server: Any, session: Any, count: int) -> list[str]:
    rng = random.Random(5)

    async def one(index: int) -> str:
        await asyncio.sleep(rng.random() * count / 150)
        body = {
            "model": "tiny-tasks",
            "prompt": "spell " + "x" * rng.randrange(1, 1500),
            "max_tokens": rng.randrange(1, 400),
            "ignore_eos": True,
            "stream": index % 3 > 0,
            "n": 1 + index % 2,
        }
        return await abandon(session, server.url, body, rng.random() * 1.2)

    return await asyncio.gather(*(one(index) for index in range(count)))


@pytest.mark.parametrize(
    "count", [150, pytest.param(1000, marks=pytest.mark.slow)], ids=["150", "1000"]
)
@pytest.mark.parametrize("devices", ["paced:2", "cpu:2"])
async def test_R2_R3_an_abort_storm_leaks_no_block(
    serve: Any, session: Any, devices: str, count: int
) -> None:
    server = serve("--devices", devices, workers=2)
    outcomes = await storm(server, session, count)
    assert outcomes.count("abandoned") > count // 3
    assert {o for o in outcomes if o != "abandoned"} <= {"status 200", "status 429"}
    state = await settle(server)
    for worker in state["workers"]:
        blocks = worker["blocks"]
        assert blocks["free"] == blocks["total"]
        assert blocks["held"] == blocks["leased"] == 0


async def test_R16_overload_is_answered_with_429_and_every_accepted_request_ends(
    serve: Any, streaming: Any, tmp_path: Any
) -> None:
    config = tmp_path / "small.toml"
    config.write_text("[queue]\nmax_requests = 40\n[batch]\nmax_num_seqs = 8\n")
    server = serve("--config", str(config), "--devices", "paced:2", workers=2)
    body = {"model": "tiny-tasks", "prompt": "repeat ox", "max_tokens": 40, "ignore_eos": True}
    answers = await asyncio.gather(*(streaming(server.url, body) for _ in range(180)))
    refused = [a for a in answers if a.status == 429]
    served = [a for a in answers if a.status == 200]
    assert len(refused) + len(served) == 180
    assert refused, "three times the capacity and nothing was refused"
    assert all(a.error["code"] == "queue_full" for a in refused)
    assert len(served) >= 40
    assert all(a.finish == ["length"] and a.done and a.error is None for a in served)
    assert (await settle(server))["workers"][0]["state"] == "ready"


async def test_R17_sigterm_finishes_the_streams_and_refuses_new_ones(
    serve: Any, streaming: Any, new_answer: Any
) -> None:
    server = serve("--devices", "paced:2", workers=2)
    body = {"model": "tiny-tasks", "prompt": "repeat ox", "max_tokens": 300, "ignore_eos": True}
    answers = [new_answer() for _ in range(8)]
    tasks = [asyncio.create_task(streaming(server.url, body, a)) for a in answers]
    await asyncio.gather(*(a.first_token.wait() for a in answers))
    server.note_processes()
    server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.2)
    late = await streaming(server.url, body)
    assert late.status == 503
    assert server.get("/ready")[0] == 503
    await asyncio.gather(*tasks)
    assert all(a.finish == ["length"] and a.done for a in answers)
    code = await asyncio.get_running_loop().run_in_executor(None, server.process.wait, 20)
    assert code == 0


async def test_R17_a_second_signal_is_immediate(
    serve: Any, streaming: Any, new_answer: Any
) -> None:
    server = serve("--devices", "paced:1", workers=1)
    body = {"model": "tiny-tasks", "prompt": "repeat ox", "max_tokens": 3000, "ignore_eos": True}
    answer = new_answer()
    task = asyncio.create_task(streaming(server.url, body, answer))
    await answer.first_token.wait()
    server.note_processes()
    server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.3)
    begun = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    await asyncio.get_running_loop().run_in_executor(None, server.process.wait, 10)
    assert time.monotonic() - begun < 5
    server.wait_gone(3)
    results = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(results[0], Exception) or results[0].error is not None
