"""The live node: the shell around the Dispatcher.

Everything that happens (a request, a frame of a worker, a death, a timer) becomes one message to
the Dispatcher, in the order in which it happened; what the Dispatcher says is carried out at
once, and nothing else is ever done. Messages that come up while one is being handled (a sink that
gives up in the middle of a frame) wait in the inbox. Nothing on this path is awaited and no task
is woken per token.

A frame is handled in this order: its tokens are booked with their streams, then its reports go to
the Dispatcher. Streams deliver at the end of the turn (`appliance.live.streams`) and before an
answer's end, so the last text of an answer always precedes its end.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, assert_never

import msgspec

from appliance.core.asks import Answered, Decided
from appliance.core.dispatcher import Dispatcher
from appliance.core.journal import Journal, JournalHeader
from appliance.core.lifecycle import WorkerState
from appliance.core.messages import (
    Abort,
    Assign,
    Cancelled,
    Degrade,
    DrainExpired,
    DrainStarted,
    Ended,
    Input,
    KvPulled,
    LoadWeights,
    Migrate,
    Output,
    Park,
    Pull,
    Quarantine,
    Reject,
    Release,
    Report,
    Resume,
    SetBudget,
    SetRole,
    StartWorker,
    Wake,
    Woke,
    WorkerDown,
    WorkerUp,
)
from appliance.core.slots import Policy
from appliance.core.start import WorkerStart
from appliance.core.types import ErrorKind, WorkerId
from appliance.live import admin
from appliance.live.asks import Asks
from appliance.live.bookkeeping import Bookkeeper
from appliance.live.holding import Holding
from appliance.live.intake import Intake
from appliance.live.journal_file import JournalFile
from appliance.live.moves import Moves
from appliance.live.pump import Pump
from appliance.live.records import Health, NodeInfo, Rejected, Sink, Submission, Ticket
from appliance.live.settings import NodeSettings
from appliance.live.slabs import SlabError
from appliance.live.spawner import Spawner
from appliance.live.stats import NodeStats
from appliance.live.streams import Stream, Streams
from appliance.live.tokenise import TextService
from appliance.live.workers import Workers

log = logging.getLogger(__name__)


class StartFailed(Exception):
    """No worker can serve. The message ends with the cause and the fix."""


class Node:
    """One model on some workers. Every method belongs to the loop's thread."""

    def __init__(
        self,
        settings: NodeSettings,
        text: TextService,
        *,
        policy: Policy,
        spawner: Spawner,
        stderr: Callable[[str], object],
        journal_file: JournalFile | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`stderr` takes the lines that workers write to theirs. The node closes `text`,
        `spawner` and `journal_file` when it is closed."""
        self.settings = settings
        self.text = text
        self.info = _make_info(settings, policy, vocab_size=text.vocab_size)
        self.dispatcher = Dispatcher(
            settings.dispatcher,
            workers=settings.workers,
            policy=policy.dispatch,
            validate=settings.validate,
        )
        known = (*settings.workers, *settings.dispatcher.spares)
        self.specs = {spec.id: spec for spec in known}
        """Every worker ever asked for, and those that the controller may ask for."""
        self.stats = NodeStats(tuple(spec.id for spec in settings.workers))
        self.moves = Moves()
        self.started_at = clock()
        self.broken = ""
        """Why the node cannot go on at all; empty while it can."""
        self.failure: asyncio.Future[str] | None = None
        """From the start on: resolves with words when the node breaks."""
        self._closed = False
        self._clock = clock
        self._journal = _make_journal(settings, journal_file)
        self._pump = Pump(self.dispatcher, self._journal, hands=self, clock=clock)
        self._journal_file = journal_file
        self._spawner = spawner
        self._stderr = stderr
        self.holding = Holding(settings.holding, clock=clock)
        """How long tokens wait to leave together, and what that did."""
        self._streams = Streams(on_broken=self._sink_broke, holding=self.holding, clock=clock)
        self._intake = Intake(
            self._pump,
            self._streams,
            text=text,
            stats=self.stats,
            num_names=settings.journal_records // 2,  # a story has two or more
            clock=clock,
        )
        self.asks = Asks(lambda ask: self._pump.post("operator", ask), specs=self.specs)
        """What operators ask of the node."""
        self._books = Bookkeeper(self.dispatcher, stats=self.stats, moves=self.moves, clock=clock)
        self._waiters: list[asyncio.Future[None]] = []
        self.workers = Workers(
            settings.pool,
            spawner,
            make_start=self._make_start,
            events=self,
            watch=settings.watch,
            clock=clock,
            busy=self._busy,
        )

    # --- life of the node ----------------------------------------------------------------------

    def start(self) -> None:
        """Start all workers; returns at once. Needs the running loop."""
        loop = asyncio.get_running_loop()
        self.failure = loop.create_future()
        self._spawner.attach(loop, lambda: self._books.milestone("imports done"))
        self.workers.open()
        self._pump.post("clock", Woke())

    async def wait_ready(self, num_workers: int = 1) -> None:
        """Return when that many workers are ready. Raises `StartFailed` when no worker is left that
        could get ready by itself."""
        while self._num_in(WorkerState.READY) < num_workers:
            if self.broken:
                raise StartFailed(self.broken)
            if self._num_in(*admin.OUT_OF_SERVICE) == len(self.dispatcher.view.workers):
                raise StartFailed("no worker could be started: " + admin.why_none(self))
            await self._change()

    async def wait_links(self, seconds: float) -> list[tuple[WorkerId, WorkerId]]:
        """Return when all workers are up and every two of them have probed their link, after
        `seconds` at most; the (source, target)s that are missing."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._num_in(WorkerState.STARTING) or admin.missing_links(self):
                    await self._change()
        return admin.missing_links(self)

    async def drain(self, seconds: float) -> bool:
        """Admit nothing more and let what is under way end, for `seconds` at most; the rest is
        ended with a typed error. True when nothing had to be cut."""
        self._pump.post("node", DrainStarted())
        try:
            async with asyncio.timeout(seconds):
                while len(self._streams):
                    await self._change()
        except TimeoutError:
            self._pump.post("node", DrainExpired())
            return False
        return True

    async def close(self) -> None:
        """End what is still under way with a typed error, then workers, fork server and threads."""
        if len(self._streams):
            self._pump.post("node", DrainStarted())
            self._pump.post("node", DrainExpired())
        self._closed = True
        self._pump.stop()
        self.asks.refuse("the server is shutting down")
        await self.workers.close()
        self._spawner.close()
        self.text.close()
        if self._journal_file is not None:
            self._journal_file.close()

    # --- what the surfaces ask for -------------------------------------------------------------

    def submit(self, spec: Submission, sinks: Sequence[Sink]) -> Ticket:
        """Serve this request with one answer per sink. Raises `Rejected`, then no sink is
        called."""
        if self.broken:
            refusal = Rejected(ErrorKind.INTERNAL, self.broken)
        elif self._closed:
            refusal = Rejected(ErrorKind.DRAINING, "the server is shutting down")
        else:
            return self._intake.submit(spec, sinks)
        self.stats.turned_away(spec.slo.class_name, refusal.kind.value, num_answers=len(sinks))
        raise refusal

    def cancel(self, ticket: Ticket, kind: ErrorKind = ErrorKind.CANCELLED) -> None:
        """Give up all answers of this ticket that have not ended. Idempotent."""
        for request_id in ticket.request_ids:
            stream = self._streams.get(request_id)
            if stream is not None and not stream.cancelled:
                stream.cancelled = True
                self._pump.post("api", Cancelled(request_id=request_id, kind=kind))

    def now(self) -> float:
        """Seconds on the node's clock."""
        return self._clock()

    def state(self) -> dict[str, Any]:
        """The document of `/admin/state`."""
        return admin.state_document(self, self._clock())

    def story(self, name: str) -> dict[str, Any] | None:
        """What happened to the request of this name; None when it is not (or no longer) known."""
        ids = self._intake.ids_of(name)
        if ids is None:
            return None
        answers = [{"id": each, "events": self._journal.story(each)} for each in ids]
        return {"name": name, "answers": answers}

    def health(self) -> Health:
        """Whether the node makes progress: idle and a long step are healthy, a stall is not."""
        return admin.health(self, self._clock())

    def ready(self) -> tuple[bool, str]:
        """Whether a request would be served now, and why not."""
        if self.broken:
            return False, self.broken
        if self.dispatcher.is_draining:
            return False, "the server is shutting down"
        if self._num_in(WorkerState.READY) == 0:
            return False, "no worker is ready"
        return True, "ready"

    @property
    def instance_seconds(self) -> float:
        """What the workers have cost so far: seconds that each was not parked, summed."""
        return self.dispatcher.instance_seconds(self._clock())

    @property
    def timeline(self) -> Sequence[tuple[float, str]]:
        """What happened during the start: (time on the node's clock, words)."""
        return self._books.timeline

    @property
    def unready_since(self) -> float | None:
        """Since when no worker has been ready; None while one is."""
        return self._books.unready_since

    @property
    def is_ending(self) -> bool:
        """Whether it drains, or is closed."""
        return self._closed or self.dispatcher.is_draining

    @property
    def num_open(self) -> int:
        """Answers under way."""
        return len(self._streams)

    # --- what workers say (WorkerEvents) -------------------------------------------------------

    def frame(self, worker: WorkerId, reports: list[Report], payload: bytes) -> None:
        """One frame of a living worker: heard now, or when what comes before it was heard."""
        if self.moves.holds(worker, reports, payload):
            return
        self._hear(worker, reports, payload)
        while (frame := self.moves.next_frame()) is not None:
            self._hear(*frame)

    def _hear(self, worker: WorkerId, reports: list[Report], payload: bytes) -> None:
        if self.broken:
            return
        if payload:
            try:
                self.stats.emitted_tokens += self._streams.fan_out(payload, worker)
            except (msgspec.MsgspecError, ValueError) as error:
                self.workers.kill(worker, f"it broke the protocol: {error}")
                return
        self._pump.post_all(f"worker {worker}", reports)

    def down(self, worker: WorkerId, epoch: int, cause: str) -> None:
        """A worker's process is gone."""
        stats = self.stats.worker(worker)
        stats.deaths += 1
        stats.last_cause = cause
        log.error("worker has died", extra={"worker": worker, "epoch": epoch, "cause": cause})
        self._pump.post("node", WorkerDown(worker=worker, epoch=epoch, cause=cause))
        while (frame := self.moves.next_frame()) is not None:  # nobody waits for the dead
            self._hear(*frame)

    def stderr(self, worker: WorkerId, line: str) -> None:
        """A worker wrote a line to its standard error."""
        del worker  # the line says so itself
        with suppress(OSError, ValueError):  # whoever read our stderr has gone: serve on
            self._stderr(line)

    # --- what the Dispatcher says (Hands) ------------------------------------------------------

    def carry_out(self, output: Output, now: float) -> None:
        """Do what the Dispatcher said."""
        match output:
            case Assign():
                self._assign(output, now)
            case Pull():
                self._pull(output, now)
            case Migrate():
                self.moves.migrating(output)
                self.workers.send(output.worker, output)
            case Resume():
                self.moves.resuming(output)
                self.workers.send(output.worker, output)
            case Abort() | Release() | SetRole() | SetBudget():
                self.workers.send(output.worker, output)
            case LoadWeights() | Park() | Wake():
                self.workers.send(output.worker, output)
            case Reject():
                self._intake.rejected(output)
            case Degrade():
                self._degraded(output)
            case Ended():
                self._ended(output)
            case StartWorker():
                self._start_worker(output.worker, output.epoch)
            case Quarantine():
                log.error(
                    "worker is quarantined",
                    extra={"worker": output.worker, "reason": output.reason},
                )
            case Answered():
                self.asks.answered(output)
            case Decided():
                self.asks.decided(output)
            case never:
                assert_never(never)

    def _assign(self, command: Assign, now: float) -> None:
        request_id = command.request.id
        self.moves.given_up(request_id)
        stream = self._streams.get(request_id)
        if stream is None or stream.num_emitted != command.emitted_tokens:
            self._miscounted(command, stream)
            return
        if command.emitted_tokens:
            self.stats.replaced += 1
        if self.dispatcher.view.workers[command.worker].assigned <= 1:
            self.stats.worker(command.worker).moved_at = now
        stream.worker = command.worker
        self.workers.send(command.worker, command, self._streams.payload(request_id))

    def _pull(self, command: Pull, now: float) -> None:
        """Tokens of this turn that the Dispatcher has not counted yet may be in the stream: the
        target learns them from its source."""
        request_id = command.request.id
        stream = self._streams.get(request_id)
        if stream is None or stream.num_emitted < command.emitted_tokens:
            self._miscounted(command, stream)
            return
        self.moves.begun(command, now)
        payload = self._streams.payload(request_id, emitted_tokens=command.emitted_tokens)
        self.workers.send(command.worker, command, payload)

    def _miscounted(self, command: Assign | Pull, stream: Stream | None) -> None:
        request_id, sent = command.request.id, None if stream is None else stream.num_emitted
        log.error(
            "tokens sent and tokens counted differ: the request is given up",
            extra={"request": request_id, "sent": sent, "counted": command.emitted_tokens},
        )
        self._pump.post("node", Cancelled(request_id=request_id, kind=ErrorKind.INTERNAL))

    def _ended(self, ended: Ended) -> None:
        self.moves.given_up(ended.request_id)
        stream = self._streams.end(ended)
        if stream is None:
            return
        how = ended.reason or ended.error
        self.stats.ended[how.value if how is not None else "?"] += 1
        self.stats.prompt_tokens += len(stream.prompt) // 4
        self.stats.cached_tokens += ended.cached_tokens
        if ended.error is not None:
            self.stats.ended_badly(stream.slo_class, ended.error)

    def _degraded(self, degrade: Degrade) -> None:
        stream = self._streams.get(degrade.request_id)
        if stream is not None:
            self.stats.degraded(stream.slo_class, degrade.reason)

    def _start_worker(self, worker: WorkerId, epoch: int) -> None:
        self.stats.worker(worker).starts += 1
        try:
            self.workers.start(worker, epoch)
        except (SlabError, OSError) as error:
            self._pump.post("node", WorkerDown(worker=worker, epoch=epoch, cause=str(error)))

    def note(self, message: Input, now: float) -> None:
        """Keep what follows from a message that the Dispatcher has heard."""
        self._books.note(message, now)
        match message:
            case KvPulled():
                owner = self.dispatcher.worker_of(message.request_id)
                stream = self._streams.get(message.request_id)
                if stream is not None and owner == message.worker:
                    stream.worker = owner
            case WorkerUp():
                self.workers.is_up(message.worker, message.epoch)
            case _:
                pass

    # --- odds and ends -------------------------------------------------------------------------

    def _busy(self, worker: WorkerId) -> float:
        view = self.dispatcher.view.workers.get(worker)
        return 0.0 if view is None else float(view.assigned)

    def _make_start(self, worker: WorkerId, epoch: int, *, load_weights: bool) -> WorkerStart:
        return self.settings.worker_start(
            self.specs[worker],
            epoch,
            role=self.dispatcher.view.workers[worker].role,
            hash_key=self.text.hash_key,
            load_weights=load_weights,
        )

    def _sink_broke(self, stream: Stream) -> None:
        self._pump.post("api", Cancelled(request_id=stream.id, kind=ErrorKind.INTERNAL))

    def failed(self, words: str) -> None:
        """The scheduler failed: end everything loudly, serve nothing more."""
        self.broken = words
        self._intake.broke(words)
        self.asks.refuse(words)
        if self.failure is not None and not self.failure.done():
            self.failure.set_result(words)

    async def _change(self) -> None:
        """Sleep until something was handled."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(future)
        await future

    def settled(self) -> None:
        """Wake those who wait for a change."""
        while self._waiters:
            future = self._waiters.pop()
            if not future.done():
                future.set_result(None)

    def _num_in(self, *states: WorkerState) -> int:
        views = self.dispatcher.view.workers.values()
        return sum(view.state in states for view in views)


def _make_info(settings: NodeSettings, policy: Policy, *, vocab_size: int) -> NodeInfo:
    return NodeInfo(
        model=settings.model,
        created=int(time.time()),
        max_model_len=settings.batcher.max_model_len,
        vocab_size=vocab_size,
        eos_token_ids=settings.eos_token_ids,
        policy=settings.policy,
        uses_priority=policy.uses_priority,
        judges_budgets=policy.dispatch.late is not None,
        version=settings.version,
        fingerprint=settings.fingerprint,
        dtype=settings.dtype,
    )


def _make_journal(settings: NodeSettings, file: JournalFile | None) -> Journal:
    header = JournalHeader(
        config=settings.dispatcher,
        workers=settings.workers,
        policy=settings.policy,
        settings=dict(settings.policy_settings),
        roles=None if settings.role_settings is None else dict(settings.role_settings),
    )
    write = None if file is None else file.write
    return Journal(header, ring_records=settings.journal_records, write=write)
