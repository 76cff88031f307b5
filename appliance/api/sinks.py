"""Where an answer's tokens go: into one document, or straight into a socket.

A sink is called by the node from within its frame callback, so it may neither block nor await, and
no task is woken per token. An `Exchange` joins the answers of one HTTP request; the handler waits
for its `over` alone.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import msgspec

from appliance.api.errors import ApiError, error_of
from appliance.api.observe import Meter
from appliance.api.render import (
    DONE,
    END,
    ChunkTemplate,
    Identity,
    LogprobRenderer,
    Usage,
    error_event,
    usage_chunk,
)
from appliance.api.verdict import OF_CLIENTS, Verdict, worst
from appliance.core.types import ErrorKind
from appliance.live.records import Delta, End


class Exchange:
    """All answers to one HTTP request: how many are open, what they used, what went wrong first."""

    def __init__(self, num_answers: int, loop: asyncio.AbstractEventLoop) -> None:
        self.over: asyncio.Future[None] = loop.create_future()
        """Done when every answer has ended or one has failed."""
        self.error: ApiError | None = None
        self.error_kind: ErrorKind | None = None
        """What went wrong first."""
        self.usage = Usage()
        self._open = num_answers
        self._verdicts: list[Verdict] = []
        self._finished: list[Meter] = []
        """Of the answers that have ended well; counted once it is known how the exchange ends: what
        ends with an error has given the client nothing."""

    @property
    def slo(self) -> dict[str, Any] | None:
        """The `slo` object: the verdict on the answers that have ended; None while there is
        none."""
        found = worst(self._verdicts)
        return None if found is None else found.document()

    @property
    def last_slo(self) -> dict[str, Any] | None:
        """The same for an answer that is about to complete, None unless it is the last one."""
        return self.slo if self._open == 1 else None

    def judged(self, verdict: Verdict | None, meter: Meter) -> None:
        """An answer did so well, as its meter says; it is about to complete."""
        if verdict is not None:
            self._verdicts.append(verdict)
        self._finished.append(meter)

    def completed(self) -> None:
        """One answer has ended well."""
        self._open -= 1
        if self.error_kind is not None:
            self._count_lost(self.error_kind)
        elif self._open == 0:
            for meter in self._finished:
                meter.judge()
            self.on_complete()
            self._settle()

    def failed(self, kind: ErrorKind, message: str, *, retry_after: float | None = None) -> None:
        """One answer has ended with an error, which ends the exchange."""
        self._open -= 1
        if self.error is None and not self.over.done():
            self.error = error_of(kind, message, retry_after=retry_after)
            self.error_kind = kind
            self._count_lost(kind)
            self.on_error(self.error)
            self._settle()

    def _count_lost(self, kind: ErrorKind) -> None:
        """What ended well is lost with the exchange, if not by the client's own doing."""
        for meter in self._finished:
            if kind not in OF_CLIENTS:
                meter.lose()
        self._finished.clear()

    def on_complete(self) -> None:
        """Called once, before `over`, when all went well."""

    def on_error(self, error: ApiError) -> None:
        """Called once, before `over`, at the first failure."""

    def _settle(self) -> None:
        if not self.over.done():
            self.over.set_result(None)


class BaseSink(ABC):
    """Counts and times one answer; subclasses say what becomes of it."""

    def __init__(self, exchange: Exchange, *, meter: Meter, leads: bool) -> None:
        self._exchange = exchange
        self._meter = meter
        self._leads = leads
        """The first answer to its prompt: the prompt's tokens are counted once, with it."""

    def push(self, delta: Delta) -> None:
        """Take new tokens."""
        self._meter.tokens(len(delta.tokens))
        self._exchange.usage.completion_tokens += len(delta.tokens)
        self._take(delta)

    def end(self, end: End) -> None:
        """Take the terminal event: called exactly once."""
        if self._leads:
            self._exchange.usage.cached_tokens += end.cached_tokens
        if end.reason is None:
            kind = end.error or ErrorKind.INTERNAL
            self._exchange.failed(kind, end.message, retry_after=end.retry_after)
            return
        verdict = self._meter.finished(end.times)
        self._exchange.judged(verdict, self._meter)
        self._finish(end.reason.value)
        self._exchange.completed()

    @abstractmethod
    def _take(self, delta: Delta) -> None:
        """What becomes of new tokens."""

    @abstractmethod
    def _finish(self, reason: str) -> None:
        """What becomes of a good end."""


