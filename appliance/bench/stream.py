"""One answer as it streams in: when its tokens came, how many there were, how it ended.

Every event between the first token and the end is taken for one step's tokens and only timed; its
JSON is not read. Read are the events up to the first one with text, and the last few, which say how
many tokens there were, why the answer ended and what the server thinks of it. An event with an
error in it is read wherever it comes.
"""

from array import array
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from appliance.bench.http import Head
from appliance.bench.sse import EventSplitter, data_of

TAIL = 8
"""Events kept for reading at the end: more than any server sends after the last token."""
MAX_TEXT = 2_000
"""Bytes kept of an error's body."""
DONE = b"[DONE]"
ERROR_MARK = b'"error"'
"""No text can look like this: within JSON strings the quotes are escaped."""


class Answer:
    """What is known of one answer. Times are those of the connection's clock."""

    __slots__ = (
        "_counting",
        "_ended_at",
        "_on_end",
        "_plain",
        "_raw",
        "_splitter",
        "_stop_after",
        "_tail",
        "cached_tokens",
        "error",
        "finish_reason",
        "message",
        "num_tokens",
        "over",
        "prompt_tokens",
        "server",
        "status",
        "stopped",
        "times",
        "workers",
    )

    def __init__(self, on_end: Callable[["Answer"], None], *, stop_after: int = 0) -> None:
        """`on_end` is called once, when nothing more can come. After `stop_after` tokens (0:
        never) the client has read enough: the answer is finished, whatever else might come."""
        self._on_end = on_end
        self._stop_after = stop_after
        self._splitter = EventSplitter()
        self._tail: deque[bytes] = deque(maxlen=TAIL)
        self._counting = False
        self._plain = False
        self._raw = b""
        self._ended_at = 0.0
        """When an event gave the reason, if none had text before it."""
        self.status = 0
        self.times: array[float] = array("d")
        """When each event with tokens came."""
        self.num_tokens = 0
        """By the server's count where it gave one, else the events."""
        self.prompt_tokens: int | None = None
        self.cached_tokens = 0
        self.finish_reason = ""
        self.error = ""
        """One word when it went wrong: an HTTP status, or what happened to the connection."""
        self.message = ""
        self.server: dict[str, Any] | None = None
        """The verdict `slo` of the server."""
        self.over = False
        self.stopped = False
        """It was the client who ended it, having read enough."""

    @property
    def finished(self) -> bool:
        """It ended as an answer should: with a reason and without an error."""
        return self.over and not self.error and bool(self.finish_reason)

    def head(self, head: Head, now: float) -> None:  # noqa: ARG002 - a Receiver
        """Status and headers are there."""
        self.status = head.status
        self._plain = head.status != 200

    def body(self, data: bytes, now: float) -> None:
        """A part of the body."""
        if self._plain:
            if len(self._raw) < MAX_TEXT:
                self._raw += data[:MAX_TEXT]
            return
        for block in self._splitter.feed(data):
            if self._counting and block.startswith(b"data:") and ERROR_MARK not in block:
                self.times.append(now)
                self._tail.append(block)
            else:
                self._event(block, now)
            if self._stop_after and len(self.times) >= self._stop_after and not self.over:
                self._stop()
                return

    def over_at(self, now: float) -> None:
        """The response is complete."""
        if not self._plain:
            for block in self._splitter.end():
                self._event(block, now)
        self._close()

    def give_up(self, kind: str, message: str) -> None:
        """End it from outside, unless it is over; what came so far stays."""
        if not self.over:
            self.error, self.message = self.error or kind, self.message or message
            self._close()

    def _stop(self) -> None:
        """Enough was read, unless the last event is the server's own end."""
        last = _document(data_of(self._tail[-1]) or b"")
        if not self.error and not (last and is_closing(last)):
            self.stopped, self.over = True, True
            self.finish_reason = "enough"
            self.num_tokens = len(self.times)
            self._tail.clear()
            self._on_end(self)

    def _event(self, block: bytes, now: float) -> None:
        """One event that has to be read: before the first token, or with an error."""
        data = data_of(block)
        if data is None:
            return
        document = _document(data)
        if document is None:
            if data != DONE:
                self._fault("garbled", f"an event that is not JSON: {data[:80]!r}")
            return
        if "error" in document and not document.get("choices"):
            kind, message = error_words(document)
            self._fault(kind, message)
            return
        if self._counting or has_tokens(document):
            self._counting = True
            self.times.append(now)
            self._tail.append(block)
        else:
            self._read_end(document)
            if self.finish_reason and not self._ended_at:
                self._ended_at = now

    def _fault(self, kind: str, message: str) -> None:
        if not self.error:
            self.error, self.message = kind, message

    def _close(self) -> None:
        if self.over:
            return
        self.over = True
        if self._plain:
            self._refusal()
        else:
            self._read_tail()
        if not self.error and not self.finish_reason:
            self._fault("truncated", "the stream ended without a finish_reason")
        if not self.times and self.num_tokens and self.finish_reason:
            self.times.append(self._ended_at)  # tokens without text
        self.num_tokens = self.num_tokens or len(self.times)
        self._tail.clear()
        self._on_end(self)

    def _refusal(self) -> None:
        document = _document(self._raw)
        words = self._raw[:200].decode(errors="replace")
        self._fault(f"http_{self.status}", error_words(document)[1] if document else words)

    def _read_tail(self) -> None:
        """Events at the end that carried no token are no tokens."""
        first = len(self.times) - len(self._tail)
        empty: list[int] = []
        for offset, block in enumerate(self._tail):
            data = data_of(block)
            document = None if data is None else _document(data)
            if document is None:
                empty.append(first + offset)
                if data is not None and data != DONE:
                    self._fault("garbled", f"an event that is not JSON: {data[:80]!r}")
                continue
            self._read_end(document)
            if not has_tokens(document) and is_closing(document):
                empty.append(first + offset)
        for index in reversed(empty):
            del self.times[index]

    def _read_end(self, document: Mapping[str, Any]) -> None:
        """Whatever this event tells about the whole answer."""
        for choice in _list(document.get("choices")):
            reason = choice.get("finish_reason")
            if reason:
                self.finish_reason = str(reason)
            if isinstance(choice.get("slo"), dict):
                self.server = choice["slo"]
        if isinstance(document.get("slo"), dict):
            self.server = document["slo"]
        usage = document.get("usage")
        if isinstance(usage, dict):
            self.num_tokens = _count(usage.get("completion_tokens")) or self.num_tokens
            self.prompt_tokens = _count(usage.get("prompt_tokens")) or self.prompt_tokens
            details = usage.get("prompt_tokens_details")
            if isinstance(details, dict):
                self.cached_tokens = _count(details.get("cached_tokens"))


