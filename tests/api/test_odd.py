"""Odd but legal requests, and those that a hasty client or an old proxy sends."""

import json
import socket
import threading
from typing import Any

import pytest

from appliance.api.context import Names

pytestmark = pytest.mark.procs

COMPLETIONS = "/v1/completions"
BODY: dict[str, Any] = {"model": "tiny", "prompt": "red", "max_tokens": 4, "ignore_eos": True}


async def test_r21_a_body_that_is_not_what_its_encoding_says_is_a_400(server, http):
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    async with http.post(server.url + COMPLETIONS, data=b"{}", headers=headers) as reply:
        assert reply.status == 400
        assert (await reply.json())["error"]["code"] == "invalid_json"


async def test_equal_prompts_without_a_seed_are_answered_independently(server, http):
    async def texts(**more: Any) -> list[str]:
        body = {**BODY, "prompt": ["red"] * 4, "temperature": 1, "max_tokens": 12, **more}
        async with http.post(server.url + COMPLETIONS, json=body) as reply:
            return [choice["text"] for choice in (await reply.json())["choices"]]

    assert len(set(await texts())) == 4
    assert len(set(await texts(seed=5))) == 1


def test_a_stream_to_http_1_0_ends_with_the_connection(server):
    body = json.dumps({**BODY, "stream": True}).encode()
    head = (
        f"POST {COMPLETIONS} HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head.encode() + body)
        received = b""
        while part := connection.recv(65536):
            received += part
    assert received.endswith(b"data: [DONE]\n\n")
    assert b"connection: keep-alive" not in received.lower()


async def test_min_tokens_is_kept_when_it_is_over_the_default_limit(server, http):
    body = {"model": "tiny", "prompt": "red", "min_tokens": 30, "seed": 1}
    async with http.post(server.url + COMPLETIONS, json=body) as reply:
        assert (await reply.json())["usage"]["completion_tokens"] == 30
    async with http.post(server.url + COMPLETIONS, json={**body, "min_tokens": 5000}) as reply:
        assert reply.status == 400
        error = (await reply.json())["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "min_tokens")


async def test_a_story_is_found_by_request_id_and_by_answer_id(server, http):
    body = {**BODY, "prompt": ["red", "green"], "n": 2}
    headers = {"x-request-id": "my-own-7"}
    async with http.post(server.url + COMPLETIONS, json=body, headers=headers) as reply:
        answer_id = (await reply.json())["id"]
    for name in ("my-own-7", answer_id):
        async with http.get(f"{server.url}/admin/requests/{name}") as reply:
            assert reply.status == 200
            story = await reply.json()
        assert story["name"] == name
        assert [each["events"][-1]["what"] for each in story["answers"]] == ["Ended"] * 4


def test_only_recent_names_are_kept():
    names = Names(limit=4)
    for index in range(10):
        names.note(f"req-{index}", [f"cmpl-{index}", f"cmpl-{index}-1"])
    assert names.of("req-9") == names.of("cmpl-9") == ("cmpl-9", "cmpl-9-1")
    assert names.of("req-0") == ("req-0",)


async def test_detokenizing_much_leaves_the_event_loop_alone(server, http):
    me: list[int] = []
    server.read(lambda node: me.append(threading.get_ident()))
    seen: list[int] = []
    text = server.node.text
    decode_batch = text._tokenizer.decode_batch

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def decode_batch(self, *args: Any, **more: Any) -> Any:
            seen.append(threading.get_ident())
            return decode_batch(*args, **more)

    tokenizer, text._tokenizer = text._tokenizer, Spy()
    try:
        async with http.post(server.url + "/detokenize", json={"tokens": [300] * 50}) as reply:
            assert (await reply.json())["prompt"] == tokenizer.decode([300] * 50)
    finally:
        text._tokenizer = tokenizer
    assert seen
    assert me[0] not in seen