class CollectSink(BaseSink):
    """Keeps an answer until it is complete."""

    def __init__(
        self,
        exchange: Exchange,
        *,
        meter: Meter,
        leads: bool,
        logprobs: LogprobRenderer | None,
    ) -> None:
        super().__init__(exchange, meter=meter, leads=leads)
        self._texts: list[str] = []
        self._renderer = logprobs
        self._entries: list[dict[str, Any]] = []
        self.finish_reason = ""

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._texts)

    @property
    def logprobs(self) -> dict[str, Any] | None:
        """The `logprobs` object of the whole answer, `None` when not asked for."""
        if self._renderer is None:
            return None
        joined = self._renderer.render([], [])
        for part in self._entries:
            for name, column in part.items():
                if column is not None:
                    joined[name].extend(column)
        return joined

    def _take(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        if self._renderer is not None and delta.logprobs is not None:
            self._entries.append(self._renderer.render(delta.tokens, delta.logprobs))

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason


class EventStream(Exchange):
    """An exchange whose answers are written to one socket as server-sent events.

    What is written before `open` waits. Past `max_buffer` bytes that the peer does not read, the
    transport is aborted and `on_slow` called once, from the event loop (not from within `push`)."""

    def __init__(
        self,
        num_answers: int,
        loop: asyncio.AbstractEventLoop,
        *,
        identity: Identity,
        include_usage: bool,
        max_buffer: int,
        on_slow: Callable[[], None],
    ) -> None:
        super().__init__(num_answers, loop)
        self._loop = loop
        self._identity = identity
        self._include_usage = include_usage
        self._max_buffer = max_buffer
        self._on_slow = on_slow
        self._transport: asyncio.WriteTransport | None = None
        self._chunked = True
        self._waiting: list[bytes] = []
        self._closed = False
        self.is_slow = False
        """The client was cut off because it did not read."""

    @property
    def writable(self) -> bool:
        """False once nothing more can reach the client."""
        return not self._closed

    def open(self, transport: asyncio.WriteTransport, *, chunked: bool) -> None:
        """The headers are out: write what has waited, and from now on at once."""
        self._transport = transport
        self._chunked = chunked
        waiting = b"".join(self._waiting)
        self._waiting.clear()
        if waiting:
            self._send(transport, waiting)

    def write(self, data: bytes) -> None:
        """Send events; dropped when the stream is closed."""
        if self._closed:
            return
        if self._transport is None:
            self._waiting.append(data)
        else:
            self._send(self._transport, data)

    def _send(self, transport: asyncio.WriteTransport, data: bytes) -> None:
        if transport.is_closing():
            self._closed = True
            return
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        if transport.get_write_buffer_size() > self._max_buffer:
            self._closed = self.is_slow = True
            transport.abort()
            self._loop.call_soon(self._on_slow)

    def on_complete(self) -> None:
        """Usage if asked for, and the end mark."""
        last = usage_chunk(self._identity, self.usage) if self._include_usage else b""
        self.write(last + DONE)

    def on_error(self, error: ApiError) -> None:
        """The error as an event; nothing follows it. It waits for `open` like everything else: a
        handler that has sent nothing yet answers with the error instead."""
        self.write(error_event(error.encoded()))
        self._closed = True


class SseSink(BaseSink):
    """Renders one answer's tokens as chunks: one write per step."""

    def __init__(
        self,
        stream: EventStream,
        *,
        meter: Meter,
        leads: bool,
        template: ChunkTemplate,
        logprobs: LogprobRenderer | None,
        running_usage: bool,
    ) -> None:
        super().__init__(stream, meter=meter, leads=leads)
        self._stream = stream
        self._template = template
        self._renderer = logprobs
        self._running_usage = running_usage
        self._plain = logprobs is None and not running_usage
        self._begun = False
        self._encode = msgspec.json.Encoder().encode

    def _take(self, delta: Delta) -> None:
        if not self._stream.writable:
            return
        if self._plain:
            if not delta.text:
                return  # a character or a possible stop string is incomplete
            chunk = self._template.text(delta.text)
        else:
            chunk = self._rich(delta)
        self._stream.write(chunk if self._begun else self._begin() + chunk)

    def _rich(self, delta: Delta) -> bytes:
        template = self._template
        logprobs = b"null"
        if self._renderer is not None and delta.logprobs is not None:
            logprobs = self._encode(self._renderer.render(delta.tokens, delta.logprobs))
        text = self._encode(delta.text)
        usage = template.usage(self._usage())
        return template.head + text + template.middle + logprobs + template.unfinished + usage + END

    def _begin(self) -> bytes:
        self._begun = True
        return self._template.role(self._usage())

    def _usage(self) -> bytes | None:
        if not self._running_usage:
            return None
        return self._encode(self._stream.usage.document())

    def _finish(self, reason: str) -> None:
        chunk = self._template.finish(reason, self._usage(), self._stream.last_slo)
        self._stream.write(chunk if self._begun else self._begin() + chunk)
