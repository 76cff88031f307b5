"""The part of a worker that lets KV move: between its Batcher, its peers and the copying thread.

The Batcher decides what is said and what is copied; here it is carried out, in an order that others
rely on:

* the shared index says that blocks were taken before anything writes them (`write_index`), and
  that they have a name only after they are complete;
* what the Batcher reports goes to the node before what it says to a peer: a target that decodes can
  then never be heard of before the source was heard to have stopped;
* `KvPulled` leaves in a frame of its own, before the first step that computes the sequence;
* news of peers is read before the commands that may name them.

A worker without peers has all of this but nobody to talk to: a move to it fails by name.
"""

import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from appliance.core.batcher import Batcher
from appliance.core.messages import (
    HOST_TIER,
    Aborted,
    Command,
    KvPulled,
    LinkDown,
    LinkUp,
    Migrate,
    Park,
    Prefilled,
    Pull,
    PullFailed,
    Refused,
    Release,
    Report,
    Resume,
    RoleChanged,
    SetRole,
    Wake,
)
from appliance.core.payload import SequenceState
from appliance.core.peer import (
    Asked,
    CopyDone,
    CopyJob,
    Dropped,
    FetchDone,
    FetchJob,
    Offered,
    PeerMessage,
    Withdrawn,
)
from appliance.core.types import BlockHash, ErrorKind, MoveId, RequestId, WorkerId
from appliance.worker.arrivals import Arrival, Arrivals
from appliance.worker.engine import Engine
from appliance.worker.fault_actions import FaultPoints
from appliance.worker.host_memory import HostMemory
from appliance.worker.kv_index import OwnIndex
from appliance.worker.links import Heard, Links, Lost, News, Opened, Ready
from appliance.worker.mover import Done, Mover, Probed
from appliance.worker.sequence_state import ServedSequence
from appliance.worker.transfer import PeerPool

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ties:
    """What a worker with peers has."""

    index: OwnIndex
    links: Links
    mover: Mover
    host: HostMemory | None = None
    """Of the host tier; None: there is no tier."""


class Host(Protocol):
    """What the step loop does for the moves."""

    def tell(self, reports: Sequence[Report]) -> None:
        """Send these reports, then what follows from them (`Moves.flush`)."""

    @property
    def sequences(self) -> Mapping[RequestId, ServedSequence]:
        """All that are served here."""

    def begin(self, request_id: RequestId, served: ServedSequence) -> None:
        """This sequence has arrived and is known to the engine."""