class StreamReceiver:
    """Feeds an `Answer` from an exchange (see `connection.Receiver`)."""

    __slots__ = ("answer", "body", "head", "on_failure")

    def __init__(self, answer: Answer, on_failure: Callable[[str, str], None]) -> None:
        """`on_failure` gets the kind and the message when the exchange breaks."""
        self.answer = answer
        self.head = answer.head
        self.body = answer.body
        self.on_failure = on_failure

    def over(self, now: float) -> None:
        """The response is complete."""
        self.answer.over_at(now)

    def failed(self, kind: str, message: str) -> None:
        """It will not be."""
        self.on_failure(kind, message)


def has_tokens(document: Mapping[str, Any]) -> bool:
    """Whether a chunk adds text of any kind: of a completion, a message, its reasoning or calls."""
    for choice in _list(document.get("choices")):
        if choice.get("text"):
            return True
        delta = choice.get("delta")
        if isinstance(delta, dict) and any(
            delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls")
        ):
            return True
    return False


def is_closing(document: Mapping[str, Any]) -> bool:
    """Whether a chunk without text belongs to the end: it has a reason, or nothing at all. One in
    the middle is a step whose character is not complete."""
    choices = _list(document.get("choices"))
    return not choices or any(choice.get("finish_reason") for choice in choices)


def error_words(document: Mapping[str, Any]) -> tuple[str, str]:
    """Kind and message of an error object."""
    error = document.get("error")
    if not isinstance(error, dict):
        return "error_event", str(error or document.get("message") or document)[:300]
    kind = error.get("code") or error.get("type") or "error_event"
    return str(kind), str(error.get("message", ""))[:300]


def _document(data: bytes) -> dict[str, Any] | None:
    try:
        document = msgspec.json.decode(data)
    except msgspec.DecodeError:
        return None
    return document if isinstance(document, dict) else None


def _list(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
