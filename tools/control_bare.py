"""The yardstick of the control-plane benchmarks: aiohttp writing chunks to streams, no more.

    python -m tools.control_bare --port 8001 --rate 30 --chunk-bytes 210 --mode loop

`loop`: one task writes the same ready-made chunk to all open streams, `rate` times a second: the
least that a server on aiohttp can do. `handlers`: each stream has its own handler that sleeps until
its next chunk is due, as a proxy or a plain generator-style server does.
"""

import argparse
import asyncio
import time

import uvloop
from aiohttp import web

HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


class Bare:
    """Streams of equal chunks."""

    def __init__(self, *, rate: float, chunk: bytes) -> None:
        self._interval = 1.0 / rate
        self._chunk = chunk
        self._open: set[web.StreamResponse] = set()

    async def held(self, request: web.Request) -> web.StreamResponse:
        """A stream that the loop writes to, until the client goes."""
        await request.read()
        response = web.StreamResponse(headers=HEADERS)
        await response.prepare(request)
        self._open.add(response)
        try:
            await asyncio.Event().wait()
        finally:
            self._open.discard(response)
        return response

    async def own(self, request: web.Request) -> web.StreamResponse:
        """A stream whose handler writes."""
        await request.read()
        response = web.StreamResponse(headers=HEADERS)
        await response.prepare(request)
        due = time.monotonic()
        while True:
            await response.write(self._chunk)
            due += self._interval
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def loop(self) -> None:
        """Write to all, again and again."""
        due = time.monotonic()
        while True:
            for response in list(self._open):
                await response.write(self._chunk)
            due += self._interval
            await asyncio.sleep(max(0.0, due - time.monotonic()))


async def serve(*, port: int, mode: str, bare: Bare) -> None:
    """Serve until killed."""
    app = web.Application()
    handler = bare.held if mode == "loop" else bare.own
    app.add_routes([web.post("/v1/completions", handler)])
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    if mode == "loop":
        await bare.loop()
    await asyncio.Event().wait()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--chunk-bytes", type=int, required=True)
    parser.add_argument("--mode", choices=("loop", "handlers"), required=True)
    options = parser.parse_args()
    head, tail = b"data: {", b"}\n\n"
    framing = len(b"%x\r\n\r\n" % options.chunk_bytes)
    filling = b"x" * (options.chunk_bytes - framing - len(head) - len(tail))
    bare = Bare(rate=options.rate, chunk=head + filling + tail)
    uvloop.run(serve(port=options.port, mode=options.mode, bare=bare))


if __name__ == "__main__":
    main()
