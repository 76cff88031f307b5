"""Which requests move to another worker, and what workers say about moves.

Everything at a worker whose role is prefill, or that is about to be parked, should go on elsewhere
as soon as another worker has room; nothing waits for that: until then it decodes where it is, as if
the worker were mixed (R28). So a hand-off, a drain, a flip and a retry after a failed move are the
same question, asked after every message: `place(view, request, Phase.DECODE, now)`. A request
without a first token is *handed off* (it stops after its first token), one that decodes is
*migrated* (it goes on until the target is nearly up to date).

What a request is while it moves is in `appliance.core.move_book`; the reasons are in
`docs/adr/0010-moves-and-flips.md`."""

from collections.abc import Iterator

from appliance.core.audit import Audit
from appliance.core.lifecycle import RequestState, WorkerState
from appliance.core.messages import (
    KvPulled,
    LinkDown,
    LinkUp,
    Prefilled,
    PrefixPulled,
    PullFailed,
    Refused,
    Released,
)
from appliance.core.node_state import NodeState
from appliance.core.request_table import RequestRecord
from appliance.core.slots import DispatchSlots, PolicyMistake
from appliance.core.types import Phase, Role
from appliance.core.worker_table import SERVING, WorkerSlot

HELD_WHERE_IT_IS = frozenset({WorkerState.READY, WorkerState.DRAINING, WorkerState.FLIPPING})


