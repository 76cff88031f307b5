"""Open answers: what was asked, what has been sent, and where it goes.

One `Stream` per sequence holds the facts that only the node owns: prompt ids, emitted ids,
sampling, the sink. Together they are the `SequenceState` from which any worker can go on. One
step of a worker is fanned out in one call; what comes for an answer that has ended or is being
cancelled is dropped.
"""

import logging
from array import array
from collections.abc import Callable

import msgspec

from appliance.core.messages import Ended
from appliance.core.payload import Sampling, SequenceState, StepOutputs
from appliance.core.types import ErrorKind, RequestId
from appliance.live.records import Delta, End, Sink, Ticket

log = logging.getLogger(__name__)
OnBroken = Callable[["Stream"], None]


class Stream:
    """One answer under way."""

    __slots__ = (
        "cancelled", "emitted", "id", "num_emitted", "prompt", "salt", "sampling", "sink", "ticket",
    )  # fmt: skip

    def __init__(
        self,
        request_id: RequestId,
        ticket: Ticket,
        *,
        sink: Sink,
        prompt: bytes,
        sampling: Sampling,
        salt: str,
    ) -> None:
        self.id = request_id
        self.ticket = ticket
        self.sink = sink
        self.prompt = prompt
        """Token ids, little-endian int32."""
        self.sampling = sampling
        self.salt = salt
        self.emitted = bytearray()
        """Token ids that went to the sink, little-endian int32."""
        self.num_emitted = 0
        self.cancelled = False
        """Nothing more is pushed; the end is still said."""

    def state(self) -> SequenceState:
        """All that a worker needs to go on after the last emitted token."""
        return SequenceState(
            prompt=self.prompt, sampling=self.sampling, emitted=bytes(self.emitted), salt=self.salt
        )


class Streams:
    """The open streams of a node, by request id."""

    def __init__(self, on_broken: OnBroken) -> None:
        """`on_broken` hears of a stream whose sink raised; nothing more is pushed to it."""
        self._open: dict[RequestId, Stream] = {}
        self._on_broken = on_broken
        self._states = msgspec.msgpack.Encoder()
        self._outputs = msgspec.msgpack.Decoder(StepOutputs)

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._open

    def open(self, stream: Stream) -> None:
        """Begin to deliver to this stream."""
        self._open[stream.id] = stream

    def get(self, request_id: RequestId) -> Stream | None:
        """The open stream of this request."""
        return self._open.get(request_id)

    def forget(self, request_id: RequestId) -> None:
        """Drop a stream whose request was never accepted: no end is said."""
        self._open.pop(request_id, None)

    def ids(self) -> list[RequestId]:
        """Ids of all open streams."""
        return list(self._open)

    def payload(self, request_id: RequestId) -> bytes:
        """The encoded `SequenceState` of an open stream."""
        return self._states.encode(self._open[request_id].state())

    def fan_out(self, payload: bytes) -> int:
        """Deliver one step's `StepOutputs`; the number of tokens delivered.

        Raises `msgspec.MsgspecError` or `ValueError` when the payload is not `StepOutputs` with
        columns of one length; then nothing is delivered."""
        outputs = self._outputs.decode(payload)
        logprobs, delivered = outputs.logprobs, 0
        columns = (outputs.tokens, outputs.texts, outputs.ids if logprobs is None else logprobs)
        if any(len(column) != len(outputs.ids) for column in columns):
            raise ValueError("the columns of a step's outputs differ in length")
        for index, request_id in enumerate(outputs.ids):
            stream = self._open.get(request_id)
            if stream is None or stream.cancelled:
                continue
            tokens = outputs.tokens[index]
            stream.emitted += array("i", tokens).tobytes()
            stream.num_emitted += len(tokens)
            delivered += len(tokens)
            delta = Delta(
                tokens=tokens,
                text=outputs.texts[index],
                logprobs=None if logprobs is None else logprobs[index],
            )
            try:
                stream.sink.push(delta)
            except Exception:
                log.exception("a sink failed", extra={"request": stream.ticket.name})
                stream.cancelled = True
                self._on_broken(stream)
        return delivered

    def end(self, ended: Ended) -> Stream | None:
        """Say the one terminal event of a request; its stream, or None if it was not open."""
        stream = self._open.pop(ended.request_id, None)
        if stream is None:
            return None
        end = End(
            reason=ended.reason,
            error=ended.error,
            message=ended.message,
            prompt_tokens=len(stream.prompt) // 4,
            cached_tokens=ended.cached_tokens,
            emitted_tokens=stream.num_emitted,
        )
        try:
            stream.sink.end(end)
        except Exception:
            log.exception("a sink failed at its end", extra={"request": stream.ticket.name})
        stream.ticket.one_ended()
        return stream

    def end_all(self, kind: ErrorKind, message: str) -> None:
        """End every open stream with this error: the last resort of a node that cannot go on."""
        for request_id in self.ids():
            self.end(Ended(request_id=request_id, error=kind, message=message))
