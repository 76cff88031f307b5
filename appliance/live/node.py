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
from collections import OrderedDict
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
    Arrived,
    Assign,
    Cancelled,
    Degrade,
    DrainExpired,
    DrainStarted,
    Ended,
    Heartbeat,
    Input,
    LoadWeights,
    Migrate,
    Output,
    Park,
    Preempted,
    Pull,
    Quarantine,
    Refused,
    Reject,
    Release,
    Report,
    Resume,
    SetBudget,
    SetRole,
    StartWorker,
    StepReported,
    Wake,
    WeightsLoaded,
    Woke,
    WorkerDown,
    WorkerUp,
)
from appliance.core.slots import Policy
from appliance.core.start import WorkerStart
from appliance.core.types import ErrorKind, Request, RequestId, WorkerId
from appliance.live import admin
from appliance.live.holding import Holding
from appliance.live.journal_file import JournalFile
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
MAX_MILESTONES = 200


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
        self.info = _make_info(settings, vocab_size=text.vocab_size)
        self.dispatcher = Dispatcher(
            settings.dispatcher,
            workers=settings.workers,
            policy=policy.dispatch,
            validate=settings.validate,
        )
        self.stats = NodeStats(tuple(spec.id for spec in settings.workers))
        self.timeline: list[tuple[float, str]] = []
        """What happened during the start: (time on the node's clock, words)."""
        self.started_at = clock()
        self.unready_since: float | None = self.started_at
        """Since when no worker has been ready; None while one is."""
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
        self._submitting: RequestId | None = None
        self._reject: Reject | None = None
        """What the Dispatcher said to the request being submitted."""
        self._names: OrderedDict[str, tuple[RequestId, ...]] = OrderedDict()
        self._next_id = 1
        self._waiters: list[asyncio.Future[None]] = []
        self.workers = Workers(
            settings.pool,
            spawner,
            make_start=self._make_start,
            events=self,
            watch=settings.watch,
            clock=clock,
        )

    # --- life of the node ----------------------------------------------------------------------

    def start(self) -> None:
        """Start all workers; returns at once. Needs the running loop."""
        loop = asyncio.get_running_loop()
        self.failure = loop.create_future()
        self._spawner.attach(loop, lambda: self._milestone("imports done"))
        self.workers.open()
        self._pump.post("clock", Woke())

    async def wait_ready(self, num_workers: int = 1) -> None:
        """Return when that many workers are ready. Raises `StartFailed` when no worker is left that
        could get ready by itself."""
        while self._num_in(WorkerState.READY) < num_workers:
            if self.broken:
                raise StartFailed(self.broken)
            if self._num_in(WorkerState.QUARANTINED) == len(self.settings.workers):
                raise StartFailed("no worker could be started: " + admin.why_none(self))
            await self._change()

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
            raise Rejected(ErrorKind.INTERNAL, self.broken)
        if self._closed:
            raise Rejected(ErrorKind.DRAINING, "the server is shutting down")
        prompt = spec.prompt
        if spec.salt != prompt.salt:
            prompt = self.text.name_blocks(prompt.ids, spec.salt)
        ids = tuple(RequestId(self._next_id + index) for index in range(len(sinks)))
        self._next_id += len(sinks)
        ticket = Ticket(spec.name, ids)
        packed, now = prompt.ids.tobytes(), self._clock()
        arrived = now if spec.arrived is None else min(spec.arrived, now)
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
                raise Rejected(reject.kind, reject.reason, reject.retry_after)
        self._names[spec.name] = ids
        if len(self._names) > self.settings.journal_records // 2:  # a story has two or more
            self._names.popitem(last=False)
        self.stats.submitted += 1
        self.stats.sequences += len(ids)
        return ticket

    def cancel(self, ticket: Ticket, kind: ErrorKind = ErrorKind.CANCELLED) -> None:
        """Give up all answers of this ticket that have not ended. Idempotent."""
        for request_id in ticket.request_ids:
            stream = self._streams.get(request_id)
            if stream is not None and not stream.cancelled:
                stream.cancelled = True
                self._pump.post("api", Cancelled(request_id=request_id, kind=kind))

    def state(self) -> dict[str, Any]:
        """The document of `/admin/state`."""
        return admin.state_document(self, self._clock())

    def story(self, name: str) -> dict[str, Any] | None:
        """What happened to the request of this name; None when it is not (or no longer) known."""
        ids = self._names.get(name)
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
    def num_open(self) -> int:
        """Answers under way."""
        return len(self._streams)

    # --- what workers say (WorkerEvents) -------------------------------------------------------

    def frame(self, worker: WorkerId, reports: list[Report], payload: bytes) -> None:
        """One frame of a living worker."""
        if self.broken:
            return
        if payload:
            try:
                self.stats.emitted_tokens += self._streams.fan_out(payload)
            except (msgspec.MsgspecError, ValueError) as error:
                self.workers.kill(worker, f"it broke the protocol: {error}")
                return
        self._pump.post_all(f"worker {worker}", reports)

    def down(self, worker: WorkerId, epoch: int, cause: str) -> None:
        """A worker's process is gone."""
        self.stats.workers[worker].deaths += 1
        self.stats.workers[worker].last_cause = cause
        log.error("worker has died", extra={"worker": worker, "epoch": epoch, "cause": cause})
        self._pump.post("node", WorkerDown(worker=worker, epoch=epoch, cause=cause))

    def stderr(self, worker: WorkerId, line: str) -> None:
        """A worker wrote a line to its standard error."""
        del worker  # the line says so itself
        with suppress(OSError, ValueError):  # whoever read our stderr has gone: serve on
            self._stderr(line)

    # --- what the Dispatcher says (Hands) ------------------------------------------------------

    def carry_out(self, output: Output, now: float) -> None:
        """Do what the Dispatcher said."""
        match output:
            case Assign() | Pull():
                self._assign(output, now)
            case Abort() | Migrate() | Resume() | Release() | SetRole() | SetBudget():
                self.workers.send(output.worker, output)
            case LoadWeights() | Park() | Wake():
                self.workers.send(output.worker, output)
            case Reject():
                self._rejected(output)
            case Degrade():
                log.info("request is degraded", extra={"request": output.request_id})
            case Ended():
                self._ended(output)
            case StartWorker():
                self._start_worker(output.worker, output.epoch)
            case Quarantine():
                log.error(
                    "worker is quarantined",
                    extra={"worker": output.worker, "reason": output.reason},
                )
            case Answered() | Decided():
                pass
            case never:
                assert_never(never)

    def _assign(self, command: Assign | Pull, now: float) -> None:
        request_id = command.request.id
        stream = self._streams.get(request_id)
        if stream is None or stream.num_emitted != command.emitted_tokens:
            sent = None if stream is None else stream.num_emitted
            log.error(
                "tokens sent and tokens counted differ: the request is given up",
                extra={"request": request_id, "sent": sent, "counted": command.emitted_tokens},
            )
            self._pump.post("node", Cancelled(request_id=request_id, kind=ErrorKind.INTERNAL))
            return
        if command.emitted_tokens:
            self.stats.replaced += 1
        if self.dispatcher.view.workers[command.worker].assigned <= 1:
            self.stats.workers[command.worker].moved_at = now
        self.workers.send(command.worker, command, self._streams.payload(request_id))

    def _ended(self, ended: Ended) -> None:
        stream = self._streams.end(ended)
        if stream is None:
            return
        how = ended.reason or ended.error
        self.stats.ended[how.value if how is not None else "?"] += 1
        self.stats.prompt_tokens += len(stream.prompt) // 4
        self.stats.cached_tokens += ended.cached_tokens

    def _rejected(self, reject: Reject) -> None:
        self.stats.rejected[reject.kind.value] += 1
        request_id = reject.request_id
        if request_id == self._submitting:
            self._reject = reject
            self._streams.forget(request_id)
        else:
            end = Ended(request_id=request_id, error=reject.kind, message=reject.reason)
            self._streams.end(end)

    def _start_worker(self, worker: WorkerId, epoch: int) -> None:
        self.stats.workers[worker].starts += 1
        try:
            self.workers.start(worker, epoch)
        except (SlabError, OSError) as error:
            self._pump.post("node", WorkerDown(worker=worker, epoch=epoch, cause=str(error)))

    def note(self, message: Input, now: float) -> None:
        """Keep the numbers that the node shows."""
        match message:
            case StepReported():
                self.stats.workers[message.worker].stepped(message, now)
                if self.stats.observe_step is not None:
                    self.stats.observe_step(message.worker, message.elapsed, len(message.ids))
            case Heartbeat():
                stats = self.stats.workers[message.worker]
                stats.beat(message)
                if self.dispatcher.view.workers[message.worker].assigned == 0:
                    stats.moved_at = now  # nothing to do is progress
            case Preempted():
                self.stats.workers[message.worker].preemptions += 1
            case WeightsLoaded():
                stats = self.stats.workers[message.worker]
                stats.weights_source, stats.weights_seconds = message.source, message.seconds
                self._milestone(f"worker {message.worker}: weights from {message.source}")
            case WorkerDown():
                self._watch_readiness(now)
            case WorkerUp():
                self._watch_readiness(now)
                self.stats.workers[message.worker].born(now)
                self._milestone(f"worker {message.worker}: ready")
                log.info("worker is ready", extra={"worker": message.worker})
            case Refused(command="Start"):
                log.error(
                    "worker cannot start",
                    extra={"worker": message.worker, "reason": message.reason},
                )
            case _:
                pass

    # --- odds and ends -------------------------------------------------------------------------

    def _make_start(self, worker: WorkerId, epoch: int, *, load_weights: bool) -> WorkerStart:
        return self.settings.worker_start(
            worker, epoch, hash_key=self.text.hash_key, load_weights=load_weights
        )

    def _offer(self, request: Request) -> Reject | None:
        """Let the Dispatcher hear of a request; its refusal, None if it accepts."""
        self._submitting, self._reject = request.id, None
        self._pump.post("api", Arrived(request=request))
        self._submitting = None
        if self.broken:  # by a request of this submission: those after it are not heard any more
            self._streams.end_all(ErrorKind.INTERNAL, self.broken)
        return self._reject

    def _take_back(self, ids: Sequence[RequestId]) -> None:
        """Undo accepted answers of a submission whose later answer was refused; nobody hears of
        it."""
        for request_id in ids:
            self._streams.forget(request_id)
            self._pump.post("api", Cancelled(request_id=request_id))

    def _sink_broke(self, stream: Stream) -> None:
        self._pump.post("api", Cancelled(request_id=stream.id, kind=ErrorKind.INTERNAL))

    def failed(self, words: str) -> None:
        """The scheduler failed: end everything loudly, serve nothing more."""
        self.broken = words
        self._streams.end_all(ErrorKind.INTERNAL, words)
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

    def _num_in(self, state: WorkerState) -> int:
        views = self.dispatcher.view.workers.values()
        return sum(view.state is state for view in views)

    def _watch_readiness(self, now: float) -> None:
        if self._num_in(WorkerState.READY):
            self.unready_since = None
        elif self.unready_since is None:
            self.unready_since = now

    def _milestone(self, words: str) -> None:
        if len(self.timeline) < MAX_MILESTONES:
            self.timeline.append((self._clock(), words))


def _make_info(settings: NodeSettings, *, vocab_size: int) -> NodeInfo:
    return NodeInfo(
        model=settings.model,
        created=int(time.time()),
        max_model_len=settings.batcher.max_model_len,
        vocab_size=vocab_size,
        eos_token_ids=settings.eos_token_ids,
        policy=settings.policy,
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
    )
    write = None if file is None else file.write
    return Journal(header, ring_records=settings.journal_records, write=write)
