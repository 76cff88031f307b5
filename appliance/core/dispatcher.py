"""The node-level scheduler: admits, places, keeps workers alive, and says how every request ended.

Every call makes the same four moves: *record* what was heard, *decide* until nothing more is said,
*check* the laws (with `validate`), *answer*. Mechanism lives here and decides what is legal; the
policy decides what is wise: whom to admit, in which order, to which worker.

Placement binds late: a request waits at the node until a worker is willing (it holds fewer
requests than it can run, plus `queue_ahead`), so the queue stays where it can be ordered,
cancelled and drained. From then on a placed request costs nothing per token but one lookup.

The worker's ledger is the truth and what is kept here a hint: reports about requests that are not
(or no longer) at the worker are normal and change nothing, as are those of workers that are not in
service."""

from collections.abc import Sequence
from typing import assert_never

from appliance.core.admission import end_hopeless, legal_refusal, retry_after
from appliance.core.asks import ParkAsked, RolesAsked, WakeAsked, WorkerAsked
from appliance.core.audit import Audit
from appliance.core.cost import CostModel
from appliance.core.flipping import Flipper
from appliance.core.invariants_node import NodeAuditor
from appliance.core.isolation import Isolation
from appliance.core.latecomers import Latecomers
from appliance.core.life_keeping import LifeKeeper
from appliance.core.lifecycle import RequestState
from appliance.core.messages import (
    Abort,
    Aborted,
    Arrived,
    CacheChanged,
    Cancelled,
    DrainExpired,
    DrainStarted,
    Heartbeat,
    Input,
    KvPulled,
    LinkDown,
    LinkUp,
    Output,
    Preempted,
    Prefilled,
    PrefixPulled,
    PullFailed,
    Refused,
    Reject,
    Released,
    Report,
    RoleChanged,
    StepReported,
    WeightsLoaded,
    Woke,
    WorkerDown,
    WorkerUp,
)
from appliance.core.moving import Mover
from appliance.core.node_config import DispatcherConfig
from appliance.core.node_state import NodeState
from appliance.core.placing import Placer
from appliance.core.roster import Roster
from appliance.core.slots import Accept, DispatchSlots, PolicyMistake, Refuse
from appliance.core.steering import Steering
from appliance.core.types import ErrorKind, Request, RequestId, WorkerId, WorkerSpec
from appliance.core.view import NodeView
from appliance.core.worker_table import SERVING, WorkerSlot

__all__ = ["Dispatcher", "DispatcherConfig", "PolicyMistake"]

HOPELESS = frozenset({ErrorKind.TOO_LONG, ErrorKind.GRAMMAR})
"""What a worker refuses for good: no other worker and no other time would help."""


