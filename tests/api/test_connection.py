"""What is not a request, never ends or comes too often: a typed answer, and nothing held (R15)."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from appliance.api.settings import ApiSettings, ConnectionLimits

pytestmark = pytest.mark.procs

COMPLETIONS = "/v1/completions"
BODY = {"model": "tiny", "prompt": "red", "max_tokens": 2, "ignore_eos": True}


@pytest.fixture(scope="module")
def small(module_server):
    """A server with small bounds."""
    limits = ConnectionLimits(
        max_line_bytes=2048,
        max_headers=20,
        receive_seconds=0.4,
        idle_seconds=0.4,
        stuck_seconds=1.0,
        max_receiving_bytes=300_000,
    )
    return module_server(ApiSettings(connections=limits, max_body_bytes=1_000_000), num_workers=1)


def head(length: int | str, *lines: str, path: str = COMPLETIONS) -> bytes:
    """The head of a POST."""
    fixed = ["Host: x", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([f"POST {path} HTTP/1.1", *fixed, *lines, "", ""]).encode()


@asynccontextmanager
async def connection(server: Any) -> AsyncIterator[tuple[asyncio.StreamReader, Any]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer(server: Any, raw: bytes) -> tuple[int, dict[str, str], bytes]:
    """What comes back for these bytes: status, headers, body."""
    async with connection(server) as (reader, writer), asyncio.timeout(30):
        writer.write(raw)
        status, headers, body = split(await reader.readuntil(b"\r\n\r\n"))
        return status, headers, body + await reader.readexactly(int(headers["content-length"]))


def split(raw: bytes) -> tuple[int, dict[str, str], bytes]:
    opening, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = opening.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return int(first.split()[1]), headers, body


def error_of(answered: tuple[int, dict[str, str], bytes]) -> dict[str, Any]:
    """The error object of an answer that ends its connection."""
    _, headers, body = answered
    assert headers["content-type"].startswith("application/json")
    assert headers["server"] == "appliance"
    assert headers["x-request-id"].startswith("req-")
    assert int(headers["content-length"]) == len(body)
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\x01 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET / HTTP/1.1\r\n: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\x00b\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
    ],
)
async def test_what_is_not_http_gets_an_error_object(small, raw):
    answered = await answer(small, raw)
    assert answered[0] == 400
    assert error_of(answered)["code"] == "invalid_http"


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 3000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a" * 3000 + b": b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"x%d: 1\r\n" % i for i in range(50)) + b"\r\n",
    ],
)
async def test_a_long_line_or_too_many_headers_is_431_that_names_the_limit(small, raw):
    answered = await answer(small, raw)
    assert answered[0] == 431
    error = error_of(answered)
    assert error["code"] == "header_too_large"
    assert "limits.max_" in error["message"]


async def test_an_expectation_that_nobody_can_meet_is_an_error_object(small):
    for path in (COMPLETIONS, "/nope"):
        raw = head(2, "Expect: miracles", "Connection: close", path=path) + b"{}"
        answered = await answer(small, raw)
        assert answered[0] == 417
        assert error_of(answered)["code"] == "bad_request"


async def test_100_continue_is_served(small):
    body = json.dumps(BODY).encode()
    async with connection(small) as (reader, writer):
        writer.write(head(len(body), "Expect: 100-continue", "Connection: close"))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(body)
        assert split(await reader.read())[0] == 200


@pytest.mark.parametrize(
    "begun",
    [
        head(100) + b'{"prompt": ',
        head("0").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"5\r\n{",
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions", "/tokenize", "/detokenize"])
async def test_a_body_that_never_ends_is_408(small, begun, path):
    answered = await answer(small, begun.replace(COMPLETIONS.encode(), path.encode()))
    assert answered[0] == 408
    assert answered[1]["connection"] == "close"
    error = error_of(answered)
    assert (error["code"], error["type"]) == ("request_timeout", "invalid_request_error")
    assert "limits.receive_seconds" in error["message"]


async def test_a_body_that_drips_is_408_too(small):
    async with connection(small) as (reader, writer):
        writer.write(head(1000))
        reply = asyncio.ensure_future(reader.readuntil(b"\r\n\r\n"))
        for _ in range(1000):
            writer.write(b" ")
            await asyncio.sleep(0.01)
            if reply.done():
                break
        assert (await reply).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n", b"PO"])
async def test_a_connection_without_a_whole_request_is_closed(small, begun):
    async with connection(small) as (reader, writer):
        writer.write(begun)
        assert await asyncio.wait_for(reader.read(), 20) == b""


async def test_an_idle_connection_is_closed_after_its_answer_and_not_before(small):
    async with connection(small) as (reader, writer):
        for _ in range(3):
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            await reader.readuntil(b"}")
            await asyncio.sleep(0.1)
        assert await asyncio.wait_for(reader.read(), 20) == b""


async def test_more_connections_than_allowed_are_turned_away_with_503(special_server):
    server = special_server(
        ApiSettings(connections=ConnectionLimits(max_connections=3)), num_workers=1
    )
    async with connection(server), connection(server), connection(server) as third:
        reader, writer = third
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        answered = await answer(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + b"x" * 1000)
        assert answered[0] == 503
        assert answered[1]["retry-after"] == "1"
        assert error_of(answered)["code"] == "too_many_connections"
    async with asyncio.timeout(20):
        while (await answer(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))[0] != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await until(lambda: server.num_connections <= 1)


async def test_large_bodies_together_are_bounded_and_small_ones_come_through(special_server, http):
    limits = ConnectionLimits(max_receiving_bytes=300_000)
    server = special_server(ApiSettings(connections=limits), num_workers=1)
    url = server.url + COMPLETIONS
    async with connection(server) as (_, writer), connection(server) as (_, other):
        for each in (writer, other):
            each.write(head(500_000) + b" " * 200_000)
            await each.drain()
        await asyncio.sleep(0.3)
        large = json.dumps(BODY).encode() + b" " * 300_000
        headers = {"Content-Type": "application/json"}
        async with http.post(url, data=large, headers=headers) as reply:
            assert reply.status == 503
            assert (await reply.json())["error"]["code"] == "overloaded"
            assert reply.headers["Retry-After"] == "1"
        for _ in range(3):
            async with http.post(url, json=BODY) as reply:
                assert reply.status == 200
    async with asyncio.timeout(20):
        while (status := await status_of(http, url, large)) == 503:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert status == 200


async def status_of(http: Any, url: str, data: bytes) -> int:
    async with http.post(url, data=data, headers={"Content-Type": "application/json"}) as reply:
        return int(reply.status)


async def test_a_client_that_takes_nothing_loses_its_connection(small, http):
    """The answer fits into the buffers and is complete: only time can end it."""
    before = small.read(lambda node: node.state())["totals"]["submitted"]
    document = json.dumps({**BODY, "max_tokens": 500, "logprobs": 20, "stream": True}).encode()
    stuck = socket.socket()
    stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stuck.connect(("127.0.0.1", small.port))
    stuck.sendall(head(len(document)) + document)
    await until(lambda: small.read(lambda node: node.state())["totals"]["submitted"] > before)
    await until(lambda: small.num_connections == 0)
    stuck.close()
    async with http.post(small.url + COMPLETIONS, json=BODY) as reply:
        assert reply.status == 200


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 (it becomes true in another thread)
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 1025}, "stop"),
        ({"n": 129}, "n"),
        ({"prompt": ["a"] * 129}, "prompt"),
    ],
)
async def test_too_much_of_something_names_it(small, http, fields, param):
    async with http.post(small.url + COMPLETIONS, json={**BODY, **fields}) as reply:
        assert reply.status == 400
        assert (await reply.json())["error"]["param"] == param


async def test_prompts_and_conversations_have_bounds_of_their_own(special_server, http):
    server = special_server(ApiSettings(max_prompt_tokens=5, max_messages=2), num_workers=1)
    async with http.post(server.url + COMPLETIONS, json={**BODY, "prompt": [5] * 6}) as reply:
        assert reply.status == 400
        error = (await reply.json())["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "limits.max_prompt_tokens" in error["message"]
    async with http.post(server.url + COMPLETIONS, json={**BODY, "prompt": [5] * 5}) as reply:
        assert reply.status == 200
    talk = {"model": "tiny", "messages": [{"role": "user", "content": "a"}] * 3}
    async with http.post(server.url + "/v1/chat/completions", json=talk) as reply:
        assert reply.status == 400
        error = (await reply.json())["error"]
    assert error["param"] == "messages"
    assert "limits.max_messages" in error["message"]
