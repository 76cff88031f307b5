"""Batcher: decides what goes into the next forward steps of one worker and owns its KV ledger.

The shell around it owns the step loop::

    while plan := batcher.next_step(now):       # up to depth + 1 plans may be outstanding
        result = engine(plan)                   # oldest outstanding plan first
        reports = batcher.finish_step(result, now)

and hands it commands between steps. What is in a planned step cannot be taken back: an abort, a
late finish or a preemption marks the sequence, its blocks return when the last planned step that
holds it is finished. Plans are made without knowing token values, so a stop is noticed up to
`depth` steps late; what those steps sampled is dropped (`is_live` is False) and the answer is the
same at each depth. The end for length is known in advance and costs nothing.

Reports that no step carries come from the other calls, with a `Heartbeat` that has the load if it
changed.

Sequences and cached blocks move between workers (`docs/moves.md`). The source's side is the
`Exporter`'s, the target's the `Importer`'s, blocks by content the `Fetcher`'s. After *every* call
the shell takes what was said to others, in this order: it sends the reports to the node, copies
`drain_spills` to the host tier, writes `drain_index` to the shared index, starts `drain_copies`
and `drain_fetches`, sends `drain_peer`.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from appliance.core.accepting import limit_of, why_not
from appliance.core.announcing import cache_changes
from appliance.core.blocks import BlockLedger
from appliance.core.committing import Committer, ProtocolError
from appliance.core.exporting import Exporter
from appliance.core.fetching import Fetcher
from appliance.core.host_tier import HostTier, Spill
from appliance.core.importing import Importer
from appliance.core.messages import (
    Abort,
    Aborted,
    Assign,
    Command,
    Heartbeat,
    LoadWeights,
    Migrate,
    Park,
    Pull,
    Refused,
    Release,
    Released,
    Report,
    Resume,
    RoleChanged,
    SetBudget,
    SetRole,
    StepReported,
    Wake,
)
from appliance.core.peer import (
    Asked,
    CopyDone,
    CopyJob,
    Dropped,
    FetchDone,
    FetchJob,
    IndexChanges,
    Inherited,
    Offered,
    PeerMessage,
    Taken,
    Withdrawn,
)
from appliance.core.peer_mail import PeerMail
from appliance.core.planning import Planner
from appliance.core.roles import RolePreset, preset
from appliance.core.sequence import OVER, LiveSequence, Queues, SeqState
from appliance.core.slots import BatchSlots
from appliance.core.step_model import StepModel
from appliance.core.types import (
    BatcherConfig,
    BlockHash,
    BlockId,
    CacheGroupSpec,
    ErrorKind,
    MoveId,
    Request,
    RequestId,
    Role,
    StepPlan,
    StepResult,
    WorkerId,
    WorkerLoad,
)


class _Outstanding(NamedTuple):
    """A plan whose result has not come, and the sequences of its work items."""

    plan: StepPlan
    seqs: list[LiveSequence]
    planned_at: float


class Batcher:
    """One worker's queue, batch and blocks. `queues`, `ledger`, `exporter`, `importer` and
    `fetcher` are for reading (laws, views).

    `inherited`: what a predecessor left in the pool (one paged group only). `checksum`: of a block
    of this worker's pool, for copies that are checked; None: they are not. `tier` takes the cached
    blocks that are evicted (`UnsupportedCacheGroup` where it cannot). `steps`: how long they last,
    as far as is known."""

    def __init__(
        self,
        worker: WorkerId,
        config: BatcherConfig,
        *,
        groups: Sequence[CacheGroupSpec],
        policy: BatchSlots,
        role: Role = Role.MIXED,
        inherited: Inherited | None = None,
        checksum: Callable[[BlockId], int] | None = None,
        tier: HostTier | None = None,
        steps: StepModel | None = None,
    ) -> None:
        self.worker = worker
        self.config = config
        self.role = role
        self.role_epoch = 0
        self.ledger = BlockLedger(
            groups, prefix_cache=config.enable_prefix_cache, inherited=inherited, tier=tier
        )
        self.queues = queues = Queues(config, self.ledger, steps=steps)
        self._reports: list[Report] = []
        self._mail = PeerMail()
        reports, mail = self._reports, self._mail
        self.exporter = Exporter(worker, queues, mail=mail, reports=reports, checksum=checksum)
        self.importer = Importer(worker, queues, mail=mail, reports=reports)
        self.fetcher = Fetcher(worker, queues, reports=reports)
        self._planner = Planner(
            worker,
            queues,
            policy=policy,
            importer=self.importer,
            fetcher=self.fetcher,
            preset=preset(role, config),
            reports=reports,
        )
        self._committer = Committer(worker, queues, reports=reports)
        self._outstanding: deque[_Outstanding] = deque()
        self._last_planned = 0
        self._last_finished = 0
        self._last_finished_at = 0.0
        self._tickets = 0
        self._parked = False

    # --- what the shell may ask -----------------------------------------------------------------

    def is_live(self, request_id: RequestId) -> bool:
        """Whether tokens of this sequence still count, or may again (it is held). False for one
        that is unknown, aborted, finished, or has not arrived yet: the shell drops what a step
        sampled for it."""
        seq = self.queues.by_id.get(request_id)
        return seq is not None and seq.state not in OVER

    def has_work(self) -> bool:
        """Whether some sequence, not held and waiting for no copy, has tokens to get. With no plan
        outstanding `next_step` then gives one, if the policy grants anything and memory allows."""
        queues = self.queues
        idle = queues.num_over + queues.num_held
        if self.fetcher.busy:
            idle += self.fetcher.num_blocked
        return len(queues.by_id) > idle

    def request_of(self, move: MoveId) -> RequestId | None:
        """Whose KV this move moves; None when it is not known here (any more)."""
        moved = self.exporter.of_move(move) or self.importer.of_move(move)
        return None if moved is None else moved.seq.id

    @property
    def num_outstanding(self) -> int:
        """Plans whose result has not come."""
        return len(self._outstanding)

    def planned_sequences(self) -> Iterator[LiveSequence]:
        """Whose work is in outstanding plans, once per work item."""
        for entry in self._outstanding:
            yield from entry.seqs

    def next_wakeup(self) -> float | None:
        """When to call `wake` though nothing happens (a lease ends); None: never."""
        return self.exporter.next_deadline

    def load(self) -> WorkerLoad:
        """Blocks of all cache groups together, and the queues, as of now."""
        return self.queues.load()

    # --- commands -------------------------------------------------------------------------------

    def handle(self, command: Command, now: float) -> list[Report]:
        """Obey a command or answer `Refused`. Raises `ProtocolError` for one that is not for this
        worker, or that brings what is already here."""
        if command.worker != self.worker:
            raise ProtocolError(f"worker {self.worker} was handed {command}")
        before = self.load()
        reports: list[Report] = []
        match command:
            case Assign():
                reports = self._assign(command)
            case Abort():
                reports = self._abort(command.request_id)
            case Pull():
                reports = self._pull(command)
            case Migrate():
                reports = self._migrate(command)
            case Resume(move=move, request_id=id_):
                if not self.exporter.resume(move) and not self.is_live(id_):
                    reports = [self._released(move, id_, expired=True)]
            case Release(move=move, request_id=id_):
                if self.exporter.release(move):
                    reports = [self._released(move, id_)]
                else:
                    reports = [self._refused(command, "it has not stopped", request_id=id_)]
            case SetRole():
                reports = self._set_role(command)
            case SetBudget(prefill_tokens=tokens, max_decodes=decodes):
                if tokens < 1 or decodes < 1:
                    reason = f"prefill_tokens {tokens} and max_decodes {decodes} must be at least 1"
                    reports = [self._refused(command, reason)]
                else:
                    self._planner.bounds = RolePreset(
                        prefill_tokens=tokens, beside_decodes=tokens, max_decodes=decodes
                    )
            case Park() | Wake():
                self._parked = isinstance(command, Park)
            case LoadWeights():
                reason = "weights are loaded once, when the worker starts"
                reports = [self._refused(command, reason)]
        about = command.move if isinstance(command, Migrate | Pull | Resume | Release) else None
        return self._answer(reports, before, now, about=about)

    def _answer(
        self, reports: list[Report], before: WorkerLoad, now: float, *, about: MoveId | None = None
    ) -> list[Report]:
        """What planning had to say, `reports`, what has become possible, the load if it changed."""
        self._reports += reports
        self._settle(now, about)
        reports = self._reports.copy()
        self._reports.clear()
        if self.load() != before:
            reports.append(self._heartbeat(now))
        return reports

    def _settle(self, now: float, about: MoveId | None = None) -> None:
        """Do what has become possible: for this move only, or (None) for all."""
        if self.exporter.busy:
            self.exporter.settle(now, about)
        if self.importer.busy:
            self.importer.settle(now, about)

    def _set_role(self, command: SetRole) -> list[Report]:
        if command.epoch < self.role_epoch:
            reason = f"role epoch {command.epoch} is over, {self.role_epoch} is in service"
            return [self._refused(command, reason)]
        self.role, self.role_epoch = command.role, command.epoch
        self._planner.bounds = preset(command.role, self.config)
        return [RoleChanged(worker=self.worker, role=command.role, epoch=command.epoch)]

    def _refused(
        self,
        command: Command,
        reason: str,
        *,
        kind: ErrorKind = ErrorKind.INTERNAL,
        request_id: RequestId | None = None,
    ) -> Refused:
        return Refused(
            worker=self.worker,
            command=type(command).__name__,
            kind=kind,
            reason=reason,
            request_id=request_id,
        )

    def _released(self, move: MoveId, request_id: RequestId, *, expired: bool = False) -> Released:
        return Released(worker=self.worker, move=move, request_id=request_id, expired=expired)

    def _heartbeat(self, now: float) -> Heartbeat:
        in_step = None
        if self._outstanding:
            in_step = now - max(self._outstanding[0].planned_at, self._last_finished_at)
        return Heartbeat(
            worker=self.worker, step=self._last_finished, in_step=in_step, load=self.load()
        )

    def _assign(self, command: Assign) -> list[Report]:
        request = command.request
        refusal = self._why_not(request, command.emitted_tokens)
        if refusal is not None:
            kind, reason = refusal
            return [self._refused(command, reason, kind=kind, request_id=request.id)]
        seq = self._new_sequence(request, command.emitted_tokens)
        leader = self.queues.leader_to_wait_for(seq)
        if leader is not None:
            self.fetcher.refuse(command, "it waits for the leader of its group")
        elif self.fetcher.begin(command, seq):
            return []
        self.queues.enter(seq, leader)
        return []

    def _pull(self, command: Pull) -> list[Report]:
        request = command.request
        refusal = self._why_not(request, command.emitted_tokens)
        if not self.ledger.is_paged:
            refusal = ErrorKind.INTERNAL, "only workers with one paged cache group exchange KV"
        if refusal is not None:
            kind, reason = refusal
            self.importer.turn_away(command, reason)
            return [self._refused(command, reason, kind=kind, request_id=request.id)]
        self.importer.begin(command, self._new_sequence(request, command.emitted_tokens))
        return []

    def _migrate(self, command: Migrate) -> list[Report]:
        seq = self.queues.by_id.get(command.request_id)
        reason = ""
        if seq is None or seq.state in OVER:
            reason = "this sequence is not here"
        elif not self.ledger.is_paged:
            reason = "only workers with one paged cache group exchange KV"
        elif self.exporter.of_request(seq.id) is not None:
            reason = "it is moving already"
        if seq is None or reason:
            self.exporter.turn_away(command, reason)
            return [self._refused(command, reason, request_id=command.request_id)]
        self.exporter.begin(command, seq)
        return []

    def _new_sequence(self, request: Request, emitted_tokens: int) -> LiveSequence:
        self._tickets += 1
        return LiveSequence(
            request,
            emitted_tokens=emitted_tokens,
            limit=limit_of(request, self.config),
            ticket=self._tickets,
            block_tokens=self.ledger.block_tokens,
        )

    def _why_not(self, request: Request, emitted_tokens: int) -> tuple[ErrorKind, str] | None:
        """Why this sequence cannot be served here, if so. Raises `ProtocolError` if it is being
        served already."""
        present = self.queues.by_id.get(request.id)
        if present is not None:
            raise ProtocolError(f"worker {self.worker} was given twice: {present.story()}")
        if self.importer.of_request(request.id) or self.fetcher.of_request(request.id):
            raise ProtocolError(f"worker {self.worker} was given twice: request {request.id}")
        if self._parked:
            return ErrorKind.NO_WORKER, f"worker {self.worker} is parked"
        return why_not(request, emitted_tokens, config=self.config, ledger=self.ledger)

    def _abort(self, request_id: RequestId) -> list[Report]:
        queues = self.queues
        if self.importer.abort(request_id) or self.fetcher.abort(request_id):
            return []
        seq = queues.by_id.get(request_id)
        if seq is None or self.exporter.abort(request_id):
            return [Aborted(worker=self.worker, request_id=request_id)]
        if seq.num_outstanding:
            seq.answer_abort = True
            if seq.state not in OVER:
                queues.end(seq, SeqState.CANCELLED)
            return []
        if seq.state in (SeqState.BLOCKED, SeqState.WAITING):
            queues.forget_queued(seq)
        else:
            queues.end(seq, SeqState.CANCELLED)
            queues.running.remove(seq)
            queues.forget_over(seq)
        return [Aborted(worker=self.worker, request_id=request_id)]

    # --- moves ----------------------------------------------------------------------------------

    def hear_peer(
        self,
        peer: WorkerId,
        message: PeerMessage,
        now: float,
        *,
        hashes: Sequence[BlockHash] = (),
    ) -> list[Report]:
        """A peer speaks. `hashes`, with a final offer: names of all full blocks of the known tokens
        (the prompt's and those of the payload), in order; empty without a prefix cache."""
        before = self.load()
        match message:
            case Asked() | Taken() | Dropped():
                self.exporter.hear(peer, message, now)
            case Offered() | Withdrawn():
                self.importer.hear(peer, message, now, hashes=hashes)
        return self._answer([], before, now, about=message.move)

    def peer_lost(self, peer: WorkerId, now: float) -> list[Report]:
        """The process of this peer is gone, or cannot be reached: imports from it fail unless their
        final offer is here, exports to it end; what has stopped for it waits for the node. Its
        copies still end with a `CopyDone`."""
        before = self.load()
        self._mail.forget(peer)
        self.exporter.lose(peer)
        self.importer.lose(peer)
        return self._answer([], before, now)

    def copied(self, done: CopyDone, now: float) -> list[Report]:
        """A `CopyJob` has ended. Raises `ProtocolError` if it was not under way."""
        before = self.load()
        if not self.importer.copied(done):
            raise ProtocolError(f"a copy ended that was not under way: {done}")
        return self._answer([], before, now, about=done.move) + self.announce()

    def fetched(self, done: FetchDone, now: float) -> list[Report]:
        """A `FetchJob` has ended. Raises `ProtocolError` if it was not under way."""
        before = self.load()
        if not self.fetcher.fetched(done):
            raise ProtocolError(f"a fetch ended that was not under way: {done}")
        return self._answer([], before, now) + self.announce()

    def wake(self, now: float) -> list[Report]:
        """Look at the time: end leases. To be called once `next_wakeup` has come, steps or not."""
        before = self.load()
        self.exporter.expire(now)
        return self._answer([], before, now)

    def drain_peer(self) -> list[tuple[WorkerId, PeerMessage]]:
        """What is to be sent to peers, after the reports of the same call."""
        return self._mail.drain()

    def drain_copies(self) -> list[CopyJob]:
        """Copies to be made, each answered by `copied`; those of one move in their order."""
        return self.importer.drain_copies()

    def drain_fetches(self) -> list[FetchJob]:
        """Fetches to be made, each answered by `fetched`."""
        return self.fetcher.drain_fetches()

    def drain_index(self) -> IndexChanges:
        """What the shared index must say: to be written before the next step is executed and before
        the copies that were drained with it begin."""
        return self.ledger.drain_index()

    def drain_spills(self) -> tuple[Spill, ...]:
        """Blocks to be copied into the host tier, before anything of `drain_index` is written."""
        return () if self.ledger.tier is None else self.ledger.tier.drain_spills()

    def announce(self) -> list[Report]:
        """Changes of the cache that no report told; after `WorkerUp`, what the pool holds."""
        return cache_changes(self.worker, self.ledger)

    # --- steps ----------------------------------------------------------------------------------

    def next_step(self, now: float) -> StepPlan | None:
        """Plan one more step. None when `depth + 1` plans are outstanding or nothing can be planned
        before one of them is finished (or at all). Raises `PolicyError`."""
        queues = self.queues
        if len(self._outstanding) > self.config.depth or not (queues.waiting or queues.running):
            return None
        work, seqs = self._planner.plan(self._last_planned + 1, now)
        if not work:
            return None
        self._last_planned += 1
        plan = StepPlan(step=self._last_planned, work=tuple(work))
        self._outstanding.append(_Outstanding(plan, seqs, now))
        return plan

    def finish_step(self, result: StepResult, now: float) -> list[Report]:
        """Commit the oldest outstanding plan. `result` has one entry per work item that sampled, in
        plan order; those of sequences that are not live are ignored and may be left out. Returns
        the step's report first. Raises `ProtocolError` for a result that does not belong to the
        plan."""
        if not self._outstanding or self._outstanding[0].plan.step != result.step:
            raise ProtocolError(
                f"a result of step {result.step} came, which is not the oldest plan"
            )
        entry = self._outstanding.popleft()
        tally = self._committer.commit(entry.plan, entry.seqs, result=result, now=now)
        self._last_finished, self._last_finished_at = result.step, now
        self._settle(now)
        step = StepReported(
            worker=self.worker,
            step=result.step,
            elapsed=result.elapsed,
            prefill_tokens=tally.prefill_tokens,
            decode_tokens=tally.decode_tokens,
            ids=tuple(tally.ids),
            counts=tuple(tally.counts) if tally.several else (),
            finished=tuple(tally.finished),
            load=self.load(),
            prefill_pairs=tally.prefill_pairs,
            context_tokens=tally.context_tokens,
        )
        reports = [step, *self._reports, *self.announce()]
        self._reports.clear()
        return reports
