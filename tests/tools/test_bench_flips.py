"""The benchmark of flips notices answers that are lost, doubled or cut (R1, R9)."""

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tools.bench_flips import Flip, Seen, ask, bad, body_of, streams, summary

CHUNK = b'data: {"choices": [{"index": 0, "text": "a", "finish_reason": null}]}\n\n'
LAST = b'data: {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}\n\n'
DONE = b"data: [DONE]\n\n"


def usage(tokens: int) -> bytes:
    return b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\n' % tokens


@asynccontextmanager
async def serving(events: Sequence[bytes]) -> AsyncIterator[str]:
    """A server that answers everything with these events."""

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for event in events:
            await response.write(event)
        return response

    app = web.Application()
    app.add_routes([web.post("/v1/completions", handle)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield "http://{}:{}".format(*runner.addresses[0])
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("events", "counted"),
    [
        ((CHUNK, LAST, usage(1), DONE), {}),
        ((CHUNK,), {"lost": 1}),
        ((CHUNK, LAST), {"lost": 1}),
        ((CHUNK, LAST, LAST, DONE), {"ended twice": 1}),
        ((CHUNK, LAST, usage(2), DONE), {"wrong number of tokens": 1}),
        ((CHUNK, b'data: {"error": {"code": "worker_lost"}}\n\n'), {"error worker_lost": 1}),
    ],
)
async def test_R1_every_answer_is_judged(events: Any, counted: dict[str, int]) -> None:
    seen = Seen()
    async with serving(events) as url, aiohttp.ClientSession() as session:
        await ask(session, url, {**body_of(1, fresh=None), "max_tokens": 1}, seen)
    assert dict(seen.counts) == counted


def flip(outcome: str, milliseconds: float) -> Flip:
    return Flip(
        mode="migrate",
        way="D->P",
        outcome=outcome,
        client_ms=milliseconds,
        server_ms=milliseconds / 2,
        migrated=3,
    )


def test_what_must_not_happen_is_named() -> None:
    seen = Seen()
    seen.counts.update({"answers": 4, "compared": 2, "different": 0, "migration done": 3})
    flips = [flip("done", 4.0), flip("done", 10.0)]
    result = {
        "flips": [summary(flips, "migrate", "D->P")],
        "streams": {"migrate": streams(seen)},
    }
    assert bad(result) == []
    assert result["flips"][0]["client_ms"] == {"median": 10.0, "p99": 10.0, "max": 10.0}
    seen.counts["different"] += 1
    flips.append(flip("rolled_back", 5.0))
    result = {
        "flips": [summary(flips, "migrate", "D->P")],
        "streams": {"migrate": streams(seen)},
    }
    words = bad(result)
    assert words[0] == "migrate: 1 different"
    assert words[1].startswith("migrate D->P: ")


def test_requests_of_a_group_share_their_beginning() -> None:
    one, other = body_of(3, fresh=None), body_of(15, fresh=7)
    assert one["prompt"][:768] == other["prompt"][:768]
    assert Counter(map(len, (one["prompt"], other["prompt"]))) == {864: 2}
    assert body_of(3, fresh=None) == one
