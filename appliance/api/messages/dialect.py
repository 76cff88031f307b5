"""How /v1/messages words an answer: one message of blocks, or events that build it.

message_start,
content_block_start, content_block_delta ..., content_block_stop, ...
message_delta (why it stopped, usage), message_stop
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, assert_never

import msgspec

from appliance.api.answer import AnswerParser
from appliance.api.dialect import Outlet
from appliance.api.errors import ApiError
from appliance.api.ids import item_id
from appliance.api.messages.errors import encoded
from appliance.api.one_answer import OneAnswerDialect, TypedStream, judged, unheard
from appliance.api.part_sinks import PartCollectSink
from appliance.api.parts import (
    CallArguments,
    CallBegun,
    CallBroken,
    CallEnded,
    Part,
    Reasoning,
    Text,
)
from appliance.api.render import Identity, Usage
from appliance.api.sinks import EventStream, Exchange
from appliance.api.speech import Reading

STOP_REASONS: Mapping[str, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
}


class Heading(msgspec.Struct, frozen=True, kw_only=True):
    """What a message has before its first word. `request_id` is for errors."""

    name: str
    model: str
    request_id: str

    def document(
        self, usage: Usage, *, content: Sequence[Any] = (), reason: str | None, stop: str | None
    ) -> dict[str, Any]:
        """The whole message."""
        return {
            "id": self.name,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": usage_document(usage),
        }


def usage_document(usage: Usage) -> dict[str, int]:
    """The `usage` object: prompt tokens found in the cache are counted apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def stop_reason(reason: str, parser: AnswerParser) -> tuple[str, str | None]:
    """Why a message ended, and the stop sequence if one was hit."""
    if reason == "stop" and parser.stopped_by is not None:
        return "stop_sequence", parser.stopped_by
    return STOP_REASONS[reason], None


class Blocks:
    """The blocks of a message while they grow, told by events."""

    def __init__(self, say: Callable[[str, dict[str, Any]], None]) -> None:
        self._say = say
        self.done: list[dict[str, Any]] = []
        self._kind = ""
        """Type of the open block; empty when none is open."""
        self._document: dict[str, Any] = {}
        self._texts: list[str] = []

    def take(self, parts: Sequence[Part]) -> None:
        """The answer went on with these parts."""
        for part in parts:
            match part:
                case Text():
                    self._grow("text", "text_delta", "text", part.text)
                case Reasoning():
                    self._grow("thinking", "thinking_delta", "thinking", part.text)
                case CallBegun():
                    document = {"id": item_id("toolu"), "name": part.name, "input": {}}
                    self._begin("tool_use", document)
                case CallArguments():
                    self._delta("input_json_delta", "partial_json", part.text)
                case CallEnded() | CallBroken():
                    self.close()
                case never:
                    assert_never(never)

    def close(self) -> None:
        """The open block is complete."""
        if not self._kind:
            return
        text = "".join(self._texts)
        member = {"tool_use": "input", "thinking": "thinking", "text": "text"}[self._kind]
        value = msgspec.Raw(text.encode() or b"{}") if self._kind == "tool_use" else text
        self.done.append({**self._document, member: value})
        self._say("content_block_stop", {"index": len(self.done) - 1})
        self._kind = ""

    def _grow(self, kind: str, delta: str, member: str, text: str) -> None:
        if self._kind != kind:
            document = {member: "", "signature": ""} if kind == "thinking" else {member: ""}
            self._begin(kind, document)
        self._delta(delta, member, text)

    def _begin(self, kind: str, document: dict[str, Any]) -> None:
        self.close()
        self._kind, self._texts = kind, []
        self._document = {"type": kind, **document}
        start = {"index": len(self.done), "content_block": self._document}
        self._say("content_block_start", start)

    def _delta(self, kind: str, member: str, text: str) -> None:
        self._texts.append(text)
        delta = {"type": kind, member: text}
        self._say("content_block_delta", {"index": len(self.done), "delta": delta})


class MessageStream(TypedStream):
    """The events of one message."""

    def __init__(self, outlet: Outlet, heading: Heading) -> None:
        identity = Identity(id=heading.name, object="message", created=0, model=heading.model)
        super().__init__(outlet, identity)
        self._heading = heading
        self._blocks = Blocks(self.say)
        self._reason: tuple[str, str | None] = ("end_turn", None)

    def begin(self) -> None:
        """Announce the message; the prompt's tokens are known."""
        message = self._heading.document(self.usage, reason=None, stop=None)
        self.say("message_start", {"message": message})
        self.flush()

    def take(self, parts: Sequence[Part]) -> None:
        """The message went on."""
        self._blocks.take(parts)

    def finish(self, parts: Sequence[Part], reason: str, parser: AnswerParser) -> None:
        """The answer is over; the last events wait for the usage."""
        self._blocks.take(parts)
        self._blocks.close()
        self._reason = stop_reason(reason, parser)

    def on_complete(self) -> None:
        """Why it stopped, what it used, how it did, and that it is over."""
        reason, stop = self._reason
        delta = {"stop_reason": reason, "stop_sequence": stop}
        usage = usage_document(self.usage)
        self.say("message_delta", {"delta": delta, "usage": usage, **judged(self.slo)})
        self.say("message_stop", {})
        self.flush()

    def on_error(self, error: ApiError) -> None:
        """The failure; nothing follows it."""
        self._events.clear()
        document = encoded(error, self._heading.request_id)
        self.write(b"event: error\ndata: " + document + b"\n\n")
        self._closed = True


class MessagesDialect(OneAnswerDialect):
    """See the module's text."""

    def __init__(self, heading: Heading, reading: Reading) -> None:
        super().__init__(reading)
        self._heading = heading

    def stream(self, outlet: Outlet) -> EventStream:
        return MessageStream(outlet, self._heading)

    def whole(self, exchange: Exchange, sink: PartCollectSink) -> dict[str, Any]:
        blocks = Blocks(unheard)
        blocks.take(sink.parts)
        blocks.close()
        reason, stop = stop_reason(sink.finish_reason, sink.parser)
        message = self._heading.document(
            exchange.usage, content=blocks.done, reason=reason, stop=stop
        )
        return {**message, **judged(exchange.slo)}
