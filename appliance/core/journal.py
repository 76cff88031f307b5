"""What a Dispatcher heard and said, in order: the node's memory of why.

A journal is a bounded ring of packed records, each one call of `Dispatcher.handle`: sequence
number, time, who spoke, the input, the outputs. The first thing in it is a header with everything
the Dispatcher was built from, so a complete journal can be *replayed*: a fresh Dispatcher that
hears the same inputs must say the same outputs (laws 6 and 12).

Beside the ring runs an index from live and recent requests to the records that moved them, kept so
small that it costs a step report two set operations. `story` reads it; it is the answer of
`GET /admin/requests/{id}`.

The core writes no file. A shell that wants one gives a `write` callback, which receives every line
(a JSON document, without its newline) and must not block."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import msgspec

from appliance.core.messages import (
    Aborted,
    Arrived,
    Assign,
    Cancelled,
    Degrade,
    Ended,
    Event,
    Input,
    KvPulled,
    Migrate,
    Output,
    Preempted,
    Prefilled,
    PrefixPulled,
    Pull,
    PullFailed,
    Refused,
    Release,
    Released,
    Report,
    Resume,
    StepReported,
    WorkerDown,
)
from appliance.core.node_config import DispatcherConfig
from appliance.core.story import chapters
from appliance.core.types import Record, RequestId, Tagged, WorkerId, WorkerSpec

VERSION = 1


class JournalHeader(Record, frozen=True, kw_only=True):
    """What the Dispatcher was built from."""

    version: int = VERSION
    config: DispatcherConfig
    workers: tuple[WorkerSpec, ...]
    policy: str
    settings: dict[str, Any] = msgspec.field(default_factory=dict)
    roles: dict[str, Any] | None = None
    """Settings of the controller of roles; None: there is none."""


class JournalRecord(Record, frozen=True, kw_only=True, array_like=True):
    """One call: `source` says who spoke ("api", "worker", "timer", ...)."""

    seq: int
    now: float
    source: str
    input: Event | Report
    outputs: list[Output]


class JournalError(Exception):
    """The bytes are not a journal, or not a complete one."""


class ReplayDiffers(Exception):
    """A fresh Dispatcher said something else; `seq` is the first record where it did."""

    def __init__(self, seq: int, words: str) -> None:
        super().__init__(words)
        self.seq = seq


class Hears(Protocol):
    """What replay needs of a Dispatcher."""

    def handle(self, message: Input, now: float) -> list[Output]: ...


class Journal:
    """The ring, its index, and the lines for a file. Changed by `record` alone."""

    def __init__(
        self,
        header: JournalHeader,
        *,
        ring_records: int = 20_000,
        write: Callable[[bytes], None] | None = None,
    ) -> None:
        """Keeps the last `ring_records` (>= 1) calls. `write` gets the header's line at once and
        each record's line when it is made."""
        if ring_records < 1:
            raise ValueError(f"journal.ring_records must be at least 1, got {ring_records}")
        self.header = header
        self._pack = msgspec.msgpack.Encoder()
        self._unpack = msgspec.msgpack.Decoder(JournalRecord)
        self._json = msgspec.json.Encoder()
        self._ring: deque[tuple[bytes, tuple[RequestId, ...]]] = deque()
        self._ring_records = ring_records
        self._seq = 0
        self._index: dict[RequestId, deque[int]] = {}
        self._at: dict[RequestId, WorkerId] = {}
        self._no_token: set[RequestId] = set()
        self._write = write
        if write is not None:
            write(self._json.encode(header))

    def __len__(self) -> int:
        return len(self._ring)

    @property
    def next_seq(self) -> int:
        """Number of records ever made."""
        return self._seq

    def record(self, now: float, source: str, message: Input, outputs: Sequence[Output]) -> None:
        """Keep one call; the oldest one is forgotten when the ring is full."""
        entry = JournalRecord(
            seq=self._seq, now=now, source=source, input=message, outputs=list(outputs)
        )
        ids = self._moved(message, outputs)
        for request_id in ids:
            self._index.setdefault(request_id, deque()).append(self._seq)
        self._ring.append((self._pack.encode(entry), ids))
        self._seq += 1
        if len(self._ring) > self._ring_records:
            self._forget()
        if self._write is not None:
            self._write(self._json.encode(entry))

    def records(self) -> Iterator[JournalRecord]:
        """Those kept, oldest first."""
        for packed, _ in self._ring:
            yield self._unpack.decode(packed)

    def lines(self) -> Iterator[bytes]:
        """Header and records as JSON lines without newlines."""
        yield self._json.encode(self.header)
        for entry in self.records():
            yield self._json.encode(entry)

    def story(self, request_id: RequestId) -> list[dict[str, Any]]:
        """What happened to a request, in order: `at` (seconds), `seq`, `what`, and the facts.
        Empty if nothing of it is kept. Of steps only the first token after each placement and the
        end show."""
        oldest = self._seq - len(self._ring)
        story: list[dict[str, Any]] = []
        waits_for_token = False
        for seq in self._index.get(request_id, ()):
            entry = self._unpack.decode(self._ring[seq - oldest][0])
            for what, facts in chapters(entry.input, entry.outputs, request_id):
                if what in ("Assign", "KvPulled"):
                    waits_for_token = True
                elif what == "FirstToken":
                    if not waits_for_token:
                        continue
                    waits_for_token = False
                story.append({"at": entry.now, "seq": seq, "what": what, **facts})
        return story

    def _moved(self, message: Input, outputs: Sequence[Output]) -> tuple[RequestId, ...]:
        """Requests that this call moved."""
        ids: dict[RequestId, None] = {}
        match message:
            case StepReported():
                if self._no_token and not self._no_token.isdisjoint(message.ids):
                    fresh = self._no_token.intersection(message.ids)
                    self._no_token -= fresh
                    ids.update(dict.fromkeys(sorted(fresh)))
                ids.update(dict.fromkeys(end.id for end in message.finished))
            case WorkerDown():
                lost = [id_ for id_, worker in self._at.items() if worker == message.worker]
                ids.update(dict.fromkeys(lost))
            case Arrived():
                ids[message.request.id] = None
            case (
                Cancelled() | Preempted() | Prefilled() | PullFailed() | PrefixPulled() | Released()
            ) if message.request_id in self._index:
                ids[message.request_id] = None
            case KvPulled() if message.request_id in self._index:
                ids[message.request_id] = None
                if message.request_id in self._at:
                    self._at[message.request_id] = message.worker
                    self._no_token.add(message.request_id)
            case Aborted(request_id=int(gone)) | Refused(request_id=int(gone)):
                self._at.pop(RequestId(gone), None)
                if gone in self._index:
                    ids[RequestId(gone)] = None
            case _:
                pass
        for output in outputs:
            self._follow(output, ids)
        return tuple(ids)

    def _follow(self, output: Output, ids: dict[RequestId, None]) -> None:
        if isinstance(output, Assign):
            request_id = output.request.id
            ids[request_id] = None
            self._at[request_id] = output.worker
            self._no_token.add(request_id)
        elif isinstance(output, Pull):
            ids[output.request.id] = None
        elif isinstance(output, Migrate | Resume | Release | Degrade):
            ids[output.request_id] = None
        elif isinstance(output, Ended):
            ids[output.request_id] = None
            self._at.pop(output.request_id, None)
            self._no_token.discard(output.request_id)

    def _forget(self) -> None:
        seq = self._seq - len(self._ring)
        _, ids = self._ring.popleft()
        for request_id in ids:
            places = self._index[request_id]
            if places and places[0] == seq:
                places.popleft()
            if not places:
                del self._index[request_id]


