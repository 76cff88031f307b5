"""Changing the roles of workers while they serve, as a transaction (R9).

    prepare  a worker that gives up decoding is DRAINING: nothing new goes there, what decodes there
             is migrated, as far as others have room, until nothing is left to move or
             `drain_seconds` are over. Others serve on in their old role.
    set      all workers of the transaction are FLIPPING: each hears `SetRole` with an epoch.
    publish  all have said `RoleChanged`: they are READY in their new roles.

With `wind_down = "wait"` every worker of the transaction is DRAINING until it has nothing left, or
the time is over; answers are not moved for it. It is there to be compared with.

What did not move stays and is served as if the worker were mixed. A death, a refusal or a time-out
at any point puts all of them back: READY in the old role, which is said again with a newer epoch to
those that were told the new one. Weights, pool and prefix cache stay in any case. Either all
workers of a transaction change or none does; a worker is in one transaction at most.

A role is a preference, so nothing has to wait for a flip: while a phase has no worker the others
serve it."""

from collections.abc import Mapping

from appliance.core.asks import Answered, Decided, Outcome, RolesAsked
from appliance.core.audit import Audit
from appliance.core.lifecycle import WorkerState
from appliance.core.messages import RoleChanged, SetRole
from appliance.core.node_state import NodeState
from appliance.core.types import Role, WorkerId
from appliance.core.worker_table import WorkerSlot


class Flip:
    """One transaction."""

    def __init__(
        self, roles: Mapping[WorkerId, Role], decided: Decided, *, ask: int | None, deadline: float
    ) -> None:
        self.roles = dict(roles)
        self.decided = decided
        self.ask = ask
        self.deadline = deadline
        self.is_set = False
        """The workers have been told."""
        self.changed: set[WorkerId] = set()
        """Those that have said so."""
        self.moved_before = 0
        """Sequences that had moved out of its workers before it began."""


