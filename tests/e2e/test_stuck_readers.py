"""Clients that stop reading cannot grow the server's memory, nor hold up others (R15)."""

import asyncio
import json
import socket
import time
from contextlib import ExitStack
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.procs, pytest.mark.timeout(600)]

MIB = 1024**2
BUFFER = 64 * 1024
TOKENS = 1500
BODY = {
    "model": "tiny-tasks",
    "prompt": "red",
    "max_tokens": TOKENS,
    "ignore_eos": True,
    "logprobs": 20,
    "seed": 1,
    "stream": True,
}
"""An answer of about a mebibyte: many times the buffer."""
COUNTS = [30, pytest.param(300, marks=pytest.mark.slow)]


def stick(server: Any, body: dict[str, Any]) -> socket.socket:
    """Ask, and read nothing."""
    document = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(document)}\r\n\r\n"
    )
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.port))
    client.sendall(head.encode() + document)
    return client


def memory(server: Any) -> int:
    """Bytes of private memory of the server process."""
    return int(psutil.Process(server.process.pid).memory_full_info().uss)


async def read_all(session: Any, server: Any, body: dict[str, Any]) -> int:
    """A client that reads; how many bytes it got."""
    async with session.post(server.url + "/v1/completions", json=body) as reply:
        raw = await reply.read()
        assert raw.endswith(b"data: [DONE]\n\n")
        return len(raw)


async def read_tokens(session: Any, server: Any, body: dict[str, Any]) -> int:
    """A client that reads; how many tokens it got (in how many chunks is the server's business)."""
    async with session.post(server.url + "/v1/completions", json=body) as reply:
        lines = (await reply.read()).decode().split("\n\n")
    chunks = [
        json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")
    ]
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    return sum(len(choice["logprobs"]["tokens"]) for choice in choices)


async def until(condition: Any, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("count", COUNTS)
async def test_R15_stuck_readers_hold_no_more_than_their_buffers(serve, session, count):
    buffer = ("--set", f"server.max_stream_buffer_bytes={BUFFER}")
    server = serve("--devices", "paced:2", *buffer, workers=2)
    readers = (read_all(session, server, BODY) for _ in range(count))
    answer = min(await asyncio.gather(*readers))  # also brings the heap to its usual size
    assert answer > 8 * BUFFER
    before = peak = await asyncio.to_thread(memory, server)
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(stick(server, BODY))
        served = asyncio.create_task(read_tokens(session, server, BODY))

        def cut_off() -> int:
            return int(server.state()["totals"]["ended"].get("slow_reader", 0))

        while cut_off() < count:
            peak = max(peak, await asyncio.to_thread(memory, server))
            await asyncio.sleep(0.05)
        assert await served == TOKENS
    grown, without = peak - before, count * answer
    print(f"{count} stuck readers: grown by {grown / MIB:.1f} of {without / MIB:.1f} MiB unread")
    assert grown < count * 2 * BUFFER + 8 * MIB < without


async def test_R15_answers_that_nobody_collects_are_given_up_with_their_descriptors(serve, session):
    server = serve("--devices", "paced:1", "--set", "limits.stuck_seconds=1")
    process = psutil.Process(server.process.pid)
    await read_all(session, server, BODY)
    before = process.num_fds()
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(stick(server, BODY))
        await until(lambda: server.state()["totals"]["submitted"] == 21)
        assert await read_all(session, server, BODY)
        await until(lambda: process.num_fds() <= before + 2)  # of clients that are still there