class Dispatcher:
    """One node. Hears `Input`s in the order of their times, says `Output`s. Holds no clock: the
    shell calls `handle(Woke(), now)` at the time `next_wakeup` names, and once at the start."""

    def __init__(
        self,
        config: DispatcherConfig,
        *,
        workers: Sequence[WorkerSpec],
        policy: DispatchSlots,
        cost: CostModel | None = None,
        validate: bool = False,
    ) -> None:
        """`validate` checks the laws after every message (for tests and `--validate`). Raises
        `ValueError` without workers or with two of the same id."""
        self._state = NodeState(config, workers=workers, cost=cost or CostModel(steps=config.steps))
        self._policy = policy
        self._life = LifeKeeper(self._state)
        self._isolation = Isolation(self._state)
        self._audit = audit = Audit(self._state)
        self._latecomers = Latecomers(self._state, policy=policy, audit=audit)
        self._placer = Placer(self._state, policy=policy, audit=audit)
        self._mover = Mover(self._state, policy=policy, audit=audit)
        self._flipper = Flipper(self._state, audit=audit)
        self._roster = Roster(self._state, life=self._life, audit=audit)
        self._steering = Steering(
            self._state, flipper=self._flipper, roster=self._roster, audit=audit
        )
        self._policy_wake: float | None = None
        self._now = 0.0
        self._auditor = NodeAuditor(self._state) if validate else None

    # --- what a shell may read ----------------------------------------------------------------

    @property
    def view(self) -> NodeView:
        """The node as policies see it."""
        return self._state.view

    @property
    def num_trials(self) -> int:
        """Trials of suspects so far (`appliance.core.isolation`)."""
        return self._state.num_trials

    @property
    def num_acquitted(self) -> int:
        """Those of them that acquitted the suspect."""
        return self._state.num_acquitted

    @property
    def num_live(self) -> int:
        """Requests accepted and not ended."""
        return len(self._state.requests)

    @property
    def is_draining(self) -> bool:
        """Whether new requests are turned away for good."""
        return self._state.is_draining

    def request_state(self, request_id: RequestId) -> RequestState | None:
        """The state of a live request; None for one that ended or never was."""
        record = self._state.requests.get(request_id)
        return None if record is None else record.state

    def worker_of(self, request_id: RequestId) -> WorkerId | None:
        """Whose tokens of this live request count; None while it is at no worker."""
        record = self._state.requests.get(request_id)
        return None if record is None else record.worker

    def is_on_trial(self, request_id: RequestId) -> bool:
        """Whether a live request is at its worker as a suspect (`appliance.core.isolation`)."""
        record = self._state.requests.get(request_id)
        return record is not None and record.isolated

    def emitted_tokens(self, request_id: RequestId) -> int:
        """Tokens that count as sent for a live request; 0 for others."""
        record = self._state.requests.get(request_id)
        return 0 if record is None else record.emitted

    def instance_seconds(self, now: float) -> float:
        """What the workers have cost until now (see `Traffic.instance_seconds`)."""
        return self._state.charged(now)

    def last_cause(self, worker: WorkerId) -> str:
        """What the worker's last death, or failed start, was put down to; empty if there was
        none."""
        return self._state.slots[worker].last_cause

    def epoch(self, worker: WorkerId) -> int:
        """Number of the worker's present incarnation."""
        return self._state.slots[worker].epoch

    def next_wakeup(self) -> float | None:
        """When to call `handle(Woke(), ...)` if nothing else happens; None: no need."""
        times = [
            until
            for record in self._state.requests.refused.values()
            for _, until in record.avoid.values()
            if until > self._now
        ]
        named = (
            self._life.next_start,
            self._policy_wake,
            self._flipper.next_deadline,
            self._roster.next_deadline,
            self._steering.next_deadline,
        )
        times += [at for at in named if at is not None]
        return min(times, default=None)

    # --- the four moves -----------------------------------------------------------------------

    def handle(self, message: Input, now: float) -> list[Output]:
        """Hear one message at `now` (never before the last one's) and answer what follows from it.

        Raises `ValueError` for an `Arrived` whose id is alive and `PolicyMistake` for an impossible
        decision; `LawBroken` with `validate`."""
        out: list[Output] = []
        self._state.out = out
        self._state.charge(now)
        self._now = now
        self._audit.settle(now)
        self._record(message, now)
        self._decide(now)
        if self._auditor is not None:
            self._auditor.check(message, now, outputs=out, promised=self._policy_wake is not None)
        return out

    def _decide(self, now: float) -> None:
        state = self._state
        self._life.start_due(now)
        if self._life.pools_changed:
            self._life.pools_changed = False
            end_hopeless(state, now)
        if self._policy.roles is not None:
            self._steering.step(self._policy.roles, now)
            self._life.start_due(now)
        asked = len(state.out)  # what had been said when moves were last thought about
        self._mover.step(now)
        self._flipper.step(now)
        if state.has_roles:
            self._roster.step(now)
        self._latecomers.step(now)
        said = -1
        while said != len(state.out):  # from here on no worker that is ready ceases to be
            said = len(state.out)
            self._isolation.step(now)
            self._placer.step(now)
            if state.has_roles or asked != len(state.out):
                asked = len(state.out)
                self._mover.step(now)
        self._policy_wake = self._policy.wakeup(state.view, now)

    def _record(self, message: Input, now: float) -> None:
        match message:
            case Arrived():
                self._arrived(message.request, now)
            case Cancelled():
                self._cancelled(message, now)
            case Woke():
                pass
            case DrainStarted():
                self._state.is_draining = True
            case DrainExpired():
                self._drain_expired(now)
            case RolesAsked():
                self._flipper.asked(message, now)
            case ParkAsked():
                self._roster.park_asked(message, now)
            case WakeAsked():
                self._roster.wake_asked(message, now)
            case WorkerAsked():
                self._roster.worker_asked(message, now)
            case _:
                slot = self._state.slots.get(message.worker)
                if slot is not None:
                    self._report(slot, message, now)

    # --- events -------------------------------------------------------------------------------

    def _arrived(self, request: Request, now: float) -> None:
        state = self._state
        refusal, by = legal_refusal(state, request), "mechanism"
        if refusal is None:
            match self._policy.admit(state.view, request, now):
                case Accept():
                    state.requests.add(request, now)
                    state.totals.count_arrival(request, state.cost)
                    return
                case Refuse(kind=kind, reason=reason, retry_after=after):
                    if after is None and kind in (ErrorKind.QUEUE_FULL, ErrorKind.BUDGET):
                        after = retry_after(state)
                    by = "policy"
                    refusal = Reject(
                        request_id=request.id, kind=kind, reason=reason, retry_after=after
                    )
                case never:
                    assert_never(never)
        state.out.append(refusal)
        self._audit.turned_away(refusal, now, by=by)

    def _cancelled(self, message: Cancelled, now: float) -> None:
        record = self._state.requests.get(message.request_id)
        if record is None or record.state is RequestState.CANCELLING:
            return
        if record.state is RequestState.WAITING:
            words = "the request was cancelled"
            self._state.fail(record, now, kind=message.kind, message=words)
        else:
            self._state.cancel(record, now, kind=message.kind)

    def _drain_expired(self, now: float) -> None:
        self._state.is_draining = True
        for record in self._state.requests.records():
            if record.state is RequestState.CANCELLING:
                self._state.end_cancelled(record, now)
                continue
            if record.worker is not None:
                self._state.out.append(Abort(worker=record.worker, request_id=record.request.id))
            words = "the server shut down before the answer was complete"
            self._state.fail(record, now, kind=ErrorKind.DRAIN_TIMEOUT, message=words)

    # --- reports ------------------------------------------------------------------------------

    def _report(self, slot: WorkerSlot, report: Report, now: float) -> None:
        match report:
            case WorkerUp():
                if self._life.worker_up(slot, report, now):
                    self._roster.worker_up(slot, now)
            case WorkerDown():
                if self._life.worker_down(slot, report, now):
                    self._flipper.worker_lost(slot, now)
                    self._roster.worker_lost(slot, now)
            case Refused(command="Start"):
                slot.last_words = report.reason
            case _ if slot.state not in SERVING:
                pass  # late words of an incarnation that is gone, or of one that is not up yet
            case StepReported():
                self._step_reported(slot, report, now)
            case Heartbeat():
                self._life.heartbeat(slot, report, now)
            case CacheChanged():
                slot.note_cache(report)
            case Preempted():
                self._preempted(slot, report)
            case Prefilled():
                self._mover.prefilled(slot, report, now)
            case KvPulled():
                self._mover.kv_pulled(slot, report, now)
            case PullFailed():
                self._mover.pull_failed(slot, report, now)
            case Released():
                self._mover.released(slot, report, now)
            case LinkUp() | LinkDown():
                self._mover.link(slot, report)
            case PrefixPulled():
                self._mover.prefix_pulled(slot, report)
            case Aborted():
                self._aborted(slot, report, now)
            case RoleChanged():
                self._flipper.role_changed(slot, report, now)
            case Refused():
                self._refused(slot, report, now)
            case WeightsLoaded():
                pass  # only of interest to the shell
            case never:
                assert_never(never)

    def _aborted(self, slot: WorkerSlot, report: Aborted, now: float) -> None:
        leaving = slot.leaving.get(report.request_id)
        if leaving is not None:
            self._state.left(leaving, slot)
            return
        words = f"worker {slot.id} dropped the request"
        self._given_back(slot, report.request_id, now, kind=ErrorKind.INTERNAL, words=words)

    def _refused(self, slot: WorkerSlot, report: Refused, now: float) -> None:
        match report.command:
            case "Assign" if report.request_id is not None:
                request_id = report.request_id
                self._given_back(slot, request_id, now, kind=report.kind, words=report.reason)
            case "Pull" | "Migrate":
                self._mover.refused(slot, report, now)
            case "SetRole":
                self._flipper.refused(slot, report.reason, now)
            case "Park":
                self._roster.refused(slot, report.reason, now)
            case _:
                pass  # answers to what is never asked for here

    def _step_reported(self, slot: WorkerSlot, report: StepReported, now: float) -> None:
        """The hot path: once per step and worker, a lookup per sequence that emitted."""
        slot.note_load(report.load, now)
        slot.stepped = True
        slot.proved_at = now
        self._state.cost.observe(report)
        self._state.totals.prefilled_tokens += report.prefill_tokens
        assigned, decoding = slot.assigned, RequestState.DECODING
        counts, tally, grown = report.counts, slot.tally, 0
        for index, request_id in enumerate(report.ids):
            record = assigned.get(request_id)
            if record is None:
                continue
            if record.pending:
                self._state.settle(record)
            if record.state is not decoding:
                if record.state is RequestState.ASSIGNED:
                    state = decoding if record.move is None else RequestState.MIGRATING
                    self._state.requests.move(record, state, now, worker=slot.id)
                    tally.begin_decode(record)
                    if record.first_token_at is None:
                        record.first_token_at = now
                elif record.state is not RequestState.MIGRATING:
                    continue
            count = counts[index] if counts else 1
            record.emitted += count
            grown += count
        tally.context_tokens += grown
        if slot.reserved:
            self._isolation.stepped(report)
        for end in report.finished:
            record = assigned.get(end.id)
            if record is None:
                continue
            if record.state is RequestState.CANCELLING:
                self._state.confirm_cancelled(record, now)
            else:
                self._state.finish(record, now, reason=end.reason, cached_tokens=end.cached_tokens)

    def _preempted(self, slot: WorkerSlot, report: Preempted) -> None:
        """It is recomputed at the same worker: its tokens are pending again."""
        record = slot.assigned.get(report.request_id)
        if record is None or record.pending:
            return
        if record.state in (RequestState.DECODING, RequestState.MIGRATING):
            record.pending = report.lost_tokens
            slot.pending_tokens += report.lost_tokens
            slot.tally.prompts[record.request.id] = record
            slot.touch()

    def _given_back(
        self, slot: WorkerSlot, request_id: RequestId, now: float, *, kind: ErrorKind, words: str
    ) -> None:
        """The worker does not serve it (any more): gone if it was cancelled, otherwise it waits
        again, for another worker or until something changed, but not for ever."""
        record = slot.assigned.get(request_id)
        if record is None:
            return
        state, config = self._state, self._state.config
        if record.state is RequestState.CANCELLING:
            state.confirm_cancelled(record, now)
            return
        record.refusals += 1
        if kind in HOPELESS or record.refusals > config.max_refusals:
            state.fail(record, now, kind=kind, message=words)
            return
        pause = config.refusal_pause * 2 ** (record.refusals - 1)
        state.requeue(record, now, avoid_until=now + pause)