class Flipper:
    """Begins, follows and ends transactions."""

    def __init__(self, state: NodeState, *, audit: Audit) -> None:
        self._state = state
        self._audit = audit
        self._flips: list[Flip] = []
        self.ended_at = float("-inf")
        """When the last transaction was over."""

    @property
    def next_deadline(self) -> float | None:
        """When to look again even if nothing happens."""
        return min((flip.deadline for flip in self._flips), default=None)

    @property
    def is_flipping(self) -> bool:
        """Whether any transaction is under way."""
        return bool(self._flips)

    def is_busy(self, worker: WorkerId) -> bool:
        """Whether that worker is in a transaction."""
        return any(worker in flip.roles for flip in self._flips)

    # --- beginning ----------------------------------------------------------------------------

    def asked(self, message: RolesAsked, now: float) -> None:
        """An operator wants a flip."""
        roles = dict(message.roles)
        wrong = self.refusal(roles)
        if wrong:
            self._answer(message.ask, Outcome.REFUSED, seconds=0.0, reason=wrong)
            return
        changed = {w: role for w, role in roles.items() if self._state.slots[w].role is not role}
        if not changed:
            self._answer(message.ask, Outcome.DONE, seconds=0.0)
            return
        decided = self._audit.decide(
            "flip", now, by="operator", workers=tuple(changed), trigger=_words(changed)
        )
        self.begin(changed, decided, now, ask=message.ask)

    def refusal(self, roles: Mapping[WorkerId, Role]) -> str:
        """Why these workers cannot flip now; empty if they can."""
        if not roles:
            return "no worker is named"
        if self._state.is_draining:
            return "the server is shutting down"
        for worker in roles:
            slot = self._state.slots.get(worker)
            if slot is None:
                return f"there is no worker {worker}"
            if self.is_busy(worker):
                return f"worker {worker} is changing its role already"
            if slot.state is not WorkerState.READY:
                return f"worker {worker} is {slot.state.value}, not ready"
            if slot.reserved:
                return f"worker {worker} is tried with a request that may have killed others"
        return ""

    def begin(
        self,
        roles: Mapping[WorkerId, Role],
        decided: Decided,
        now: float,
        *,
        ask: int | None = None,
    ) -> None:
        """Begin a transaction that `refusal` has nothing against."""
        flip = Flip(roles, decided, ask=ask, deadline=now + self._state.config.drain_seconds)
        self._flips.append(flip)
        for worker, role in flip.roles.items():
            slot = self._state.slots[worker]
            flip.moved_before += slot.moved_out
            slot.next_role = None if self._waits else role
            slot.touch()
            if role is Role.PREFILL or self._waits:
                slot.go(WorkerState.DRAINING)
                self._state.moves.call_off_incoming(slot, now)
        self._state.note_roles()

    # --- following ----------------------------------------------------------------------------

    def step(self, now: float) -> None:
        """Go on with every transaction whose workers are prepared, or whose time is over."""
        for flip in list(self._flips):
            if flip.is_set:
                if now >= flip.deadline:
                    missing = sorted(flip.roles.keys() - flip.changed)
                    seconds = self._state.config.flip_seconds
                    self._fail(flip, now, f"workers {missing} did not answer in {seconds} s")
            elif now >= flip.deadline or all(map(self._is_prepared, flip.roles)):
                self._set(flip, now)

    @property
    def _waits(self) -> bool:
        """Answers end where they are before a flip."""
        return self._state.config.wind_down == "wait"

    def _is_prepared(self, worker: WorkerId) -> bool:
        """Nothing moves out of a draining worker any more (what can move has begun to)."""
        slot = self._state.slots[worker]
        if slot.state is not WorkerState.DRAINING:
            return True
        if self._waits:
            return not slot.assigned and not slot.leased
        return all(record.move is None for record in slot.assigned.values())

    def _set(self, flip: Flip, now: float) -> None:
        slots = [self._state.slots[worker] for worker in flip.roles]
        reserved = [slot.id for slot in slots if slot.reserved]
        if reserved:
            self._fail(flip, now, f"worker {reserved[0]} is needed to try a suspected request")
            return
        flip.is_set = True
        flip.deadline = now + self._state.config.flip_seconds
        for slot in slots:
            slot.next_role = flip.roles[slot.id]
            slot.go(WorkerState.FLIPPING)
            self._say(slot, flip.roles[slot.id])
        self._state.note_roles()

    def _say(self, slot: WorkerSlot, role: Role) -> None:
        slot.role_epoch += 1
        self._state.out.append(SetRole(worker=slot.id, role=role, epoch=slot.role_epoch))

    def role_changed(self, slot: WorkerSlot, report: RoleChanged, now: float) -> None:
        """A worker has its new role. An older epoch is of a transaction that is over."""
        flip = self._of(slot)
        if flip is None or not flip.is_set or report.epoch != slot.role_epoch:
            return
        flip.changed.add(slot.id)
        if len(flip.changed) == len(flip.roles):
            self._publish(flip, now)

    def refused(self, slot: WorkerSlot, reason: str, now: float) -> None:
        """A worker does not take its new role."""
        flip = self._of(slot)
        if flip is not None and flip.is_set:
            self._fail(flip, now, f"worker {slot.id} refused: {reason}")

    def worker_lost(self, slot: WorkerSlot, now: float) -> None:
        """A worker died; it comes back in its old role."""
        flip = self._of(slot)
        if flip is not None:
            self._fail(flip, now, f"worker {slot.id} died: {slot.last_cause}")

    # --- ending -------------------------------------------------------------------------------

    def _publish(self, flip: Flip, now: float) -> None:
        stayed = 0
        for worker, role in flip.roles.items():
            slot = self._state.slots[worker]
            slot.role, slot.role_since, slot.next_role = role, now, None
            slot.go(WorkerState.READY)
            stayed += 0 if slot.prefers_decode else len(slot.assigned)
        words = f"; {stayed} requests stayed where they were" if stayed else ""
        self._end(flip, now, outcome=Outcome.DONE, words=f"done{words}")

    def _fail(self, flip: Flip, now: float, reason: str) -> None:
        for worker in flip.roles:
            slot = self._state.slots[worker]
            slot.next_role = None
            slot.touch()
            if slot.state in (WorkerState.DRAINING, WorkerState.FLIPPING):
                if flip.is_set:
                    self._say(slot, slot.role)
                slot.go(WorkerState.READY)
        words = f"rolled back: {reason}"
        self._end(flip, now, outcome=Outcome.ROLLED_BACK, words=words, reason=reason)

    def _end(
        self, flip: Flip, now: float, *, outcome: Outcome, words: str, reason: str = ""
    ) -> None:
        self._flips.remove(flip)
        self._state.note_roles()
        self.ended_at = now
        moved = sum(self._state.slots[w].moved_out for w in flip.roles) - flip.moved_before
        self._audit.conclude(flip.decided, words)
        if flip.ask is not None:
            seconds = now - flip.decided.at
            self._answer(flip.ask, outcome, seconds=seconds, migrated=moved, reason=reason)

    def _of(self, slot: WorkerSlot) -> Flip | None:
        return next((flip for flip in self._flips if slot.id in flip.roles), None)

    def _answer(
        self, ask: int, outcome: Outcome, *, seconds: float, migrated: int = 0, reason: str = ""
    ) -> None:
        self._state.out.append(
            Answered(ask=ask, outcome=outcome, seconds=seconds, migrated=migrated, reason=reason)
        )


def _words(roles: Mapping[WorkerId, Role]) -> str:
    return "asked: " + ", ".join(f"{worker} to {role.value}" for worker, role in roles.items())
