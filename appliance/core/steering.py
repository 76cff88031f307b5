"""Carrying out what the slot `roles` wants: flips, and who is in service.

The slot is asked between transactions of roles, at the times it names itself. What it wants is done
as far as it is legal, and each action is put on record with the slot's trigger, prediction and
price. *One structural action is in flight per pool* (the workers of one role): while a worker of a
pool is being parked or started, nothing else is begun there, except that a park may be called off.
An action that is refused is on record too, and its reason is the outcome."""

from collections.abc import Iterable, Mapping

from appliance.core.asks import Decided
from appliance.core.audit import Audit
from appliance.core.flipping import Flipper
from appliance.core.node_state import NodeState
from appliance.core.roster import Roster
from appliance.core.slots import PolicyMistake, RolePlan, RolesSlot
from appliance.core.types import Role, WorkerId

AFTER_A_FLIP = 0.001
"""Seconds after a transaction before the slot is asked again."""


class Steering:
    """Asks the slot and begins what it wants."""

    def __init__(self, state: NodeState, *, flipper: Flipper, roster: Roster, audit: Audit) -> None:
        self._state = state
        self._flipper = flipper
        self._roster = roster
        self._audit = audit
        self._again = float("-inf")
        self._alarm = False
        self._last_trigger = ""

    @property
    def next_deadline(self) -> float | None:
        """When to ask again even if nothing happens."""
        if not self._alarm or self._flipper.is_flipping:
            return None
        return self._due

    @property
    def _due(self) -> float:
        return max(self._again, self._flipper.ended_at + AFTER_A_FLIP)

    def step(self, roles: RolesSlot, now: float) -> None:
        """Let the policy say what should change."""
        if self._state.is_draining:
            self._alarm = False
            return
        if self._flipper.is_flipping or now < self._due:
            return
        plan = roles(self._state.view, now)
        if plan.again <= now:
            raise PolicyMistake(f"roles: asks to be asked again at {plan.again}, now is {now}")
        self._again, self._alarm = plan.again, plan.alarm
        if plan.add < 0:
            raise PolicyMistake(f"roles: add is {plan.add}; want 0 or more")
        if not self._begin(plan, now) and plan.trigger != self._last_trigger:
            self._decided(plan, now, kind="none", outcome="nothing changes")
        self._last_trigger = plan.trigger

    def _begin(self, plan: RolePlan, now: float) -> bool:
        """Begin what is legal; False if nothing was wanted."""
        slots = self._state.slots
        flips = {
            worker: role
            for worker, role in plan.roles.items()
            if worker not in slots or slots[worker].role is not role
        }
        wakes = [each for each in plan.wake if each not in slots or slots[each].parked]
        parks = [each for each in plan.park if each not in slots or not slots[each].parked]
        for worker in wakes:
            self._wake(plan, worker, now)
        if flips:
            self._flip(plan, flips, now)
        busy = self._roster.busy_pools()
        for role in flips.values() if self._flipper.is_flipping else ():
            busy.add(role)
        for _ in range(plan.add):
            self._add(plan, busy, now)
        for worker in parks:
            self._park(plan, worker, busy, now=now)
        return bool(flips or wakes or parks or plan.add)

    def _flip(self, plan: RolePlan, flips: Mapping[WorkerId, Role], now: float) -> None:
        slots = self._state.slots
        wrong = self._flipper.refusal(flips)
        if not wrong:
            pools = {*flips.values(), *(slots[worker].role for worker in flips)}
            wrong = self._in_the_way(pools, self._roster.busy_pools())
        if wrong:
            self._no(plan, now, kind="flip", workers=flips, reason=wrong)
        else:
            self._flipper.begin(flips, self._decided(plan, now, kind="flip", workers=flips), now)

    def _wake(self, plan: RolePlan, worker: WorkerId, now: float) -> None:
        wrong = self._roster.wake_refusal(worker)
        if wrong:
            self._no(plan, now, kind="wake", workers=[worker], reason=wrong)
        else:
            self._roster.wake(worker, self._decided(plan, now, kind="wake", workers=[worker]), now)

    def _add(self, plan: RolePlan, busy: set[Role], now: float) -> None:
        spec = self._roster.next_spare()
        wrong = "no worker is left that could be started"
        if spec is not None:
            wrong = self._in_the_way({spec.role}, busy)
        if wrong or spec is None:
            self._no(plan, now, kind="add", workers=(), reason=wrong)
        else:
            self._roster.add(spec, self._decided(plan, now, kind="add", workers=[spec.id]), now)

    def _park(self, plan: RolePlan, worker: WorkerId, busy: set[Role], *, now: float) -> None:
        slot = self._state.slots.get(worker)
        wrong = self._roster.park_refusal(worker)
        if slot is not None and not wrong:
            wrong = self._in_the_way({slot.role}, busy)
        if wrong or slot is None:
            self._no(plan, now, kind="park", workers=[worker], reason=wrong)
        else:
            decided = self._decided(plan, now, kind="park", workers=[worker])
            self._roster.park(slot, decided, now)

    def _in_the_way(self, pools: set[Role], busy: set[Role]) -> str:
        common = sorted(role.value for role in pools & busy)
        return f"another change of the {common[0]} workers is under way" if common else ""

    def _no(
        self,
        plan: RolePlan,
        now: float,
        *,
        kind: str,
        workers: Iterable[WorkerId],
        reason: str,
    ) -> None:
        """Put a refusal on record, unless the same trigger was on record last."""
        if plan.trigger != self._last_trigger:
            words = f"the {kind} was refused: {reason}"
            self._decided(plan, now, kind="none", workers=workers, outcome=words)

    def _decided(
        self,
        plan: RolePlan,
        now: float,
        *,
        kind: str,
        workers: Iterable[WorkerId] = (),
        outcome: str = "",
    ) -> Decided:
        return self._audit.decide(
            kind,
            now,
            by="controller",
            workers=tuple(workers),
            trigger=plan.trigger,
            prediction=plan.prediction,
            cost=plan.cost,
            outcome=outcome,
        )
