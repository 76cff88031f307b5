"""What the routes share whose answer is one, told in typed events: /v1/messages, /v1/responses.

A stream of theirs names the type of every event; its last events wait for the usage and the
verdict, which are known when the answer is complete."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from appliance.api.answer import AnswerParser
from appliance.api.dialect import Outlet
from appliance.api.observe import Meter
from appliance.api.part_sinks import PartCollectSink, PartSink
from appliance.api.parts import Part
from appliance.api.render import Identity
from appliance.api.sinks import BaseSink, CollectSink, EventStream, Exchange
from appliance.api.speech import Reading
from appliance.live.records import Delta


class TypedStream(EventStream, ABC):
    """The events of one answer; also the narrator of its parts."""

    def __init__(self, outlet: Outlet, identity: Identity) -> None:
        super().__init__(
            outlet.num_answers,
            outlet.loop,
            identity=identity,
            include_usage=False,
            max_buffer=outlet.max_buffer,
            on_slow=outlet.on_slow,
        )
        self._events: list[bytes] = []
        self._encode = msgspec.json.Encoder().encode

    def say(self, kind: str, fields: dict[str, Any]) -> None:
        """One more event; sent with the next `flush`."""
        data = self._encode({"type": kind, **self._numbered(), **fields})
        self._events.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), data))

    def flush(self) -> None:
        """Write what was said, in one piece."""
        if self._events:
            data = b"".join(self._events)
            self._events.clear()
            self.write(data)

    def tell(self, parts: Sequence[Part], delta: Delta) -> None:
        """The answer went on."""
        del delta  # the parts say it all
        self.take(parts)
        self.flush()

    def _numbered(self) -> dict[str, Any]:
        """Members that every event has beside its type."""
        return {}

    @abstractmethod
    def begin(self) -> None:
        """Announce the answer; the prompt's tokens are known."""

    @abstractmethod
    def take(self, parts: Sequence[Part]) -> None:
        """Say the events of these parts."""

    @abstractmethod
    def finish(self, parts: Sequence[Part], reason: str, parser: AnswerParser) -> None:
        """The answer is over; the last events wait for `on_complete`."""


class OneAnswerDialect(ABC):
    """A dialect of such a route."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    @abstractmethod
    def stream(self, outlet: Outlet) -> EventStream:
        """A `TypedStream`."""

    def stream_sink(
        self, stream: EventStream, *, index: int, meter: Meter, leads: bool
    ) -> BaseSink:
        """Where the one answer of a stream goes; announces it."""
        assert isinstance(stream, TypedStream)
        assert index == 0, "there is one answer"
        stream.begin()
        parser = self._reading.parser(eager=True)
        return PartSink(stream, meter=meter, leads=leads, parser=parser, narrator=stream)

    def collect_sink(self, exchange: Exchange, *, meter: Meter, leads: bool) -> CollectSink:
        """Where the one answer in one piece is kept."""
        parser = self._reading.parser(eager=False)
        return PartCollectSink(exchange, meter=meter, leads=leads, logprobs=None, parser=parser)

    def document(self, exchange: Exchange, collected: Sequence[CollectSink]) -> dict[str, Any]:
        """The whole answer."""
        (sink,) = collected
        assert isinstance(sink, PartCollectSink)
        return self.whole(exchange, sink)

    @abstractmethod
    def whole(self, exchange: Exchange, sink: PartCollectSink) -> dict[str, Any]:
        """The document of the answer that this sink has kept."""


def judged(slo: dict[str, Any] | None) -> dict[str, Any]:
    """The member of a document that holds the verdict."""
    return {} if slo is None else {"slo": slo}


def unheard(kind: str, fields: dict[str, Any]) -> None:
    """Takes the events of an answer in one piece, which are told to nobody."""
    del kind, fields
