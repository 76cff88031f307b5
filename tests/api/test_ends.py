"""Clients that leave, that do not read, that come too many or too late (R1, R3, R15, R16, R17)."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from typing import Any

import aiohttp
import openai
import pytest

from appliance.api.settings import ApiSettings
from appliance.core.faults import FaultRule

pytestmark = pytest.mark.procs

COMPLETIONS = "/v1/completions"


def body(tokens: int = 400, **more: Any) -> dict[str, Any]:
    return {"prompt": "red", "max_tokens": tokens, "ignore_eos": True, "seed": 1, **more}


def slow_steps(seconds: float) -> tuple[FaultRule, ...]:
    """Every step of every worker takes this much longer."""
    rule = FaultRule(point="worker.before_step", action="delay", repeat=True, seconds=seconds)
    return (rule,)


async def until(condition: Any, seconds: float = 20) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(seconds):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


def state_of(server: Any) -> dict[str, Any]:
    return server.read(lambda node: node.state())


async def settled(server: Any) -> dict[str, Any]:
    """The state once nothing lives and every block is free again."""

    def free() -> bool:
        state = state_of(server)
        return not state["totals"]["live"] and all(
            worker["blocks"]["free"] == worker["blocks"]["total"] for worker in state["workers"]
        )

    await until(free)
    return state_of(server)


async def begin(http: aiohttp.ClientSession, server: Any, document: dict[str, Any]) -> Any:
    """A streaming request whose headers have come."""
    return await http.post(server.url + COMPLETIONS, json={**document, "stream": True})


@pytest.mark.parametrize("stream", [True, False])
async def test_r3_a_client_that_leaves_while_decoding_frees_everything(server, stream):
    cancelled = state_of(server)["totals"]["ended"].get("cancelled", 0)
    async with aiohttp.ClientSession() as http:
        task = asyncio.create_task(
            http.post(server.url + COMPLETIONS, json=body(1500, n=2, stream=stream))
        )
        await until(lambda: any(worker["running"] for worker in state_of(server)["workers"]))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await task).close()
    state = await settled(server)
    assert state["totals"]["ended"]["cancelled"] == cancelled + 2


async def test_r3_a_client_that_leaves_in_the_queue_is_gone_at_once(special_server, http):
    server = special_server(
        num_workers=1,
        batcher={"max_num_seqs": 1},
        dispatcher={"queue_ahead": 0},
        faults=slow_steps(0.05),
    )
    first = await begin(http, server, body())
    await until(lambda: state_of(server)["workers"][0]["running"] == 1)
    second = asyncio.create_task(http.post(server.url + COMPLETIONS, json=body()))
    third = await begin(http, server, body())
    await until(lambda: state_of(server)["queue"]["waiting"] == 2)
    second.cancel()
    third.close()
    await until(lambda: state_of(server)["queue"]["waiting"] == 0)
    state = state_of(server)
    assert state["totals"]["live"] == 1
    assert state["totals"]["ended"] == {"cancelled": 2}
    first.close()
    await settled(server)


async def test_r3_a_client_that_leaves_while_tokenising_is_never_submitted(special_server):
    server = special_server(num_workers=1)
    pool = server.node.text._pool
    for _ in range(2):
        pool.submit(time.sleep, 0.7)
    async with aiohttp.ClientSession() as http:
        document = {"messages": [{"role": "user", "content": "hi " * 500}]}
        with pytest.raises(TimeoutError):
            await http.post(
                server.url + "/v1/chat/completions",
                json=document,
                timeout=aiohttp.ClientTimeout(total=0.2),
            )
    await asyncio.sleep(0.7)
    assert state_of(server)["totals"]["submitted"] == 0


async def test_r15_a_reader_that_does_not_read_is_cut_off_and_others_go_on(
    special_server, http, caplog
):
    caplog.set_level("INFO")
    api = ApiSettings(max_stream_buffer_bytes=64 * 1024)
    server = special_server(api, num_workers=1, send_buffer=4096)
    document = json.dumps(body(1500, n=2, logprobs=20, stream=True)).encode()
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(document)}\r\n\r\n"
    )
    stuck = socket.socket()
    stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stuck.connect(("127.0.0.1", server.port))
    stuck.sendall(head.encode() + document)
    async with await begin(http, server, body(100)) as other:
        text = await other.text()
    assert text.endswith("data: [DONE]\n\n")
    await until(lambda: state_of(server)["totals"]["ended"].get("slow_reader") == 2, 60)
    stuck.close()
    await settled(server)
    outcomes = sorted(r.outcome for r in caplog.records if hasattr(r, "outcome"))
    assert outcomes == ["completed", "slow_reader"]


async def test_r16_a_full_queue_is_429_with_retry_after(special_server, http):
    server = special_server(
        num_workers=1,
        batcher={"max_num_seqs": 1},
        dispatcher={"queue_ahead": 0, "max_queue": 1},
        faults=slow_steps(0.05),
    )
    running = await begin(http, server, body())
    await until(lambda: state_of(server)["workers"][0]["running"] == 1)
    waiting = await begin(http, server, body())
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0
    ) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(model="tiny", prompt="x", stream=True)
        assert (caught.value.code, caught.value.type) == ("queue_full", "rate_limit_error")
        assert int(caught.value.response.headers["Retry-After"]) >= 1
    # of several prompts all are taken or none
    async with http.post(server.url + COMPLETIONS, json=body(prompt=["a", "b"])) as reply:
        assert reply.status == 429
    await until(lambda: state_of(server)["totals"]["live"] == 2)
    running.close()
    waiting.close()
    await settled(server)


async def test_r17_a_draining_server_finishes_what_it_has_and_takes_no_more(special_server, http):
    server = special_server(num_workers=1, faults=slow_steps(0.02))
    kept = await begin(http, server, body(40))
    drain = asyncio.create_task(asyncio.to_thread(lambda: server.call(server.node.drain(20))))
    await until(lambda: state_of(server)["draining"])
    async with http.post(server.url + COMPLETIONS, json=body()) as reply:
        assert reply.status == 503
        assert int(reply.headers["Retry-After"]) >= 1
        assert (await reply.json())["error"]["code"] == "draining"
    async with http.get(server.url + "/ready") as reply:
        assert reply.status == 503
        assert (await reply.json())["reason"]
    async with http.get(server.url + "/health") as reply:
        assert reply.status == 200
    assert (await kept.text()).endswith("data: [DONE]\n\n")
    assert await drain is True


async def test_r1_an_end_in_mid_stream_is_an_error_that_the_official_client_raises(
    special_server, http
):
    server = special_server(num_workers=1, faults=slow_steps(0.02))
    in_one_piece = asyncio.create_task(http.post(server.url + COMPLETIONS, json=body()))
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0
    ) as client:
        stream = await client.completions.create(
            model="tiny", prompt="x", stream=True, max_tokens=400, extra_body={"ignore_eos": True}
        )
        pieces = []
        with pytest.raises(openai.APIError) as caught:  # noqa: PT012 (the stream is the statement)
            async for chunk in stream:
                pieces.append(chunk)
                if len(pieces) == 2:
                    await asyncio.to_thread(lambda: server.call(server.node.drain(0.0)))
    assert len(pieces) >= 2
    assert caught.value.code == "drain_timeout"
    reply = await in_one_piece
    assert reply.status == 503
    assert (await reply.json())["error"]["code"] == "drain_timeout"


async def test_no_worker_is_503_and_health_says_why_until_an_operator_restarts_it(
    special_server, http
):
    server = special_server(num_workers=1, dispatcher={"quarantine_deaths": 1})
    os.kill(state_of(server)["workers"][0]["pid"], signal.SIGKILL)
    await until(lambda: state_of(server)["workers"][0]["state"] == "quarantined")
    async with http.post(server.url + COMPLETIONS, json=body(4)) as reply:
        assert reply.status == 503
        assert (await reply.json())["error"]["code"] == "no_worker"
        assert "Retry-After" in reply.headers
    for path in ("/ready", "/health"):
        async with http.get(server.url + path) as reply:
            assert reply.status == 503
            assert (await reply.json())["reason"]
    restart = server.url + "/admin/workers/0/restart"
    async with http.post(restart) as reply:
        assert (reply.status, (await reply.json())["outcome"]) == (200, "done")
    async with http.post(server.url + COMPLETIONS, json=body(4)) as reply:
        assert reply.status == 200
    async with http.post(restart) as reply:
        assert reply.status == 409
        error = (await reply.json())["error"]
    assert error["code"] == "not_quarantined"
    assert "is ready" in error["message"]


async def test_r5_a_killed_worker_costs_a_stream_nothing(special_server, http):
    server = special_server(num_workers=2, faults=slow_steps(0.01))
    async with await begin(http, server, body(30)) as undisturbed:
        expected = await undisturbed.text()
    stream = await begin(http, server, body(30))
    line = await stream.content.readline()
    victim = next(worker for worker in state_of(server)["workers"] if worker["running"])
    os.kill(victim["pid"], signal.SIGKILL)
    disturbed = (line + await stream.read()).decode()
    assert texts(disturbed) == texts(expected)
    assert disturbed.endswith("data: [DONE]\n\n")


def texts(raw: str) -> str:
    """The text of a stream."""
    events = [line[6:] for line in raw.split("\n\n") if line.startswith("data: {")]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)
