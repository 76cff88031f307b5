"""Which workers there are, and which of them are on standby.

*Park* winds a worker down as a drain does (nothing new goes there, what runs there moves away) and
then leaves its process up, with weights mapped and links open; *wake* puts it back into service at
once. A worker that was specified as `parked` goes on standby when it comes up. *Add* makes a new
worker known, which is started like any other.

Operators ask for that by messages, the controller by its plans (`appliance.core.steering`). A
worker that an operator parked stays on standby until an operator wakes it: the controller wakes
only those that began there or that it parked itself. It adds workers only from
`DispatcherConfig.spares`.

A worker that cannot be emptied within `park_seconds` serves on. The last one in service is not
parked, nor one whose pool alone is large enough for a request that lives. When all others are
quarantined a parked worker is woken without being asked."""

from appliance.core.admission import too_large
from appliance.core.asks import Answered, Decided, Outcome, ParkAsked, WakeAsked, WorkerAsked
from appliance.core.audit import Audit
from appliance.core.life_keeping import LifeKeeper
from appliance.core.lifecycle import WorkerState
from appliance.core.messages import Park, Wake
from appliance.core.node_state import NodeState
from appliance.core.types import Role, WorkerId, WorkerSpec
from appliance.core.worker_table import WorkerSlot

COMING = frozenset({WorkerState.STARTING, WorkerState.DEAD})


class Ask:
    """Something that takes time; `ask` is None where nobody asked for it."""

    def __init__(self, ask: int | None, decided: Decided, *, deadline: float | None = None) -> None:
        self.ask = ask
        self.decided = decided
        self.deadline = deadline
        self.moved_before = 0