class Moves:
    """See the module's text. Belongs to the step loop."""

    def __init__(
        self,
        worker: WorkerId,
        ties: Ties | None,
        *,
        host: Host,
        batcher: Batcher,
        engine: Engine,
        faults: FaultPoints,
        clock: Callable[[], float],
    ) -> None:
        self._worker = worker
        self._ties = ties
        self._host = host
        self._batcher = batcher
        self._faults = faults
        self._clock = clock
        self._arrivals = Arrivals(engine)
        self._engine = engine
        if ties is not None:
            ties.links.also(ties.mover.fileno())
        self.fds: tuple[int, ...] = () if ties is None else (ties.links.fileno(),)
        """What to wait for beside the control channel: readable when `hear` has something to do."""

    # --- commands -------------------------------------------------------------------------------

    def pull(self, command: Pull, state: SequenceState, served: ServedSequence) -> Sequence[Report]:
        """Expect this sequence; the hashes of `command.request` name all of its full blocks."""
        if self._faults.refuses("move.pull"):
            return [self._refused(command, command.request.id)]
        move = command.move
        self._arrivals.expect(move, Arrival(command.request.id, command.source, state, served))
        reports = self._batcher.handle(command, self._clock())
        for report in reports:
            if isinstance(report, Refused) and report.request_id == command.request.id:
                self._arrivals.drop(move)
        return reports

    def obey(self, command: Command) -> Sequence[Report]:
        """Any other command that has to do with moves and roles."""
        faults = self._faults
        match command:
            case Migrate(request_id=request_id):
                if faults.refuses("move.migrate"):
                    return [self._refused(command, request_id)]
            case Release():
                faults.reach("move.release")
            case Resume():
                faults.reach("move.resume")
            case SetRole():
                if faults.refuses("role.set"):
                    return [self._refused(command)]
            case Park():
                if faults.refuses("worker.park"):
                    return [self._refused(command)]
            case Wake():
                faults.reach("worker.wake")
            case _:
                pass
        return self._batcher.handle(command, self._clock())

    # --- what happens ---------------------------------------------------------------------------

    def hear_node(self) -> None:
        """Take in what the node has said about peers; before its commands are obeyed."""
        if self._ties is not None:
            for news in self._ties.links.hear_node():
                self._take(news)

    def hear(self) -> None:
        """Take in all that has happened with peers and copies."""
        if self._ties is not None:
            for news in self._ties.links.hear():
                self._take(news)

    def _take(self, news: News) -> None:
        match news:
            case Heard(peer=peer, message=message, payload=payload):
                self._hear_peer(peer, message, payload)
            case Ready():
                for done in self._drain():
                    self._finish(done)
            case Opened(peer=peer, epoch=epoch, pool=pool):
                if self._ties is not None:
                    self._ties.mover.probe(peer, epoch, pool)
            case Lost(peer=peer, epoch=epoch, reason=reason):
                self._lose(peer, epoch, reason)

    def _drain(self) -> Sequence[Done]:
        return () if self._ties is None else self._ties.mover.drain()

    def _hear_peer(self, peer: WorkerId, message: PeerMessage, payload: bytes) -> None:
        hashes: tuple[BlockHash, ...] = ()
        arrival = self._arrivals.get(message.move) if isinstance(message, Offered) else None
        if isinstance(message, Offered) and arrival is not None and arrival.source == peer:
            if arrival.pool is None and self._ties is not None:
                arrival.pool = self._ties.links.pool(peer)
            if message.final and not arrival.is_known:
                try:
                    if len(payload) != 4 * message.num_emitted:
                        raise ValueError(
                            f"{len(payload)} bytes of ids came for {message.num_emitted} tokens"
                        )
                    hashes = arrival.complete(payload, self._engine)
                except ValueError as error:
                    log.error("last offer is no good", extra={"peer": peer, "reason": str(error)})
                    self._ring(peer, Dropped(move=message.move, reason=str(error)))
                    message = Withdrawn(move=message.move, reason=str(error))
        now = self._clock()
        self._host.tell(self._batcher.hear_peer(peer, message, now, hashes=hashes))

    def _finish(self, done: Done) -> None:
        match done:
            case CopyDone():
                self._host.tell(self._batcher.copied(done, self._clock()))
            case FetchDone():
                self._host.tell(self._batcher.fetched(done, self._clock()))
            case Probed(peer=peer, epoch=epoch):
                self._probed(peer, epoch, done)

    def _probed(self, peer: WorkerId, epoch: int, probed: Probed) -> None:
        if self._ties is None or self._ties.links.epoch(peer) != epoch:
            return  # it died meanwhile, which was said
        if probed.failed:
            self._host.tell([self._down(peer, epoch, probed.failed)])
            return
        words = {"peer": peer, "path": probed.path, "bytes_per_second": probed.bytes_per_second}
        log.debug("link is up", extra=words)
        up = LinkUp(
            worker=self._worker,
            peer=peer,
            peer_epoch=epoch,
            path=probed.path,
            bytes_per_second=probed.bytes_per_second,
        )
        self._host.tell([up])

    def _lose(self, peer: WorkerId, epoch: int, reason: str) -> None:
        log.debug("link is down", extra={"peer": peer, "reason": reason})
        lost = self._batcher.peer_lost(peer, self._clock())
        self._host.tell([self._down(peer, epoch, reason), *lost])

    def _down(self, peer: WorkerId, epoch: int, reason: str) -> LinkDown:
        return LinkDown(worker=self._worker, peer=peer, peer_epoch=epoch, reason=reason)

    # --- what follows from reports --------------------------------------------------------------

    def before(self, report: Report) -> None:
        """This report is about to be sent."""
        match report:
            case KvPulled(move=move, request_id=request_id):
                arrival = self._arrivals.take(move)
                self._host.begin(request_id, arrival.served)
                self._faults.reach("move.before_pulled")
            case Prefilled():
                self._faults.reach("move.before_prefilled")
            case RoleChanged():
                self._faults.reach("role.changed")
            case PullFailed(move=move):
                self._arrivals.drop(move)
            case Aborted(request_id=request_id):
                self._arrivals.drop_request(request_id)
            case _:
                pass

    def write_index(self) -> None:
        """Save what is about to be overwritten to the host tier, then let the shared index say what
        the Batcher has done to blocks."""
        spills = self._batcher.drain_spills()
        if spills and self._ties is not None and self._ties.host is not None:
            self._ties.host.keep(spills)
        changes = self._batcher.drain_index()
        if self._ties is not None and (changes.taken or changes.named):
            self._ties.index.apply(changes)

    def flush(self) -> None:
        """Carry out what the Batcher wants said and copied. Its reports were sent."""
        self.write_index()
        lost: list[WorkerId] = []
        for peer, message in self._batcher.drain_peer():
            if not self._say(peer, message) and not isinstance(message, Withdrawn | Dropped):
                lost.append(peer)
        for copy in self._batcher.drain_copies():
            self._copy(copy)
        for fetch in self._batcher.drain_fetches():
            self._fetch(fetch)
        for peer in dict.fromkeys(lost):
            self._host.tell(self._batcher.peer_lost(peer, self._clock()))
        if self._ties is not None:
            for news in self._ties.links.failed():
                self._take(news)

    def _say(self, peer: WorkerId, message: PeerMessage) -> bool:
        match message:
            case Offered(move=move, final=True):
                self._faults.reach("move.before_final")
                told = self._ring(peer, message, self._ids_of(move, message))
                self._faults.reach("move.after_final")
                return told
            case Offered():
                self._faults.reach("move.offered")
            case Asked():
                self._faults.reach("move.asked")
            case _:
                pass
        return self._ring(peer, message)

    def _ids_of(self, move: MoveId, offer: Offered) -> bytes:
        request_id = self._batcher.request_of(move)
        served = None if request_id is None else self._host.sequences.get(request_id)
        emitted = array("i") if served is None else served.emitted
        if len(emitted) != offer.num_emitted:
            raise RuntimeError(
                f"move {move}: the Batcher has {offer.num_emitted} emitted tokens, the loop "
                f"{len(emitted)}"
            )
        return emitted.tobytes()

    def _ring(self, peer: WorkerId, message: PeerMessage, payload: bytes = b"") -> bool:
        return self._ties is not None and self._ties.links.ring(peer, message, payload)

    def _copy(self, job: CopyJob) -> None:
        arrival = self._arrivals.get(job.move)
        if self._ties is not None and arrival is not None and arrival.pool is not None:
            self._ties.mover.copy(job, arrival.pool)
            return
        failed = f"the pool of worker {job.peer} is not here"
        done = CopyDone(move=job.move, num_bytes=0, seconds=0.0, path="none", failed=failed)
        self._host.tell(self._batcher.copied(done, self._clock()))

    def _fetch(self, job: FetchJob) -> None:
        pool = self._pool_of(job.peer)
        if self._ties is not None and pool is not None:
            self._ties.mover.fetch(job, pool)
            return
        whose = "the host tier" if job.peer == HOST_TIER else f"worker {job.peer}"
        done = FetchDone(
            request_id=job.request_id,
            num_blocks=0,
            num_bytes=0,
            seconds=0.0,
            path="none",
            reason=f"the pool of {whose} is not here",
        )
        self._host.tell(self._batcher.fetched(done, self._clock()))

    def _pool_of(self, peer: WorkerId) -> PeerPool | None:
        if self._ties is None:
            return None
        if peer == HOST_TIER:
            return None if self._ties.host is None else self._ties.host.pool
        return self._ties.links.pool(peer)

    def _refused(self, command: Command, request_id: RequestId | None = None) -> Refused:
        return Refused(
            worker=self._worker,
            command=type(command).__name__,
            kind=ErrorKind.INTERNAL,
            reason="refused by a plan of faults",
            request_id=request_id,
        )
