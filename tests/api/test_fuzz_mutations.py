"""Valid requests with something wrong, on every POST route: an answer or a typed error (R1)."""

import http.client
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from appliance.api.settings import ApiSettings, ConnectionLimits
from tests.api.mutations import ADMIN_SEEDS, REQUESTS, SEEDS

pytestmark = [pytest.mark.procs, pytest.mark.timeout(3600)]

REFUSALS = {400, 404, 413, 415, 431}
SIZES = [60, pytest.param(3000, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def server(module_server, scripted_dir):
    """A server on which even what is accepted is soon over; its template knows tools."""
    live = module_server(
        ApiSettings(
            max_sequences=4,
            max_body_bytes=200_000,
            connections=ConnectionLimits(idle_seconds=0.2, receive_seconds=0.2),
            cors_origins=("https://chat.example",),
        ),
        model_dir=scripted_dir,
        max_model_len=600,
    )
    form = {"prompt": "red", "max_tokens": 4, "guided_regex": "a+"}
    assert post(live, "/v1/completions", json.dumps(form).encode(), {})[0] == 200  # starts the desk
    return live


def fuzz(strategy: Any, check: Callable[[Any], None], *, examples: int) -> None:
    """Check so many examples."""
    phases = [phase for phase in Phase if phase is not Phase.explain]
    routine = settings(
        max_examples=examples,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    routine(given(strategy)(check))()


def post(server: Any, path: str, raw: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("POST", path, raw, {"Content-Type": "application/json", **headers})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def check_error(raw: bytes) -> None:
    """One of the two error documents there are."""
    document = json.loads(raw)
    error = document["error"]
    assert set(document) in ({"error"}, {"type", "error", "request_id"})
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["message"]
    assert error["code"]


def check_healthy(server: Any) -> None:
    """Nothing goes on, nothing is held, and the next request is served."""
    end = time.monotonic() + 30
    while True:
        state = server.read(lambda node: node.state())
        free = all(w["blocks"]["free"] == w["blocks"]["total"] for w in state["workers"])
        if free and not state["totals"]["live"]:
            break
        assert time.monotonic() < end, state
        time.sleep(0.05)
    assert state["totals"]["sequences"] == sum(state["totals"]["ended"].values())
    assert not {"internal_error", "worker_lost", "poison_request"} & set(state["totals"]["ended"])
    assert [worker["state"] for worker in state["workers"]] == ["ready", "ready"]
    body = json.dumps({"prompt": "red", "max_tokens": 2}).encode()
    assert post(server, "/v1/completions", body, {})[0] == 200


def test_every_post_route_is_fuzzed(server):
    posts = {
        route.resource.canonical for route in server.app.router.routes() if route.method == "POST"
    }
    assert posts <= set(SEEDS) | set(ADMIN_SEEDS)  # those of operators: test_fuzz_operate


@pytest.mark.parametrize("path", sorted(SEEDS))
def test_what_is_spoilt_was_served_before(server, path):
    known = {route.resource.canonical for route in server.app.router.routes()}
    for seed in SEEDS[path]:
        status, raw = post(server, path, json.dumps(seed).encode(), {})
        expected = 404 if path not in known or path.endswith("embeddings") else 200
        assert status == expected, raw


@pytest.mark.parametrize("examples", SIZES)
def test_a_spoilt_body_gets_an_answer_or_a_typed_error(server, examples):
    def check(request: tuple[str, Any, dict[str, str]]) -> None:
        path, body, headers = request
        status, raw = post(server, path, json.dumps(body).encode(), headers)
        event(f"{path} {status}")
        assert status == 200 or status in REFUSALS, (status, raw)
        if status != 200:
            check_error(raw)
        elif not raw.startswith((b"data: ", b"event: ")):
            assert isinstance(json.loads(raw), dict)

    fuzz(REQUESTS, check, examples=examples)
    check_healthy(server)


PLAIN = [
    f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(json.dumps(seed))}\r\n\r\n{json.dumps(seed)}".encode()
    for path, seeds in SEEDS.items()
    for seed in seeds
]
CHUNKED = (
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'10\r\n{"prompt": "red"\r\n1\r\n}\r\n0\r\n\r\n'
)
PIECES = st.binary(max_size=6) | st.sampled_from(
    [
        b"\r\n",
        b"\r\n\r\n",
        b"\x00",
        b":",
        b" ",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\n",
        b"Expect: 100-continue\r\n",
        b"Expect: x\r\n",
        b"Upgrade: websocket\r\nConnection: upgrade\r\n",
        b"Content-Encoding: gzip\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"x" * 9000,
        b"y: z\r\n" * 200,
    ]
)
CHANGES = st.lists(
    st.tuples(st.integers(min_value=0, max_value=10_000), st.integers(0, 20), PIECES),
    min_size=1,
    max_size=3,
)


def spoil(raw: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    """Replace pieces of `raw` by others."""
    for where, length, piece in changes:
        start = where % (len(raw) + 1)
        raw = raw[:start] + piece + raw[start + length :]
    return raw


def exchange(server: Any, raw: bytes) -> bytes:
    """All that comes back until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        answer = b""
        try:
            client.sendall(raw)
            while piece := client.recv(65536):
                answer += piece
        except ConnectionError:
            pass  # closed while we were still sending
        return answer


def check_answers(raw: bytes) -> None:
    """Each of the answers is complete and none says that the server is broken."""
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, *_ = first.split(" ")
        assert version in ("HTTP/1.1", "HTTP/1.0", "HTTP/0.9")
        event(f"status {status}")
        assert int(status) < 500, raw
        headers = dict(line.lower().split(": ", 1) for line in lines)
        length = int(headers.get("content-length", 0))
        body, raw = raw[:length], raw[length:]
        if "chunked" in headers.get("transfer-encoding", "") or "x-accel-buffering" in headers:
            return  # a stream: looked at elsewhere
        if int(status) >= 400 and body:
            check_error(body)


@pytest.mark.parametrize("examples", SIZES)
def test_spoilt_http_gets_an_answer_or_a_typed_error_or_nothing(server, examples):
    def check(request: tuple[bytes, list[tuple[int, int, bytes]]]) -> None:
        raw, changes = request
        check_answers(exchange(server, spoil(raw, changes)))

    fuzz(st.tuples(st.sampled_from([*PLAIN, CHUNKED]), CHANGES), check, examples=examples)
    check_healthy(server)
