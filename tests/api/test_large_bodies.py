"""What takes long with a large body is done beside the event loop (R18), and has a bound (R15)."""

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from appliance.api.decode import LARGE_BODY_BYTES
from appliance.live.tokenise import TextService

pytestmark = pytest.mark.procs
T = TypeVar("T")
WORDS = "red green blue " * 40
TURNS = [{"role": "user", "content": WORDS}] * (LARGE_BODY_BYTES // len(WORDS) + 1)
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [5, 6] * 40_000, "max_tokens": 1},
    "/v1/chat/completions": {"messages": TURNS, "max_tokens": 1},
    "/v1/messages": {"messages": TURNS, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": TURNS},
    "/v1/responses": {"input": TURNS, "max_output_tokens": 1},
    "/tokenize": {"messages": TURNS},
    "/detokenize": {"tokens": [5, 6] * 40_000},
}


@pytest.mark.parametrize("path", BODIES)
async def test_r18_large_bodies_are_decoded_and_checked_beside_the_loop(
    server, http, path, monkeypatch
):
    real, sizes = TextService.run, []

    async def seen(self: TextService, work: Callable[[], T], *, num_bytes: int) -> T:
        sizes.append(num_bytes)
        return await real(self, work, num_bytes=num_bytes)

    monkeypatch.setattr(TextService, "run", seen)
    body = json.dumps({"model": "tiny", **BODIES[path]}).encode()
    headers = {"Content-Type": "application/json"}
    async with http.post(server.url + path, data=body, headers=headers) as answer:
        document = await answer.json()
    assert answer.status in (200, 400), document
    assert sizes.count(len(body)) == 2, sizes


async def test_r15_more_prompts_than_may_wait_are_429_that_says_when_to_come_back(server, http):
    text, gate = server.node.text, threading.Event()
    most = text._settings.max_pending_bytes
    headers = {"x-slo-class": "chat"}
    large = {"prompt": "red " * LARGE_BODY_BYTES, "max_tokens": 1, "n": 3, "slo": "default"}
    blocked = asyncio.run_coroutine_threadsafe(text.run(gate.wait, num_bytes=most), server._loop)
    try:
        for path, body in (
            ("/v1/completions", {"prompt": ["red", "blue"], "max_tokens": 1, "n": 2}),
            ("/v1/completions", large),
            ("/tokenize", {"prompt": "red"}),
            ("/v1/messages", {"messages": [{"role": "user", "content": "red"}], "max_tokens": 1}),
        ):
            asked = {"model": "tiny", **body}
            async with http.post(server.url + path, json=asked, headers=headers) as answer:
                document = await answer.json()
            assert answer.status == 429
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
            assert "limits.max_tokenising_bytes" in document["error"]["message"]
            if path != "/v1/messages":
                assert document["error"]["code"] == "queue_full"
    finally:
        gate.set()
        blocked.result(30)
    # what is too large to be decoded is known by its headers alone
    assert server.node.stats.refused == {("chat", "queue_full"): 4 + 1 + 1}
    assert server.node.stats.rejected == {"queue_full": 3}
    async with http.post(server.url + "/tokenize", json={"prompt": "red"}) as answer:
        assert answer.status == 200
