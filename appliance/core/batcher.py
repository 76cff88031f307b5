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

Reports that no step carries come from `handle`, with a `Heartbeat` that has the load if it changed.
"""

from collections import deque
from collections.abc import Iterator, Sequence

from appliance.core.blocks import BlockLedger
from appliance.core.committing import Committer, ProtocolError
from appliance.core.messages import (
    Abort,
    Aborted,
    Assign,
    CacheChanged,
    Command,
    Heartbeat,
    LoadWeights,
    Migrate,
    Park,
    Pull,
    Refused,
    Release,
    Report,
    Resume,
    RoleChanged,
    SetBudget,
    SetRole,
    StepReported,
    Wake,
)
from appliance.core.planning import Planner
from appliance.core.sequence import OVER, LiveSequence, Queues, SeqState
from appliance.core.slots import BatchSlots
from appliance.core.types import (
    BatcherConfig,
    CacheGroupSpec,
    ErrorKind,
    RequestId,
    Role,
    StepPlan,
    StepResult,
    WorkerId,
    WorkerLoad,
)


class _Outstanding:
    """A plan whose result has not come, and the sequences of its work items."""

    __slots__ = ("plan", "planned_at", "seqs")

    def __init__(self, plan: StepPlan, seqs: list[LiveSequence], planned_at: float) -> None:
        self.plan = plan
        self.seqs = seqs
        self.planned_at = planned_at


class Batcher:
    """One worker's queue, batch and blocks. `queues` and `ledger` are for reading (laws, views)."""

    def __init__(
        self,
        worker: WorkerId,
        config: BatcherConfig,
        *,
        groups: Sequence[CacheGroupSpec],
        policy: BatchSlots,
    ) -> None:
        self.worker = worker
        self.config = config
        self.ledger = BlockLedger(groups, prefix_cache=config.enable_prefix_cache)
        self.queues = Queues(config, self.ledger)
        self._reports: list[Report] = []
        self._planner = Planner(worker, self.queues, policy=policy, reports=self._reports)
        self._committer = Committer(worker, self.queues, reports=self._reports)
        self._outstanding: deque[_Outstanding] = deque()
        self._last_planned = 0
        self._last_finished = 0
        self._last_finished_at = 0.0
        self._tickets = 0
        self._parked = False

    # --- what the shell may ask -----------------------------------------------------------------

    def is_live(self, request_id: RequestId) -> bool:
        """Whether tokens of this sequence still count. False for one that is unknown, aborted or
        finished: the shell drops what a step sampled for it."""
        seq = self.queues.by_id.get(request_id)
        return seq is not None and seq.state not in OVER

    def has_work(self) -> bool:
        """Whether some sequence still has tokens to get. With no plan outstanding, `next_step` then
        gives one (if the policy grants anything)."""
        queues = self.queues
        return len(queues.by_id) > queues.num_over

    @property
    def num_outstanding(self) -> int:
        """Plans whose result has not come."""
        return len(self._outstanding)

    def planned_sequences(self) -> Iterator[LiveSequence]:
        """Whose work is in outstanding plans, once per work item."""
        for entry in self._outstanding:
            yield from entry.seqs

    def next_wakeup(self) -> float | None:
        """When to ask again though nothing happens: never, no rule of a Batcher waits for a
        time."""
        return None

    def load(self) -> WorkerLoad:
        """Blocks of all cache groups together, and the queues, as of now."""
        queues = self.queues
        counts = self.ledger.counts()
        return WorkerLoad(
            blocks_total=counts.total,
            blocks_free=counts.free,
            blocks_cached=counts.cached,
            blocks_held=counts.held,
            blocks_leased=counts.leased,
            queued=len(queues.waiting) + queues.num_blocked,
            running=len(queues.running) - queues.num_over,
            backlog_tokens=queues.backlog_tokens,
        )

    # --- commands -------------------------------------------------------------------------------

    def handle(self, command: Command, now: float) -> list[Report]:
        """Obey a command or answer `Refused`. Raises `ProtocolError` for one that is not for this
        worker, or that assigns what is already here."""
        if command.worker != self.worker:
            raise ProtocolError(f"worker {self.worker} was handed {command}")
        match command:
            case Assign():
                return self._assign(command, now)
            case Abort():
                return self._abort(command.request_id, now)
            case SetRole(role=Role.MIXED, epoch=epoch):
                return [RoleChanged(worker=self.worker, role=Role.MIXED, epoch=epoch)]
            case SetRole(role=role):
                return [self._refused(command, f"role {role} is not served here, only mixed")]
            case SetBudget(prefill_tokens=tokens, max_decodes=decodes):
                if tokens < 1 or decodes < 1:
                    reason = f"prefill_tokens {tokens} and max_decodes {decodes} must be at least 1"
                    return [self._refused(command, reason)]
                self._planner.prefill_tokens = tokens
                self._planner.max_decodes = decodes
                return []
            case Park():
                self._parked = True
                return []
            case Wake():
                self._parked = False
                return []
            case Pull(request=request):
                return [self._refused(command, "KV is not pulled here", request_id=request.id)]
            case Migrate(request_id=id_) | Release(request_id=id_) | Resume(request_id=id_):
                return [self._refused(command, "KV is not handed over here", request_id=id_)]
            case LoadWeights():
                return [self._refused(command, "weights are loaded once, when the worker starts")]

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

    def _heartbeat(self, now: float) -> Heartbeat:
        in_step = None
        if self._outstanding:
            in_step = now - max(self._outstanding[0].planned_at, self._last_finished_at)
        return Heartbeat(
            worker=self.worker, step=self._last_finished, in_step=in_step, load=self.load()
        )

    def _assign(self, command: Assign, now: float) -> list[Report]:
        request = command.request
        present = self.queues.by_id.get(request.id)
        if present is not None:
            raise ProtocolError(f"worker {self.worker} was assigned twice: {present.story()}")
        limit = min(request.prompt_tokens + request.max_tokens, self.config.max_model_len)
        refusal = self._why_not(command, limit)
        if refusal is not None:
            kind, reason = refusal
            return [self._refused(command, reason, kind=kind, request_id=request.id)]
        self._tickets += 1
        seq = LiveSequence(
            request,
            emitted_tokens=command.emitted_tokens,
            limit=limit,
            ticket=self._tickets,
            block_tokens=self.ledger.block_tokens,
        )
        self.queues.enter(seq, self._leader_to_wait_for(seq))
        return [self._heartbeat(now)]

    def _why_not(self, command: Assign, limit: int) -> tuple[ErrorKind, str] | None:
        request = command.request
        prompt, known = request.prompt_tokens, request.prompt_tokens + command.emitted_tokens
        if self._parked:
            return ErrorKind.NO_WORKER, f"worker {self.worker} is parked"
        if prompt < 1 or request.max_tokens < 1:
            return ErrorKind.INTERNAL, (
                f"prompt_tokens {prompt} and max_tokens {request.max_tokens} must be at least 1"
            )
        if prompt >= self.config.max_model_len:
            return ErrorKind.TOO_LONG, (
                f"the prompt has {prompt} tokens; with max_model_len "
                f"{self.config.max_model_len} it may have {self.config.max_model_len - 1}"
            )
        if known >= limit:
            return ErrorKind.INTERNAL, (
                f"{command.emitted_tokens} tokens were emitted already, "
                f"{limit - prompt} are allowed: nothing is left to do"
            )
        if len(request.prefix_hashes) > known // self.ledger.block_tokens:
            return ErrorKind.INTERNAL, (
                f"{len(request.prefix_hashes)} prefix_hashes for {known} tokens in blocks of "
                f"{self.ledger.block_tokens}"
            )
        lacking = self.ledger.lacking(limit - 1)
        if lacking is not None:
            spec, needed = lacking
            return ErrorKind.TOO_LONG, (
                f"prompt ({prompt} tokens) and max_tokens ({request.max_tokens}) need {needed} "
                f"blocks of {spec.block_tokens} tokens in cache group {spec.name!r}, there are "
                f"{spec.num_blocks}; lower max_tokens or give the worker more KV memory"
            )
        return None

    def _leader_to_wait_for(self, seq: LiveSequence) -> LiveSequence | None:
        """The leader of its n > 1 group, if blocks of the prompt will be there to share that are
        not yet. A leader that is not here (any more) is not waited for."""
        group = seq.request.group
        if group is None or group == seq.id or not self.config.enable_prefix_cache:
            return None
        leader = self.queues.by_id.get(group)
        if leader is None or leader.state in OVER:
            return None
        shared = min(seq.num_shared, leader.num_shared) * self.ledger.block_tokens
        return leader if leader.num_done < shared else None

    def _abort(self, request_id: RequestId, now: float) -> list[Report]:
        queues = self.queues
        seq = queues.by_id.get(request_id)
        if seq is None:
            return [Aborted(worker=self.worker, request_id=request_id)]
        if seq.num_outstanding:
            seq.answer_abort = True
            if seq.state not in OVER:
                queues.end(seq, SeqState.CANCELLED)
            return [self._heartbeat(now)]
        if seq.state in (SeqState.BLOCKED, SeqState.WAITING):
            queues.forget_queued(seq)
        else:
            queues.end(seq, SeqState.CANCELLED)
            queues.running.remove(seq)
            queues.forget_over(seq)
        return [Aborted(worker=self.worker, request_id=request_id), self._heartbeat(now)]

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
        )
        reports = [step, *self._reports]
        self._reports.clear()
        added, removed = self.ledger.drain_changes()
        if added or removed:
            reports.append(CacheChanged(worker=self.worker, added=added, removed=removed))
        return reports
