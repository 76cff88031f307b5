"""Where an answer goes whose text has to be read: tool calls, thoughts, stop strings to be named.

Like the sinks of plain text these are called within the node's frame callback. A *narrator* words
the parts of one answer for a stream.
"""

from collections.abc import Sequence
from typing import Protocol

from appliance.api.answer import AnswerParser
from appliance.api.observe import Meter
from appliance.api.parts import Part
from appliance.api.render import LogprobRenderer
from appliance.api.sinks import BaseSink, CollectSink, EventStream, Exchange
from appliance.live.records import Delta


class Narrator(Protocol):
    """Writes one answer to its stream."""

    def tell(self, parts: Sequence[Part], delta: Delta) -> None:
        """One step came, with these parts (perhaps none yet)."""

    def finish(self, parts: Sequence[Part], reason: str, parser: AnswerParser) -> None:
        """The answer is complete with these last parts. `reason` is "stop", "length" or
        "tool_calls"."""


def read(parser: AnswerParser, delta: Delta, exchange: Exchange) -> list[Part]:
    """The parts that came with this delta. Counts what was thought, step by step."""
    parts: list[Part] = []
    for num_tokens, text in delta.steps():
        if parser.thinking:
            exchange.usage.reasoning_tokens += num_tokens
        parts += parser.push(text)
    return parts


class PartSink(BaseSink):
    """Reads an answer and has it told as it comes."""

    def __init__(
        self,
        stream: EventStream,
        *,
        meter: Meter,
        leads: bool,
        parser: AnswerParser,
        narrator: Narrator,
    ) -> None:
        super().__init__(stream, meter=meter, leads=leads)
        self._stream = stream
        self._parser = parser
        self._narrator = narrator

    def _take(self, delta: Delta) -> None:
        if self._stream.writable:
            self._narrator.tell(read(self._parser, delta, self._exchange), delta)

    def _finish(self, reason: str) -> None:
        if self._stream.writable:
            parts = self._parser.flush()
            self._narrator.finish(parts, self._parser.finish_reason(reason), self._parser)


class PartCollectSink(CollectSink):
    """Reads an answer and keeps its parts."""

    def __init__(
        self,
        exchange: Exchange,
        *,
        meter: Meter,
        leads: bool,
        logprobs: LogprobRenderer | None,
        parser: AnswerParser,
    ) -> None:
        super().__init__(exchange, meter=meter, leads=leads, logprobs=logprobs)
        self.parser = parser
        self.parts: list[Part] = []

    def _take(self, delta: Delta) -> None:
        super()._take(delta)
        self.parts += read(self.parser, delta, self._exchange)

    def _finish(self, reason: str) -> None:
        self.parts += self.parser.flush()
        super()._finish(self.parser.finish_reason(reason))
