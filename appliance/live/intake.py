"""How requests come in: what the surfaces submit becomes streams and `Arrived`s.

A submission with several answers is taken as a whole or not at all. What the Dispatcher says to a
request while it is being submitted goes to whoever submits it, and not to its sink.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec

from appliance.core.messages import Arrived, Cancelled, Ended, Reject
from appliance.core.types import ErrorKind, Request, RequestId
from appliance.live.pump import Pump
from appliance.live.records import Rejected, Sink, Submission, Ticket
from appliance.live.stats import NodeStats
from appliance.live.streams import Stream, Streams
from appliance.live.tokenise import TextService


class Intake:
    """Numbers requests, opens their streams, knows their names."""

    def __init__(
        self,
        pump: Pump,
        streams: Streams,
        *,
        text: TextService,
        stats: NodeStats,
        num_names: int,
        clock: Callable[[], float],
    ) -> None:
        """The last `num_names` submissions can be found by name."""
        self._pump = pump
        self._streams = streams
        self._text = text
        self._stats = stats
        self._num_names = num_names
        self._clock = clock
        self._next_id = 1
        self._names: OrderedDict[str, tuple[RequestId, ...]] = OrderedDict()
        self._submitting: RequestId | None = None
        self._reject: Reject | None = None
        """What the Dispatcher said to the request being submitted."""

    def ids_of(self, name: str) -> tuple[RequestId, ...] | None:
        """The requests of this submission; None when it is not (or no longer) known."""
        return self._names.get(name)

    def submit(self, spec: Submission, sinks: Sequence[Sink]) -> Ticket:
        """Serve this request with one answer per sink. Raises `Rejected`, then no sink is
        called."""
        prompt = spec.prompt
        if spec.salt != prompt.salt:
            prompt = self._text.name_blocks(prompt.ids, spec.salt)
        ids = tuple(RequestId(self._next_id + index) for index in range(len(sinks)))
        self._next_id += len(sinks)
        ticket = Ticket(spec.name, ids)
        packed, now = prompt.ids.tobytes(), self._clock()
        arrived = now if spec.arrived is None else min(spec.arrived, now)
        self._names[spec.name] = ids  # its story tells of a refusal, too
        if len(self._names) > self._num_names:
            self._names.popitem(last=False)
        for index, (request_id, sink) in enumerate(zip(ids, sinks, strict=True)):
            sampling = msgspec.structs.replace(spec.sampling, seed=spec.sampling.seed + index)
            self._streams.open(
                Stream(
                    request_id,
                    ticket,
                    sink=sink,
                    prompt=packed,
                    sampling=sampling,
                    salt=spec.salt,
                    bound=spec.slo.tpot,
                    slo_class=spec.slo.class_name,
                )
            )
            request = Request(
                id=request_id,
                arrived=arrived,
                prompt_tokens=len(prompt.ids),
                max_tokens=spec.max_tokens,
                slo=spec.slo,
                prefix_hashes=prompt.hashes,
                group=ids[0] if len(ids) > 1 else None,
                tenant=spec.tenant,
                priority=spec.priority,
            )
            reject = self._offer(request)
            if reject is not None:
                self._take_back(ids[:index])
                self._stats.refused[spec.slo.class_name, reject.kind.value] += len(sinks)
                raise Rejected(reject.kind, reject.reason, reject.retry_after)
        self._stats.submitted += 1
        self._stats.sequences += len(ids)
        return ticket

    def rejected(self, reject: Reject) -> None:
        """The Dispatcher does not take a request (any more)."""
        self._stats.rejected[reject.kind.value] += 1
        request_id = reject.request_id
        if request_id == self._submitting:
            self._reject = reject
            self._streams.forget(request_id)
        else:
            end = Ended(
                request_id=request_id,
                error=reject.kind,
                message=reject.reason,
                retry_after=reject.retry_after,
            )
            stream = self._streams.end(end)
            if stream is not None:
                self._stats.refused[stream.slo_class, reject.kind.value] += 1

    def broke(self, words: str) -> None:
        """The scheduler failed: every open answer ends with these words."""
        for stream in self._streams.end_all(ErrorKind.INTERNAL, words):
            self._stats.ended_badly(stream.slo_class, ErrorKind.INTERNAL)

    def _offer(self, request: Request) -> Reject | None:
        """Let the Dispatcher hear of a request; its refusal, None if it accepts."""
        self._submitting, self._reject = request.id, None
        self._pump.post("api", Arrived(request=request))
        self._submitting = None
        broken = self._pump.failure
        if broken:  # by a request of this submission: those after it are not heard any more
            self.broke(broken)
        return self._reject

    def _take_back(self, ids: Sequence[RequestId]) -> None:
        """Undo accepted answers of a submission whose later answer was refused; nobody hears of
        it."""
        for request_id in ids:
            self._streams.forget(request_id)
            self._pump.post("api", Cancelled(request_id=request_id))
