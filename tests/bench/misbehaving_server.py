"""A small server that can misbehave in one way at a time, by the class of the request."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

CHUNK = {"choices": [{"index": 0, "text": "a", "finish_reason": None}]}


class Stub:
    """Answers completions at once. `ways`: how it treats requests of a class."""

    def __init__(
        self,
        ways: Mapping[str, str] | None = None,
        *,
        takes: tuple[str, ...] = ("ids", "text", "chat"),
        classes: tuple[str, ...] | None = None,
        max_model_len: int | None = 2048,
        model: str = "stub",
        cost: Iterable[float] = (),
    ) -> None:
        """`takes`: kinds of prompts; `classes`: those it knows (None: all); `cost`: the
        instance-seconds that /metrics says, time after time (after that it is not found)."""
        self.ways = dict(ways or {})
        self.takes = takes
        self.classes = classes
        self.max_model_len = max_model_len
        self.model = model
        self.cost = iter(cost)
        self.bodies: list[dict[str, Any]] = []
        self.connections: set[int] = set()
        self.url = ""
        self.never = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Stub"]:
        """Serve on a free port."""
        app = web.Application(client_max_size=1 << 24)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            self.never.set()
            await runner.cleanup()

    async def _models(self, _: web.Request) -> web.Response:
        card: dict[str, Any] = {"id": self.model}
        if self.max_model_len is not None:
            card["max_model_len"] = self.max_model_len
        return web.json_response({"object": "list", "data": [card]})

    async def _metrics(self, _: web.Request) -> web.Response:
        cost = next(self.cost, None)
        if cost is None:
            raise web.HTTPNotFound
        return web.Response(text=f"appliance_instance_seconds_total {cost}\n")

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.connections.add(id(request.transport))
        slo = body.get("slo") or {}
        kind = (
            "chat" if "messages" in body else "ids" if isinstance(body["prompt"], list) else "text"
        )
        if kind not in self.takes:
            return web.json_response({"error": {"message": f"no {kind}"}}, status=400)
        if self.classes is not None and slo.get("class", "") not in ("", *self.classes):
            return web.json_response({"error": {"message": "which class?"}}, status=400)
        return await self._treat(request, body, self.ways.get(slo.get("class", ""), ""))

    async def _treat(
        self, request: web.Request, body: Mapping[str, Any], way: str
    ) -> web.StreamResponse:
        probing = body["max_tokens"] == 2
        match "" if probing else way:
            case "429":
                error = {"error": {"code": "overloaded", "message": "later"}}
                return web.json_response(error, status=429, headers={"retry-after": "1"})
            case "never":
                await self.never.wait()
            case "slow headers":
                await asyncio.sleep(0.3)
            case "500":
                return web.Response(status=500, text="it broke")
        return await self._stream(request, body, way="" if probing else way)

    async def _stream(
        self, request: web.Request, body: Mapping[str, Any], *, way: str
    ) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        reply.enable_chunked_encoding()
        await reply.prepare(request)
        number = body["max_tokens"]
        for place in range(number):
            if way == "truncated" and place == 2:
                assert request.transport is not None
                request.transport.abort()
                return reply
            if way == "error event" and place == 2:
                await reply.write(b'data: {"error": {"code": "worker_lost", "message": "x"}}\n\n')
                return reply
            await reply.write(b"data: " + json.dumps(CHUNK).encode() + b"\n\n")
        words = len(str(body.get("prompt", "")).split()) * 2 + 5
        last = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}
        usage = {"choices": [], "usage": {"completion_tokens": number, "prompt_tokens": words}}
        for document in (last, usage):
            await reply.write(b"data: " + json.dumps(document).encode() + b"\n\n")
        await reply.write(b"data: [DONE]\n\n")
        await reply.write_eof()
        return reply
