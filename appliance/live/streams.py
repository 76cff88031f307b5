"""Open answers: what was asked, what has been sent, and where it goes.

One `Stream` per sequence holds the facts that only the node owns: prompt ids, emitted ids,
sampling, the sink. Together they are the `SequenceState` from which any worker can go on. What
comes for an answer that has ended or is being cancelled is dropped.

A step of a worker is booked at once and delivered in the same turn of the event loop, when all
sockets that had something have been read: what has come for an answer meanwhile is one push. So a
node that is a step behind joins the tokens that wait anyway, at no cost in time.

Under a hold (`appliance.live.holding`) an answer's tokens may also wait for the next ones:

* the first text and the last token of an answer never wait;
* no token waits longer than the hold, nor longer than its request's budget per token;
* a token that would have to leave before the next one is expected leaves at once;
* order and text are the same with and without it.
"""

import asyncio
import logging
import time
from array import array
from collections.abc import Callable

import msgspec

from appliance.core.messages import Ended
from appliance.core.payload import Sampling, SequenceState, StepOutputs, TokenLogprobs
from appliance.core.types import ErrorKind, RequestId, WorkerId
from appliance.live.holding import Holding, HoldSettings
from appliance.live.records import Delta, End, Sink, Ticket

log = logging.getLogger(__name__)
OnBroken = Callable[["Stream"], None]
DELIVERIES = 96
"""Pushes in one callback; then others get their turn."""
SWEEP_SECONDS = 0.005
"""Between two looks at the answers that wait under a hold; a shorter bound means no wait."""


class Stream:
    """One answer under way."""

    __slots__ = (
        "arrived", "begun", "bound", "cancelled", "due", "emitted", "id", "joined", "logprobs",
        "prompt", "salt", "sampling", "sink", "slo_class", "text", "ticket", "tokens", "worker",
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
        bound: float | None = None,
        slo_class: str = "",
    ) -> None:
        """`bound`: seconds that a token of this answer may wait at most; None: as the hold says."""
        self.id = request_id
        self.ticket = ticket
        self.sink = sink
        self.prompt = prompt
        """Token ids, little-endian int32."""
        self.sampling = sampling
        self.salt = salt
        self.bound = float("inf") if bound is None else bound
        self.slo_class = slo_class
        """Under which its end is counted."""
        self.emitted = array("i")
        """Token ids that went to the sink or are about to."""
        self.cancelled = False
        """Nothing more is pushed; the end is still said."""
        self.tokens: list[int] | None = None
        """Not yet pushed, with `text` and `logprobs`; None: nothing."""
        self.text = ""
        """Of the first step in `tokens`."""
        self.joined: list[tuple[int, str]] | None = None
        """All steps in `tokens`, if there are several: (number of tokens, text)."""
        self.logprobs: list[TokenLogprobs] | None = None
        self.begun = False
        """Some text has been pushed."""
        self.due = 0.0
        """When what waits must leave. This and the next mean something only under a hold."""
        self.arrived = 0.0
        """When the last token came."""
        self.worker: WorkerId | None = None
        """Whose tokens count."""

    @property
    def num_emitted(self) -> int:
        """Tokens so far."""
        return len(self.emitted)

    def state(self, emitted_tokens: int | None = None) -> SequenceState:
        """All that a worker needs to go on after the first `emitted_tokens` (None: all) emitted
        tokens."""
        return SequenceState(
            prompt=self.prompt,
            sampling=self.sampling,
            emitted=self.emitted[:emitted_tokens].tobytes(),
            salt=self.salt,
        )

    def join(self, tokens: list[int], text: str, logprobs: list[TokenLogprobs] | None) -> None:
        """Add a step to what waits to be pushed."""
        waiting = self.tokens or []
        if self.joined is None:
            self.joined = [(len(waiting), self.text)]
        self.joined.append((len(tokens), text))
        self.tokens = waiting + tokens
        if logprobs is not None:
            self.logprobs = (self.logprobs or []) + logprobs


