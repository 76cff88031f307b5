"""What goes over the wire: bytes of a stream, statuses, headers, malformed requests."""

import asyncio
import http.client
import io
import json
import logging
import re
import socket
from typing import Any

import pytest

from appliance.core.types import Slo
from appliance.live.records import Submission

pytestmark = pytest.mark.procs

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
BODY = {"model": "tiny", "prompt": "red", "max_tokens": 4, "ignore_eos": True}
TALK = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "red"}],
    "max_tokens": 4,
    "ignore_eos": True,
}


async def error_of(reply: Any) -> dict[str, Any]:
    """The error object of a reply, whose shape is checked."""
    assert reply.content_type == "application/json"
    document = await reply.json()
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert document["error"]["message"]
    return document["error"]


async def test_a_stream_byte_for_byte(server, http):
    async with http.post(server.url + CHAT, json={**TALK, "stream": True, "seed": 1}) as reply:
        raw = await reply.read()
        assert reply.status == 200
        assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert reply.headers["Cache-Control"] == "no-cache"
    events = raw.split(b"\n\n")
    assert events.pop() == b""
    assert all(event.startswith(b"data: ") and b"\n" not in event for event in events)
    assert events.pop() == b"data: [DONE]"
    chunks = [json.loads(event[6:]) for event in events]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert all(set(delta) == {"content"} for delta in deltas[1:-1])
    ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert ends == [None] * (len(ends) - 1) + ["length"]


async def test_a_connection_serves_on_after_a_stream(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    headers = {"Content-Type": "application/json"}
    local = None
    for _ in range(3):
        for stream in (True, False):
            body = json.dumps({**BODY, "stream": stream})
            await asyncio.to_thread(connection.request, "POST", COMPLETIONS, body, headers)
            reply = connection.getresponse()
            raw = reply.read()
            assert reply.status == 200
            assert raw.endswith(b"data: [DONE]\n\n") is stream
            local = local or connection.sock.getsockname()
            assert connection.sock.getsockname() == local
    connection.close()


async def test_http_1_0_gets_a_stream_without_chunks(server):
    body = json.dumps({**BODY, "stream": True}).encode()
    head = (
        f"POST {COMPLETIONS} HTTP/1.0\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head.encode() + body)
    raw = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    head_raw, _, content = raw.partition(b"\r\n\r\n")
    assert b"chunked" not in head_raw
    assert content.startswith(b"data: {")
    assert content.endswith(b"data: [DONE]\n\n")


async def test_r21_ignored_fields_are_named_in_a_header(server, http):
    for stream in (False, True):
        body = {**BODY, "best_before": 1, "x y": 2, "echo": False, "stream": stream}
        async with http.post(server.url + COMPLETIONS, json=body) as reply:
            await reply.read()
            assert reply.status == 200
            assert reply.headers["x-appliance-ignored"] == "best_before,?"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1:2.3_X", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False)],
)
async def test_a_sane_request_id_is_echoed(server, http, given, kept):
    for path, body in ((COMPLETIONS, {**BODY, "stream": True}), (COMPLETIONS, {}), ("/nope", {})):
        headers = {"x-request-id": given}
        async with http.post(server.url + path, json=body, headers=headers) as reply:
            await reply.read()
            answer = reply.headers["x-request-id"]
            assert (answer == given) is kept
            assert kept or re.fullmatch(r"req-[0-9a-f]{24}", answer)


async def test_targets_in_headers_and_body_are_carried(server, http, monkeypatch):
    submitted = []
    submit = server.node.submit

    def noting(spec: Submission, sinks: Any) -> Any:
        submitted.append(spec)
        return submit(spec, sinks)

    monkeypatch.setattr(server.node, "submit", noting)
    headers = {"x-slo-ttft-ms": "250", "x-slo-class": "chat"}
    body = {**BODY, "tpot_slo_ms": 20}
    async with http.post(server.url + COMPLETIONS, json=body, headers=headers) as reply:
        assert reply.status == 200
    (spec,) = submitted
    assert spec.slo == Slo(class_name="chat", ttft=0.25, tpot=0.02)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "no_embedding_model"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("PUT", COMPLETIONS, 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/tiny", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/admin/requests/none", 404, "request_not_found"),
    ],
)
async def test_wrong_places_get_an_error_object(server, http, method, path, status, code):
    async with http.request(method, server.url + path) as reply:
        assert reply.status == status
        assert (await error_of(reply))["code"] == code
        assert ("Allow" in reply.headers) is (status == 405)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b'{"a":NaN}', b'{"a":1,"a":2}', b"\xff", b"[" * 100_000],
)
async def test_malformed_bodies_get_an_error_object(server, http, path, raw):
    headers = {"Content-Type": "application/json"}
    async with http.post(server.url + path, data=raw, headers=headers) as reply:
        assert reply.status == 400
        error = await error_of(reply)
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded"])
async def test_a_body_that_is_not_declared_as_json_is_refused(server, http, media):
    headers = {"Content-Type": media}
    body = json.dumps(BODY).encode()
    async with http.post(server.url + COMPLETIONS, data=body, headers=headers) as reply:
        assert reply.status == 415
        assert "application/json" in (await error_of(reply))["message"]


