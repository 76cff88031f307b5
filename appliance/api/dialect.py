"""How the answers of a route are worded: the seam between running a request and rendering it."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from appliance.api.context import Context
from appliance.api.observe import Meter
from appliance.api.render import ChunkTemplate, Identity, LogprobRenderer
from appliance.api.sinks import BaseSink, CollectSink, EventStream, Exchange, SseSink
from appliance.api.validate import Plan, Streaming


@dataclass(frozen=True)
class Outlet:
    """What a stream of events needs beside its words."""

    num_answers: int
    loop: asyncio.AbstractEventLoop
    max_buffer: int
    on_slow: Callable[[], None]


class Dialect(Protocol):
    """One answer document, or one stream of events, in the words of a route. One per request."""

    def stream(self, outlet: Outlet) -> EventStream:
        """The exchange of a request that asked for a stream."""

    def stream_sink(
        self, stream: EventStream, *, index: int, meter: Meter, leads: bool
    ) -> BaseSink:
        """Where the tokens of choice `index` of a stream go."""

    def collect_sink(self, exchange: Exchange, *, meter: Meter, leads: bool) -> CollectSink:
        """Where the tokens of an answer in one piece are kept."""

    def document(self, exchange: Exchange, collected: Sequence[CollectSink]) -> dict[str, Any]:
        """The whole answer, its choices in their order."""


class PlainDialect:
    """Chat and plain completions of OpenAI whose answers are text and nothing else."""

    def __init__(self, context: Context, plan: Plan, *, name: str, chat: bool) -> None:
        """`name` is the public id of the answer."""
        self._text = context.node.text
        self._plan = plan
        self._chat = chat
        self._streaming = plan.streaming or Streaming()
        kind = "text_completion"
        if chat:
            kind = "chat.completion" if plan.streaming is None else "chat.completion.chunk"
        self.identity = Identity(
            id=name, object=kind, created=int(time.time()), model=context.node.info.model
        )

    def stream(self, outlet: Outlet) -> EventStream:
        return EventStream(
            outlet.num_answers,
            outlet.loop,
            identity=self.identity,
            include_usage=self._streaming.include_usage,
            max_buffer=outlet.max_buffer,
            on_slow=outlet.on_slow,
        )

    def stream_sink(
        self, stream: EventStream, *, index: int, meter: Meter, leads: bool
    ) -> BaseSink:
        return SseSink(
            stream,
            meter=meter,
            leads=leads,
            template=ChunkTemplate(
                self.identity,
                index,
                chat=self._chat,
                null_usage=self._streaming.include_usage,
            ),
            logprobs=self.renderer(),
            running_usage=self._streaming.continuous_usage,
        )

    def collect_sink(self, exchange: Exchange, *, meter: Meter, leads: bool) -> CollectSink:
        return CollectSink(exchange, meter=meter, leads=leads, logprobs=self.renderer())

    def document(self, exchange: Exchange, collected: Sequence[CollectSink]) -> dict[str, Any]:
        choices = []
        for index, sink in enumerate(collected):
            tail = {"logprobs": sink.logprobs, "finish_reason": sink.finish_reason}
            choices.append({"index": index, **self._content(sink), **tail})
        identity = msgspec.structs.asdict(self.identity)
        document = {**identity, "choices": choices, "usage": exchange.usage.document()}
        slo = exchange.slo
        return document if slo is None else {**document, "slo": slo}

    def _content(self, sink: CollectSink) -> dict[str, Any]:
        if self._chat:
            return {"message": {"role": "assistant", "content": sink.text, "refusal": None}}
        return {"text": sink.text}

    def renderer(self) -> LogprobRenderer | None:
        """What renders log-probabilities; None when they were not asked for."""
        if self._plan.logprobs is None:
            return None
        return LogprobRenderer(self._text, chat=self._chat)