class Streams:
    """The open streams of a node, by request id. Needs a running loop to deliver."""

    def __init__(
        self,
        on_broken: OnBroken,
        *,
        holding: Holding | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_broken` hears of a stream whose sink raised; nothing more is pushed to it. Without
        `holding` nothing waits."""
        self._open: dict[RequestId, Stream] = {}
        self._on_broken = on_broken
        self.holding = holding or Holding(HoldSettings(longest=0.0), clock=clock)
        self._clock = clock
        self._states = msgspec.msgpack.Encoder()
        self._outputs = msgspec.msgpack.Decoder(StepOutputs)
        self._ready: list[Stream] = []
        """To be delivered in this turn of the loop; may name a stream twice."""
        self._flushing = False
        self._due: dict[int, list[Stream]] = {}
        """Streams with something that waits, by its last moment in units of `SWEEP_SECONDS`. What
        has left meanwhile is still named."""
        self._sweeper: asyncio.TimerHandle | None = None

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

    def payload(self, request_id: RequestId, *, emitted_tokens: int | None = None) -> bytes:
        """The encoded `SequenceState` of an open stream (`Stream.state`)."""
        return self._states.encode(self._open[request_id].state(emitted_tokens))

    # --- tokens ---------------------------------------------------------------------------------

    def fan_out(self, payload: bytes, worker: WorkerId | None = None) -> int:
        """Book one step's `StepOutputs`, to be delivered in this turn of the loop (or later, under
        a hold); the number of tokens. What `worker` says of a stream that is another's is dropped.

        Raises `msgspec.MsgspecError` or `ValueError` when the payload is not `StepOutputs` with
        columns of one length; then nothing is booked."""
        outputs = self._outputs.decode(payload)
        ids, logprobs = outputs.ids, outputs.logprobs
        columns = (outputs.tokens, outputs.texts, ids if logprobs is None else logprobs)
        if any(len(column) != len(ids) for column in columns):
            raise ValueError("the columns of a step's outputs differ in length")
        num_tokens = self._book(outputs, worker)
        if self._ready:
            self._flush_soon()
        return num_tokens

    def _book(self, outputs: StepOutputs, worker: WorkerId | None) -> int:
        hold, get, ready = self.holding.seconds, self._open.get, self._ready
        texts, all_tokens, logprobs = outputs.texts, outputs.tokens, outputs.logprobs
        now = self._clock() if hold else 0.0
        num_tokens = 0
        for index, request_id in enumerate(outputs.ids):
            stream = get(request_id)
            if stream is None or stream.cancelled or stream.worker != worker:
                continue
            tokens = all_tokens[index]
            stream.emitted.extend(tokens)
            num_tokens += len(tokens)
            fresh = stream.tokens is None
            if fresh:
                stream.tokens, stream.text = tokens, texts[index]
                stream.logprobs = None if logprobs is None else logprobs[index]
            else:
                stream.join(tokens, texts[index], None if logprobs is None else logprobs[index])
            if not hold or not self._may_wait(stream, now, hold, fresh=fresh):
                ready.append(stream)
        return num_tokens

    def _may_wait(self, stream: Stream, now: float, hold: float, *, fresh: bool) -> bool:
        """Whether what the stream has can wait for its next token."""
        expected, stream.arrived = now + now - stream.arrived, now
        if not fresh:
            return expected <= stream.due
        bound = stream.bound if stream.bound < hold else hold
        stream.due = now + bound
        if not stream.begun or bound < SWEEP_SECONDS or expected > stream.due:
            return False
        self._due.setdefault(int(stream.due / SWEEP_SECONDS), []).append(stream)
        if self._sweeper is None:
            loop = asyncio.get_running_loop()
            self._sweeper = loop.call_later(SWEEP_SECONDS / 2, self._sweep)
        return True

    def _sweep(self) -> None:
        """Deliver what may not wait until the next sweep."""
        last = self._clock() + SWEEP_SECONDS
        for at in [at for at in self._due if at * SWEEP_SECONDS <= last]:
            named = [
                stream
                for stream in self._due.pop(at)
                if stream.tokens is not None and int(stream.due / SWEEP_SECONDS) == at
            ]
            self._ready += [stream for stream in named if stream.due <= last]
            if later := [stream for stream in named if stream.due > last]:
                self._due[at] = later
        self._sweeper = None
        if self._due:
            loop = asyncio.get_running_loop()
            self._sweeper = loop.call_later(SWEEP_SECONDS / 2, self._sweep)
        self._flush()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Deliver what is ready."""
        self._flushing = False
        batch, self._ready = self._ready[:DELIVERIES], self._ready[DELIVERIES:]
        for stream in batch:
            if stream.tokens is not None:
                self._deliver(stream)
        if self._ready:
            self._flush_soon()
        self.holding.look()

    def _deliver(self, stream: Stream) -> None:
        tokens = stream.tokens
        assert tokens is not None
        stream.tokens = None
        if stream.cancelled:
            stream.joined = None
            return
        text, joined = stream.text, stream.joined
        if joined is not None:
            stream.joined = None
            text = "".join([part for _, part in joined])
        if text:
            stream.begun = True
        holding = self.holding
        holding.num_pushes += 1
        holding.num_joined += len(tokens) - 1
        try:
            delta = Delta(tokens=tokens, text=text, logprobs=stream.logprobs, joined=joined)
            stream.sink.push(delta)
        except Exception:
            log.exception("a sink failed", extra={"request": stream.ticket.name})
            stream.cancelled = True
            self._on_broken(stream)

    # --- ends -----------------------------------------------------------------------------------

    def end(self, ended: Ended) -> Stream | None:
        """Say the one terminal event of a request, after all its tokens; its stream, or None if it
        was not open."""
        stream = self._open.pop(ended.request_id, None)
        if stream is None:
            return None
        if stream.tokens is not None:
            self._deliver(stream)
        end = End(
            reason=ended.reason,
            error=ended.error,
            message=ended.message,
            prompt_tokens=len(stream.prompt) // 4,
            cached_tokens=ended.cached_tokens,
            emitted_tokens=stream.num_emitted,
            times=ended.times,
            retry_after=ended.retry_after,
        )
        try:
            stream.sink.end(end)
        except Exception:
            log.exception("a sink failed at its end", extra={"request": stream.ticket.name})
        stream.ticket.one_ended()
        return stream

    def end_all(self, kind: ErrorKind, message: str) -> list[Stream]:
        """End every open stream with this error: the last resort of a node that cannot go on."""
        ends = [Ended(request_id=id_, error=kind, message=message) for id_ in self.ids()]
        return [stream for stream in map(self.end, ends) if stream is not None]