class Roster:
    """Parks, wakes and adds workers."""

    def __init__(self, state: NodeState, *, life: LifeKeeper, audit: Audit) -> None:
        self._state = state
        self._life = life
        self._audit = audit
        self._parking: dict[WorkerId, Ask] = {}
        self._coming: dict[WorkerId, Ask] = {}
        """Workers that are to serve when they are up."""

    @property
    def next_deadline(self) -> float | None:
        """When to look again even if nothing happens."""
        times = [ask.deadline for ask in self._parking.values() if ask.deadline is not None]
        return min(times, default=None)

    # --- asked --------------------------------------------------------------------------------

    def park_asked(self, message: ParkAsked, now: float) -> None:
        """Take a worker out of service, its process kept."""
        slot = self._state.slots.get(message.worker)
        if slot is not None and slot.state is WorkerState.PARKED:
            slot.on_call = False
            slot.touch()
            self._answer(message.ask, Outcome.DONE)
            return
        wrong = self.park_refusal(message.worker)
        if wrong or slot is None:
            self._answer(message.ask, Outcome.REFUSED, reason=wrong)
            return
        decided = self._audit.decide(
            "park", now, by="operator", workers=(slot.id,), trigger="asked"
        )
        slot.on_call = False
        self.park(slot, decided, now, ask=message.ask)

    def park(
        self, slot: WorkerSlot, decided: Decided, now: float, *, ask: int | None = None
    ) -> None:
        """Begin to take a worker out of service that `park_refusal` has nothing against."""
        slot.parked = True
        self._state.note_roles()
        deadline = now + self._state.config.park_seconds
        begun = self._parking[slot.id] = Ask(ask, decided, deadline=deadline)
        begun.moved_before = slot.moved_out
        slot.go(WorkerState.DRAINING)
        self._state.moves.call_off_incoming(slot, now)

    def park_refusal(self, worker: WorkerId) -> str:
        """Why this worker cannot be parked now; empty if it can."""
        slot = self._state.slots.get(worker)
        if slot is None:
            return f"there is no worker {worker}"
        if slot.state is not WorkerState.READY or slot.next_role is not None:
            busy = "is changing its role" if slot.next_role else f"is {slot.state.value}, not ready"
            return f"worker {worker} {busy}"
        if slot.reserved:
            return f"worker {worker} is tried with a request that may have killed others"
        others = [
            other
            for other in self._state.slots.values()
            if other is not slot and other.state is WorkerState.READY and not other.parked
        ]
        if not others:
            return f"worker {worker} is the only one in service"
        slot.parked = True
        needed = any(too_large(self._state, one.request) for one in self._state.requests.records())
        slot.parked = False
        words = f"only worker {worker} has memory enough for a request that is being served"
        return words if needed else ""

    def wake_asked(self, message: WakeAsked, now: float) -> None:
        """Put a parked worker back into service, or start a quarantined one again."""
        slot = self._state.slots.get(message.worker)
        if slot is None:
            reason = f"there is no worker {message.worker}"
            self._answer(message.ask, Outcome.REFUSED, reason=reason)
        elif slot.id in self._parking or slot.id in self._coming:
            reason = f"worker {slot.id} is being parked or started already"
            self._answer(message.ask, Outcome.REFUSED, reason=reason)
        elif slot.state is WorkerState.QUARANTINED:
            self._restart(slot, message.ask, now)
        elif not slot.parked:
            self._answer(message.ask, Outcome.DONE)
        else:
            decided = self._audit.decide(
                "wake", now, by="operator", workers=(slot.id,), trigger="asked"
            )
            self.wake(slot.id, decided, now, ask=message.ask)

    def wake_refusal(self, worker: WorkerId) -> str:
        """Why the controller may not wake this worker; empty if it may. One that is being parked
        for it may be called back."""
        slot = self._state.slots.get(worker)
        if slot is None:
            return f"there is no worker {worker}"
        if slot.state is WorkerState.QUARANTINED:
            return f"worker {worker} died too often"
        return "" if slot.on_call else f"worker {worker} was parked by an operator"

    def wake(
        self, worker: WorkerId, decided: Decided, now: float, *, ask: int | None = None
    ) -> None:
        """Put a worker back into service that is parked, is being parked, or will be when it is
        up."""
        slot = self._state.slots[worker]
        slot.on_call = True
        begun = Ask(ask, decided)
        if slot.id in self._parking:
            self._serve_on(slot, now, reason="it is needed")
        elif slot.state in COMING:
            slot.parked = False
            self._state.note_roles()
            self._coming[slot.id] = begun
            return
        else:
            self._wake(slot)
        self._end(begun, now, outcome=Outcome.DONE)

    def _restart(self, slot: WorkerSlot, ask: int, now: float) -> None:
        """End a quarantine: the worker begins with a clean record."""
        decided = self._audit.decide(
            "restart", now, by="operator", workers=(slot.id,), trigger="asked"
        )
        slot.bad_epochs.clear()
        slot.parked = False
        self._state.note_roles()
        slot.start_at = now
        self._life.plan()
        self._coming[slot.id] = Ask(ask, decided)

    def worker_asked(self, message: WorkerAsked, now: float) -> None:
        """One more worker."""
        spec = message.spec
        if self._state.is_draining or spec.id in self._state.slots:
            known = f"there is a worker {spec.id} already"
            reason = "the server is shutting down" if self._state.is_draining else known
            self._answer(message.ask, Outcome.REFUSED, reason=reason)
            return
        decided = self._audit.decide("add", now, by="operator", workers=(spec.id,), trigger="asked")
        self.add(spec, decided, now, ask=message.ask)

    def next_spare(self) -> WorkerSpec | None:
        """The worker that the controller would add."""
        return next((s for s in self._state.spares if s.id not in self._state.slots), None)

    def add(
        self, spec: WorkerSpec, decided: Decided, now: float, *, ask: int | None = None
    ) -> None:
        """Make a new worker known; it is started."""
        slot = self._state.slots[spec.id] = WorkerSlot(spec)
        self._state.spares = [each for each in self._state.spares if each.id != spec.id]
        self._state.note_roles()
        slot.start_at = now
        self._life.plan()
        self._coming[spec.id] = Ask(ask, decided)

    def busy_pools(self) -> set[Role]:
        """Roles of workers that are being parked or are on their way into service."""
        return {self._state.slots[worker].role for worker in (*self._parking, *self._coming)}

    # --- following ----------------------------------------------------------------------------

    def step(self, now: float) -> None:
        """Park those that are empty, give up on those whose time is over."""
        for worker, ask in list(self._parking.items()):
            slot = self._state.slots[worker]
            if not (slot.assigned or slot.incoming or slot.leased or slot.leaving):
                del self._parking[worker]
                slot.go(WorkerState.PARKED)
                self._state.out.append(Park(worker=worker))
                self._end(ask, now, outcome=Outcome.DONE, moved=slot.moved_out - ask.moved_before)
            elif ask.deadline is not None and now >= ask.deadline:
                reason = f"{len(slot.assigned)} requests could not be moved in time"
                self._serve_on(slot, now, reason=reason)
        self._wake_the_last(now)

    def worker_up(self, slot: WorkerSlot, now: float) -> None:
        """A worker that was waited for serves."""
        ask = self._coming.pop(slot.id, None)
        if ask is not None:
            self._end(ask, now, outcome=Outcome.DONE)

    def worker_lost(self, slot: WorkerSlot, now: float) -> None:
        """A worker died: it is not parked any more (unless it was), and may never come."""
        if slot.id in self._parking:
            self._serve_on(slot, now, reason=f"it died: {slot.last_cause}")
        if slot.state is WorkerState.QUARANTINED:
            ask = self._coming.pop(slot.id, None)
            if ask is not None:
                reason = f"it cannot start: {slot.last_cause}"
                self._end(ask, now, outcome=Outcome.ROLLED_BACK, reason=reason)

    def refused(self, slot: WorkerSlot, reason: str, now: float) -> None:
        """A worker does not want to be parked: then it serves."""
        if slot.state is WorkerState.PARKED:
            self._wake(slot)
            words = f"worker {slot.id} refused to be parked: {reason}"
            self._audit.decide(
                "wake", now, by="mechanism", workers=(slot.id,), trigger=words, outcome="done"
            )

    def _serve_on(self, slot: WorkerSlot, now: float, *, reason: str) -> None:
        ask = self._parking.pop(slot.id)
        slot.parked, slot.on_call = False, True
        self._state.note_roles()
        slot.touch()
        if slot.state is WorkerState.DRAINING:
            slot.go(WorkerState.READY)
        moved = slot.moved_out - ask.moved_before
        self._end(ask, now, outcome=Outcome.ROLLED_BACK, moved=moved, reason=reason)

    def _wake(self, slot: WorkerSlot) -> None:
        slot.parked, slot.on_call = False, True
        self._state.note_roles()
        slot.touch()
        if slot.state is WorkerState.PARKED:
            slot.go(WorkerState.READY)
            self._state.out.append(Wake(worker=slot.id))
            self._life.pools_changed = True

    def _wake_the_last(self, now: float) -> None:
        slots = self._state.slots.values()
        if any(not s.parked and s.state is not WorkerState.QUARANTINED for s in slots):
            return
        parked = [s for s in slots if s.parked and s.state is not WorkerState.QUARANTINED]
        if parked:
            slot = min(parked, key=lambda s: (s.state is not WorkerState.PARKED, s.id))
            words = "no other worker is left"
            self._audit.decide(
                "wake", now, by="mechanism", workers=(slot.id,), trigger=words, outcome="done"
            )
            self._wake(slot)

    def _end(
        self, ask: Ask, now: float, *, outcome: Outcome, moved: int = 0, reason: str = ""
    ) -> None:
        words = "done" if outcome is Outcome.DONE else f"rolled back: {reason}"
        self._audit.conclude(ask.decided, words)
        seconds = now - ask.decided.at
        self._answer(ask.ask, outcome, seconds=seconds, migrated=moved, reason=reason)

    def _answer(
        self,
        ask: int | None,
        outcome: Outcome,
        *,
        seconds: float = 0.0,
        migrated: int = 0,
        reason: str = "",
    ) -> None:
        if ask is not None:
            answer = Answered(
                ask=ask, outcome=outcome, seconds=seconds, migrated=migrated, reason=reason
            )
            self._state.out.append(answer)