async def test_a_huge_body_is_refused(server, http):
    headers = {"Content-Type": "application/json"}
    big = b'{"prompt":"' + b"x" * (9 * 1024 * 1024) + b'"}'

    async def pieces():
        for begin in range(0, len(big), 65536):
            yield big[begin : begin + 65536]

    for data in (io.BytesIO(big), pieces()):
        async with http.post(server.url + COMPLETIONS, data=data, headers=headers) as reply:
            assert reply.status == 413
            assert (await error_of(reply))["code"] == "request_too_large"


async def test_state_shows_workers_and_blocks(server, http):
    async with http.get(server.url + "/admin/state") as reply:
        state = await reply.json()
    assert [worker["state"] for worker in state["workers"]] == ["ready", "ready"]
    for worker in state["workers"]:
        assert {"id", "device", "role", "pid", "tokens", "queued", "running"} <= set(worker)
        blocks = worker["blocks"]
        assert blocks["free"] + blocks["held"] + blocks["leased"] == blocks["total"]


async def test_the_story_of_a_request_can_be_asked_for(server, http):
    async with http.post(server.url + COMPLETIONS, json=BODY) as reply:
        name = (await reply.json())["id"]
    async with http.get(f"{server.url}/admin/requests/{name}") as reply:
        assert reply.status == 200
        assert (await reply.json())["name"] == name


async def test_health_ready_and_version(server, http):
    for path, key, value in (
        ("/health", "status", "ok"),
        ("/ready", "status", "ready"),
        ("/version", "version", "0.0.test"),
    ):
        async with http.get(server.url + path) as reply:
            assert reply.status == 200
            assert (await reply.json())[key] == value
        async with http.head(server.url + path) as reply:
            assert reply.status == 200
            assert await reply.read() == b""


async def test_a_bug_is_a_typed_error_and_logged_with_its_request(
    server, http, monkeypatch, caplog
):
    def broken() -> dict[str, Any]:
        raise RuntimeError("a bug for this test")

    monkeypatch.setattr(server.node, "state", broken)
    headers = {"x-request-id": "find-me"}
    with caplog.at_level(logging.ERROR, logger="appliance.api"):
        async with http.get(server.url + "/admin/state", headers=headers) as reply:
            assert reply.status == 500
            error = await error_of(reply)
    assert (error["code"], error["type"]) == ("internal_error", "server_error")
    assert "find-me" in error["message"]
    (record,) = caplog.records
    assert record.request_id == "find-me"
    assert record.exc_info is not None


async def test_logs_name_the_request_and_never_the_prompt(server, http, caplog):
    body = {**BODY, "prompt": "secretwordinprompt"}
    with caplog.at_level(logging.DEBUG, logger="appliance"):
        headers = {"x-request-id": "log-me"}
        async with http.post(server.url + COMPLETIONS, json=body, headers=headers) as reply:
            await reply.read()
        bad = {**body, "messages": [{"role": "secretwordinprompt", "content": "x"}]}
        async with http.post(server.url + CHAT, json=bad) as reply:
            await reply.read()
    said = [(record.getMessage(), record.__dict__) for record in caplog.records]
    assert any(fields.get("request_id") == "log-me" for _, fields in said)
    assert "secretwordinprompt" not in repr(said)


async def test_garbage_on_the_socket_does_not_harm(server, http):
    for garbage in (
        b"\0\1\2\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
            raw.sendall(garbage)
            raw.shutdown(socket.SHUT_WR)
            await asyncio.to_thread(raw.recv, 65536)
    async with http.post(server.url + COMPLETIONS, json=BODY) as reply:
        assert reply.status == 200
