"""Sockets of the load generator: one exchange at a time each, kept alive, as many as are needed.

A `Pool` never makes a request wait for a free connection: that would close the loop. Whoever sends
gets an idle connection, the one used last, or a new one; its address is looked up once.
"""

import asyncio
import ssl
from collections.abc import Callable
from time import perf_counter
from typing import Protocol, cast
from urllib.parse import urlsplit

from appliance.bench.http import MAX_HEAD, BadResponse, ChunkedBody, Head, PlainBody, parse_head


class Receiver(Protocol):
    """Who an exchange is for. `over` or `failed` is called exactly once, and last."""

    def head(self, head: Head, now: float) -> None:
        """Status and headers are there."""

    def body(self, data: bytes, now: float) -> None:
        """A part of the body, never empty."""

    def over(self, now: float) -> None:
        """The response is complete."""

    def failed(self, kind: str, message: str) -> None:
        """It will not be: `kind` is one word."""


class Connection(asyncio.Protocol):
    """One socket. Times are those of `perf_counter` at the read, in seconds."""

    def __init__(
        self, idle: Callable[["Connection"], None], gone: Callable[["Connection"], None]
    ) -> None:
        """`idle` is called when the next exchange can begin, `gone` when the socket is closed."""
        self._idle = idle
        self._gone = gone
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._head: Head | None = None
        self._raw = b""
        self._body: ChunkedBody | PlainBody = PlainBody(0)
        self._began = False
        self.num_exchanges = 0
        """Begun on this socket so far."""
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass of it

    def connection_lost(self, exc: BaseException | None) -> None:
        """The socket is gone: fine for a body that ends so, and between exchanges."""
        self.closed = True
        self._gone(self)
        whole = isinstance(self._body, PlainBody) and self._body.ends_with_connection
        if self._receiver is None:
            return
        if self._head is not None and whole and exc is None:
            self._finish(perf_counter())
        elif self._began:
            self._fail("truncated", "the connection ended inside the response")
        else:
            self._fail("disconnected", f"closed without a response: {exc or 'end of stream'}")

    def begin(self, receiver: Receiver, request: bytes) -> None:
        """Send a whole request. Nothing else may be under way on this connection."""
        assert self._receiver is None
        self._receiver = receiver
        self._head, self._raw, self._began = None, b"", False
        self.num_exchanges += 1
        if self._transport is None or self.closed:
            self._fail("disconnected", "closed before the request was sent")
            return
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Bytes of the response."""
        now = perf_counter()
        receiver = self._receiver
        if receiver is None:
            self.abort()  # it speaks without being asked
            return
        self._began = True
        try:
            if self._head is None:
                data = self._take_head(data, receiver, now)
                if not data and not self._body.over:
                    return
            body = self._body
            payload = body.feed(data)
        except BadResponse as error:
            self._fail("protocol", str(error))
            self.abort()
            return
        if payload:
            receiver.body(payload, now)
        if body.over and self._receiver is not None:
            self._finish(now)

    def abort(self) -> None:
        """Close at once; whoever waits for a response is told."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()
        self._fail("aborted", "given up by the client")

    def _take_head(self, data: bytes, receiver: Receiver, now: float) -> bytes:
        """What follows the head, once that is complete; interim responses are skipped."""
        self._raw += data
        while True:
            raw, end, rest = self._raw.partition(b"\r\n\r\n")
            if not end:
                if len(self._raw) > MAX_HEAD:
                    raise BadResponse("a head that never ends")
                self._body = PlainBody(None)
                return b""
            head = parse_head(raw)
            self._raw = rest
            if head.status >= 200:
                break
        self._raw, self._head = b"", head
        self._body = ChunkedBody() if head.chunked else PlainBody(head.length)
        receiver.head(head, now)
        return rest

    def _finish(self, now: float) -> None:
        receiver, head, body = self._receiver, self._head, self._body
        self._receiver = None
        assert receiver is not None
        assert head is not None
        reusable = head.keep_alive and not body.rest and not self.closed
        if isinstance(body, PlainBody) and body.ends_with_connection:
            reusable = False
        if reusable:
            self._idle(self)
        elif self._transport is not None and not self.closed:
            self.closed = True
            self._transport.close()
        receiver.over(now)

    def _fail(self, kind: str, message: str) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.failed(kind, message)


class Pool:
    """Connections to one server."""

    def __init__(self, url: str) -> None:
        """`url`: scheme, host and port; a path is not looked at. Raises `ValueError`."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address like http://127.0.0.1:8000")
        self.url = url
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname
        self._port = parts.port or (443 if self._ssl else 80)
        self._address: str | None = None
        self._free: list[Connection] = []
        self._all: set[Connection] = set()

    async def get(self, *, fresh: bool = False) -> Connection:
        """A connection on which nothing is under way; `fresh`: a new one. Raises `OSError`."""
        idle = None if fresh else self.get_idle()
        return idle if idle is not None else await self._open()

    def get_idle(self) -> Connection | None:
        """The same without waiting: `None` where a new one is needed."""
        while self._free:
            connection = self._free.pop()
            if not connection.closed:
                return connection
        return None

    async def close(self) -> None:
        """Abort everything; the sockets are closed then."""
        self._free.clear()
        for connection in list(self._all):
            connection.abort()
        for _ in range(TURNS_TO_CLOSE):
            if not self._all:
                break
            await asyncio.sleep(0)
        self._all.clear()

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        if self._address is None:
            found = await loop.getaddrinfo(self._host, self._port, type=_STREAM)
            self._address = str(found[0][4][0])
        _, connection = await loop.create_connection(
            lambda: Connection(self._free.append, self._all.discard),
            self._address,
            self._port,
            ssl=self._ssl,
            server_hostname=self._host if self._ssl else None,
        )
        self._all.add(connection)
        return connection


TURNS_TO_CLOSE = 10
"""Of the event loop, at most: an aborted transport closes its socket in the next one or two."""
_STREAM = 1  # socket.SOCK_STREAM, without the module of everything else
