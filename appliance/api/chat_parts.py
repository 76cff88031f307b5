"""Chat completions whose answers may hold tool calls and thoughts."""

from collections.abc import Sequence
from typing import Any, assert_never

import msgspec

from appliance.api.answer import AnswerParser
from appliance.api.context import Context
from appliance.api.dialect import PlainDialect
from appliance.api.ids import item_id
from appliance.api.observe import Meter
from appliance.api.part_sinks import PartCollectSink, PartSink
from appliance.api.parts import (
    CallArguments,
    CallBegun,
    CallBroken,
    CallEnded,
    Part,
    Reasoning,
    Text,
    joined,
)
from appliance.api.render import ChunkTemplate, LogprobRenderer
from appliance.api.sinks import BaseSink, CollectSink, EventStream, Exchange
from appliance.api.speech import Reading
from appliance.api.validate import Plan
from appliance.live.records import Delta


class ChatNarrator:
    """Words the parts of one choice as chunks: one write per step."""

    def __init__(
        self,
        stream: EventStream,
        template: ChunkTemplate,
        *,
        logprobs: LogprobRenderer | None,
        running_usage: bool,
    ) -> None:
        self._stream = stream
        self._template = template
        self._renderer = logprobs
        self._running_usage = running_usage
        self._begun = False
        self._num_calls = 0
        self._encode = msgspec.json.Encoder().encode

    def tell(self, parts: Sequence[Part], delta: Delta) -> None:
        """One chunk per part; without any, one if there is something else to say."""
        deltas = [worded for part in parts if (worded := self._delta(part)) is not None]
        logprobs = b"null"
        if self._renderer is not None and delta.logprobs is not None:
            logprobs = self._encode(self._renderer.render(delta.tokens, delta.logprobs))
        if not deltas and (self._running_usage or self._renderer is not None):
            deltas = [{}]
        if deltas:
            self._stream.write(self._chunks(deltas, logprobs))

    def finish(self, parts: Sequence[Part], reason: str, parser: AnswerParser) -> None:
        """The last parts and the chunk with the reason."""
        del parser  # the reason says it all
        deltas = [worded for part in parts if (worded := self._delta(part)) is not None]
        last = self._template.finish(reason, self._usage(), self._stream.last_slo)
        self._stream.write(self._chunks(deltas, b"null") + last)

    def _chunks(self, deltas: Sequence[dict[str, Any]], logprobs: bytes) -> bytes:
        usage = self._usage()
        chunks = [] if self._begun else [self._template.role(usage)]
        self._begun = True
        for body in deltas:
            chunks.append(self._template.delta(self._encode(body), logprobs, usage))
            logprobs = b"null"
        return b"".join(chunks)

    def _delta(self, part: Part) -> dict[str, Any] | None:
        match part:
            case Text():
                return {"content": part.text}
            case Reasoning():
                return {"reasoning_content": part.text}
            case CallBegun():
                self._num_calls += 1
                function = {"name": part.name, "arguments": ""}
                return self._call(id=item_id("call"), type="function", function=function)
            case CallArguments():
                return self._call(function={"arguments": part.text})
            case CallEnded() | CallBroken():
                return None
            case never:
                assert_never(never)

    def _call(self, **fields: Any) -> dict[str, Any]:
        return {"tool_calls": [{"index": self._num_calls - 1, **fields}]}

    def _usage(self) -> bytes | None:
        return self._encode(self._stream.usage.document()) if self._running_usage else None


class PartsDialect(PlainDialect):
    """Chat completions that are read."""

    def __init__(self, context: Context, plan: Plan, reading: Reading, *, name: str) -> None:
        super().__init__(context, plan, name=name, chat=True)
        self._reading = reading

    def stream_sink(
        self, stream: EventStream, *, index: int, meter: Meter, leads: bool
    ) -> BaseSink:
        narrator = ChatNarrator(
            stream,
            ChunkTemplate(
                self.identity, index, chat=True, null_usage=self._streaming.include_usage
            ),
            logprobs=self.renderer(),
            running_usage=self._streaming.continuous_usage,
        )
        parser = self._reading.parser(eager=True)
        return PartSink(stream, meter=meter, leads=leads, parser=parser, narrator=narrator)

    def collect_sink(self, exchange: Exchange, *, meter: Meter, leads: bool) -> CollectSink:
        return PartCollectSink(
            exchange,
            meter=meter,
            leads=leads,
            logprobs=self.renderer(),
            parser=self._reading.parser(eager=False),
        )

    def _content(self, sink: CollectSink) -> dict[str, Any]:
        assert isinstance(sink, PartCollectSink)
        prose, thoughts, calls = joined(sink.parts)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": prose if prose or not calls else None,
            "refusal": None,
        }
        if thoughts:
            message["reasoning_content"] = thoughts
        if calls:
            message["tool_calls"] = [
                {
                    "id": item_id("call"),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in calls
            ]
        return {"message": message}