class Mover:
    """Begins moves and follows them. State lives in the records and slots."""

    def __init__(self, state: NodeState, *, policy: DispatchSlots, audit: Audit) -> None:
        self._state = state
        self._policy = policy
        self._audit = audit

    # --- deciding -----------------------------------------------------------------------------

    def step(self, now: float) -> None:
        """Begin the moves that can begin now. Raises `PolicyMistake` for an impossible answer."""
        if self._state.has_roles:
            self._leave_prefill(now)
        if self._policy.migrate is not None:
            self._balance(now)

    def _leave_prefill(self, now: float) -> None:
        for slot in self._state.slots.values():
            if slot.state not in HELD_WHERE_IT_IS or not (slot.parked or not slot.prefers_decode):
                continue
            if not slot.assigned:
                continue
            self._audit_lack(slot, now)
            others = [each for each in self._with_room() if each is not slot]
            if not others:
                continue
            for record in self._movable(slot):
                if any(each.has_room(record) for each in others):
                    self._move(record, now)

    def _movable(self, slot: WorkerSlot) -> Iterator[RequestRecord]:
        for record in list(slot.assigned.values()):
            resting = record.state in (RequestState.ASSIGNED, RequestState.DECODING)
            if resting and record.move is None and not record.suspected:
                yield record

    def _with_room(self) -> list[WorkerSlot]:
        """Workers that may take something. Cheap: asked before anything is weighed."""
        return [
            slot
            for slot in self._state.slots.values()
            if slot.state is WorkerState.READY
            and not slot.reserved
            and len(slot.assigned) + len(slot.incoming) < slot.max_num_seqs
        ]

    def _move(self, record: RequestRecord, now: float) -> None:
        targets = self._state.moves.targets(record, now)
        if not targets:
            return
        chosen = self._policy.place(self._state.view, record.request, Phase.DECODE, now)
        if chosen is None:
            return
        slot = self._state.slots.get(chosen)
        if slot not in targets:
            raise PolicyMistake(
                f"place: worker {chosen} may not take over request {record.request.id}; willing: "
                f"{[each.id for each in targets]}"
            )
        live = record.state is RequestState.DECODING
        self._state.moves.begin(record, slot, now, live=live)

    def _balance(self, now: float) -> None:
        migrate = self._policy.migrate
        if migrate is None:
            return
        for wish in migrate(self._state.view, now):
            record = self._state.requests.get(wish.id)
            slot = self._state.slots.get(wish.target)
            if record is None or slot is None:
                raise PolicyMistake(f"migrate: no request {wish.id} or no worker {wish.target}")
            decodes = record.state is RequestState.DECODING
            if decodes and slot in self._state.moves.targets(record, now):
                self._state.moves.begin(record, slot, now, live=True)
                where = () if record.worker is None else (record.worker,)
                self._audit.decide(
                    "rebalance",
                    now,
                    by="policy",
                    workers=(*where, slot.id),
                    trigger=f"request {wish.id} moves",
                    outcome="begun",
                )

    def _audit_lack(self, slot: WorkerSlot, now: float) -> None:
        """Say so if what is at a prefill worker has nowhere to go."""
        if slot.role is not Role.PREFILL:
            return
        key = f"decode {slot.id}"
        meant = [
            other.id
            for other in self._state.slots.values()
            if other is not slot and other.state is WorkerState.READY and other.prefers_decode
        ]
        linked = [other for other in meant if slot.id in self._state.links.get(other, ())]
        if linked:
            self._audit.over(key)
            return
        why = f"none of workers {meant} is linked with it" if meant else "no ready worker is for it"
        words = f"worker {slot.id} decodes: {why}"
        self._audit.fallback(key, now, workers=(slot.id,), trigger=words)

    # --- what workers say ---------------------------------------------------------------------

    def prefilled(self, slot: WorkerSlot, report: Prefilled, now: float) -> None:
        """The source has stopped. A move that is off has been answered by `Resume` or `Abort`."""
        record = slot.assigned.get(report.request_id)
        move = None if record is None else record.move
        if record is None or move is None or move.id != report.move or move.stopped:
            return
        if report.emitted_tokens == record.emitted:
            self._state.moves.hand_over(record, move, now)
        else:
            self._state.moves.call_off(record, now, held=True)

    def kv_pulled(self, slot: WorkerSlot, report: KvPulled, now: float) -> None:
        """The target goes on. If it does so after another token than the client got last, or
        before its source has stopped, it may not."""
        record = slot.assigned.get(report.request_id) or slot.incoming.get(report.request_id)
        move = None if record is None else record.move
        if record is None or move is None or move.id != report.move:
            return
        moves = self._state.moves
        if not move.stopped:
            moves.call_off(record, now, held=True)
        elif report.emitted_tokens == record.emitted:
            moves.land(record, move, now)
            slot.moves_refused = 0
            self._audit.over(f"refused {slot.id}")
        else:
            moves.forget_at(record, slot)
            moves.take_back(record, now)

    def pull_failed(self, slot: WorkerSlot, report: PullFailed, now: float) -> None:
        """The target holds nothing: it goes on at the source."""
        record = slot.assigned.get(report.request_id) or slot.incoming.get(report.request_id)
        move = None if record is None else record.move
        if record is None or move is None or move.id != report.move:
            return
        if move.stopped:
            self._state.moves.take_back(record, now)
        else:
            self._state.moves.call_off(record, now, held=False)

    def released(self, slot: WorkerSlot, report: Released, now: float) -> None:
        """A lease has ended. If it ran out before the word to go on came, the request has lost its
        worker."""
        if slot.leased.get(report.request_id) == report.move:
            del slot.leased[report.request_id]
            slot.touch()
        record = self._state.requests.get(report.request_id)
        if record is None:
            return
        if record.move is not None and record.move.id == report.move:
            record.move.leased = False
        elif report.expired and record.resumed == report.move and record.worker == slot.id:
            if record.state is RequestState.CANCELLING:
                return  # `Aborted` will come
            self._state.requeue(record, now)

    def refused(self, slot: WorkerSlot, report: Refused, now: float) -> None:
        """A worker takes no part in a move (`Pull`, `Migrate`); it is left alone for a while. What
        is said of a request that is not there any more means nothing."""
        pulls = report.command == "Pull"
        here = slot.incoming if pulls else slot.assigned
        record = None if report.request_id is None else here.get(report.request_id)
        if record is None or record.move is None or record.move.stopped:
            return
        config = self._state.config
        pause = min(config.move_pause * 2**slot.moves_refused, config.move_pause_max)
        slot.moves_refused += 1
        slot.moves_after = now + pause
        words = f"worker {slot.id} takes no part in moves: {report.reason}"
        self._audit.fallback(f"refused {slot.id}", now, workers=(slot.id,), trigger=words)
        self._state.moves.call_off(record, now, held=not pulls)

    # --- links --------------------------------------------------------------------------------

    def link(self, slot: WorkerSlot, report: LinkUp | LinkDown) -> None:
        """Who can copy from whom. Of an incarnation that is gone nothing counts."""
        peer = self._state.slots.get(report.peer)
        if peer is None or peer.epoch != report.peer_epoch or peer.state not in SERVING:
            return
        links = self._state.links.setdefault(slot.id, {})
        if isinstance(report, LinkUp):
            links[peer.id] = max(report.bytes_per_second, 1.0)
        else:
            links.pop(peer.id, None)

    def prefix_pulled(self, slot: WorkerSlot, report: PrefixPulled) -> None:
        """Cached blocks were copied: learn what that costs."""
        speed = self._state.copy_speed(slot, report.source)
        if speed is not None:
            self._state.cost.observe_copy(report, speed)