def load(lines: Iterable[bytes]) -> tuple[JournalHeader, list[JournalRecord]]:
    """Read JSON lines (blank ones are skipped). Raises `JournalError` naming the line."""
    decode = msgspec.json.Decoder(JournalRecord).decode
    header: JournalHeader | None = None
    records: list[JournalRecord] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            if header is None:
                header = msgspec.json.decode(line, type=JournalHeader)
            else:
                records.append(decode(line))
        except msgspec.MsgspecError as error:
            raise JournalError(f"line {number} is not part of a journal: {error}") from error
    if header is None:
        raise JournalError("the journal is empty: not even its header is there")
    return header, records


def replay(
    header: JournalHeader,
    records: Iterable[JournalRecord],
    *,
    make: Callable[[JournalHeader], Hears],
) -> int:
    """Let a fresh Dispatcher hear the journal and compare what it says; returns the number of
    calls.

    Raises `JournalError` for a journal that lacks its beginning or a record, `ReplayDiffers` at the
    first difference."""
    if header.version != VERSION:
        raise JournalError(f"journal of version {header.version}; this reads version {VERSION}")
    fresh = make(header)
    count = 0
    for entry in records:
        if entry.seq != count:
            lost = "its beginning" if count == 0 else f"records {count} to {entry.seq - 1}"
            raise JournalError(f"the journal has lost {lost}; only a complete one can be replayed")
        said = fresh.handle(entry.input, entry.now)
        if said != entry.outputs:
            raise ReplayDiffers(entry.seq, _difference(entry, said))
        count += 1
    return count


def _difference(entry: JournalRecord, said: Sequence[Output]) -> str:
    kept = entry.outputs
    index = next(
        (i for i, (a, b) in enumerate(zip(kept, said, strict=False)) if a != b),
        min(len(kept), len(said)),
    )
    first = _shown(kept[index]) if index < len(kept) else "nothing"
    second = _shown(said[index]) if index < len(said) else "nothing"
    return (
        f"record {entry.seq} at {entry.now:.6f} heard {_shown(entry.input)}\n"
        f"  output {index} in the journal: {first}\n"
        f"  output {index} of the replay:  {second}"
    )


def _shown(message: Tagged) -> str:
    return msgspec.json.encode(message).decode()
