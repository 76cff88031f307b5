"""One connection: what holds before there is a request, or when there is none.

What is not HTTP, or has a line or headers that are too long, never reaches a route; it gets an
error object like everything else. Connections over `max_connections` get a 503 and are closed.

What a client may hold without giving anything is bounded in bytes and in seconds:

* an idle connection, or one whose headers never end, is closed after `idle_seconds`;
* a client that takes nothing for `stuck_seconds` loses its connection: the kernel keeps that time
  (TCP_USER_TIMEOUT, which counts from the last moment the client's window was open);
* the kernel keeps little that is not yet sent (TCP_NOTSENT_LOWAT), so what a reader leaves unread
  is seen in the transport's buffer, where a stream has its bound.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.web_protocol import RequestHandler

from appliance.api.context import new_id
from appliance.api.errors import ApiError, shown
from appliance.api.settings import ConnectionLimits

logger = logging.getLogger(__name__)

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

UNSENT_BYTES = 64 * 1024
"""What the kernel may hold of one connection beyond what is on its way."""
LINGER_SECONDS = 2.0
"""For which the rest of a body is read and dropped after an answer that did not wait for it, so
that a client which is still sending can read the answer."""
MAX_PARTING = 100
"""Connections that may linger at one time after they were turned away."""
_OPTIONS = ("TCP_USER_TIMEOUT", "TCP_NOTSENT_LOWAT")


class Connection(RequestHandler):
    """The protocol of one connection."""

    def __init__(self, server: "ConnectionServer", **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server
        self._turned_away = False
        self._parting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection, or turn it away when there are enough."""
        self._turned_away = self._server.num_open >= self._server.limits.max_connections
        if not self._turned_away:
            self._server.num_open += 1
            _bound(transport, stuck_seconds=self._server.limits.stuck_seconds)
            super().connection_made(transport)
        else:
            stream = cast(asyncio.Transport, transport)  # uvloop's are no subclass of it
            stream.write(raw_answer(_full(self._server.limits.max_connections)))
            self._part_from(stream)

    def _part_from(self, stream: asyncio.Transport) -> None:
        """Close, but not before the client could read why: closing with something of it unread
        would reset the connection."""
        if self._server.num_parting >= MAX_PARTING:
            stream.close()
            return
        self._server.num_parting += 1
        stream.write_eof()
        self._parting = self._loop.call_later(LINGER_SECONDS, stream.close)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection is gone."""
        if not self._turned_away:
            self._server.num_open -= 1
            super().connection_lost(exc)
        elif self._parting is not None:
            self._server.num_parting -= 1
            self._parting.cancel()

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        if not self._turned_away:
            super().data_received(data)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is not a request, or whose answer broke outside of any route."""
        del message  # words of the parser: they repeat what the client sent
        if request.writer.output_size > 0:
            raise ConnectionResetError("the answer has begun: no error can follow")
        if isinstance(exc, HttpProcessingError):
            logger.debug("not a request", extra={"cause": shown(str(exc), limit=200)})
            error = _unreadable(exc, self._server.limits)
        else:
            logger.error("an answer broke", exc_info=exc)
            error = ApiError("Something broke in the server.", status=status, code="internal_error")
        response = error.response()
        response.headers.update(_standing_headers())
        response.force_close()
        return response


class ConnectionServer(web.Server):
    """Makes a `Connection` for each client, and counts them."""

    def __init__(self, inner: web.Server, limits: ConnectionLimits) -> None:
        """Serves what `inner`, made by an application, would serve."""
        options = {
            **inner._kwargs,
            "max_line_size": limits.max_line_bytes,
            "max_field_size": limits.max_line_bytes,
            "max_headers": limits.max_headers,
            "keepalive_timeout": limits.idle_seconds,
            "lingering_time": LINGER_SECONDS,
        }
        super().__init__(
            _typed(inner.request_handler),
            request_factory=inner.request_factory,
            handler_cancellation=inner.handler_cancellation,
            **options,
        )
        self.limits = limits
        self.num_open = 0
        self.num_parting = 0
        """Turned away, and not yet closed."""

    def __call__(self) -> Connection:
        """The protocol of a new connection."""
        return Connection(self, loop=self._loop, **self._kwargs)


class ConnectionRunner(web.AppRunner):
    """Runs an application on such connections. A handler is cancelled as soon as its client has
    gone, as every route here needs."""

    def __init__(self, app: web.Application, limits: ConnectionLimits) -> None:
        super().__init__(app, handler_cancellation=True, access_log=None, handle_signals=False)
        self._limits = limits

    async def _make_server(self) -> web.Server:
        return ConnectionServer(await super()._make_server(), self._limits)


def raw_answer(error: ApiError) -> bytes:
    """A whole HTTP answer, for a connection that is not read."""
    body = error.encoded()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **_standing_headers(),
        **error.headers,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {error.status} Error\r\n{lines}\r\n".encode() + body


def _typed(handler: Handler) -> Handler:
    """What an application refuses before its routes are asked (an `Expect` that nobody can meet)
    becomes an error object too."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            return ApiError(
                f"The request cannot be met: {error.reason}.",
                status=error.status,
                code="bad_request",
            ).response()

    return handle


def _standing_headers() -> dict[str, str]:
    return {"Server": "appliance", "x-request-id": new_id("req")}


def _full(most: int) -> ApiError:
    return ApiError(
        f"The server has {most} connections already (limits.max_connections); try again.",
        status=503,
        code="too_many_connections",
        headers={"Retry-After": "1"},
    )


def _unreadable(exc: HttpProcessingError, limits: ConnectionLimits) -> ApiError:
    if isinstance(exc, LineTooLong):
        return ApiError(
            f"The URL or a header is longer than {limits.max_line_bytes} bytes "
            "(limits.max_line_bytes); send less.",
            status=431,
            code="header_too_large",
        )
    if "Too many headers" in exc.message:
        return ApiError(
            f"The request has more than {limits.max_headers} headers (limits.max_headers).",
            status=431,
            code="header_too_large",
        )
    return ApiError("This is not a valid HTTP request.", code="invalid_http")


def _bound(transport: asyncio.BaseTransport, *, stuck_seconds: float) -> None:
    """Tell the kernel what this connection may hold, and for how long."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    values = (max(1, round(stuck_seconds * 1000)), UNSENT_BYTES)
    for name, value in zip(_OPTIONS, values, strict=True):
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
